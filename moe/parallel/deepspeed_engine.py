"""The engine on DeepSpeed: the only file that imports deepspeed.

Today: ZeRO 0, so data parallelism with full gradients on every rank. The gradient norm, clipping
and the decision to skip are ours (clip_gradients), because DeepSpeed's fp32 ZeRO-0 clipping
averages per-rank norms once expert parallelism comes in (DeepSpeed#8475), and because an update
with a non-finite gradient must never be applied.
"""

from __future__ import annotations

import logging
import math
import os

from torch import Tensor, nn

from moe.config import OptimConfig, ParallelConfig
from moe.errors import UserError
from moe.parallel.engine import clip_gradients, set_learning_rate
from moe.parallel.processes import Processes
from moe.train.optim import make_optimizer


class DeepSpeedEngine:
    """See moe.parallel.engine.Engine."""

    def __init__(self, engine, optim: OptimConfig) -> None:
        self._engine, self._max_norm = engine, optim.grad_clip
        self.model, self.optimizer = engine.module, engine.optimizer

    def forward(self, *inputs: Tensor, **named: Tensor | None) -> object:
        return self._engine(*inputs, **named)

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        # the loss is already scaled by the step's number of labels, so not by accumulation steps
        self._engine.set_gradient_accumulation_boundary(is_last)
        self._engine.backward(loss, scale_wrt_gas=False)

    def step(self, *, lr: float) -> float:
        norm = clip_gradients(self.optimizer, max_norm=self._max_norm)
        if math.isfinite(norm):
            set_learning_rate(self.optimizer, lr)
            self._engine.step()
        self.discard()
        return norm

    def discard(self) -> None:
        self._engine.zero_grad()


def make(
    model: nn.Module, optim: OptimConfig, parallel: ParallelConfig, processes: Processes
) -> DeepSpeedEngine:
    """Return the engine; deepspeed.initialize broadcasts rank 0's parameters."""
    os.environ.setdefault("DS_ACCELERATOR", processes.device.type)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    try:
        import deepspeed
    except ImportError as error:
        raise UserError(
            "parallel.engine=deepspeed needs the package deepspeed: pip install 'phimoe[train]', "
            f"or use parallel=plain. ({error})"
        ) from error
    # its shared-memory all-reduce would be compiled at first use, by a C++ compiler that a user may
    # not have; one node's CPU ranks reduce over gloo instead
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    _give_address_if_alone(processes)
    backend = "nccl" if processes.device.type == "cuda" else "gloo"
    deepspeed.init_distributed(
        dist_backend=backend, rank=processes.rank, world_size=processes.world_size, verbose=False
    )
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=make_optimizer(model, optim),
        config={
            "train_micro_batch_size_per_gpu": 1,  # only reported by DeepSpeed; the loop has its own
            "gradient_accumulation_steps": 1,
            "gradient_clipping": 0.0,
            "zero_optimization": {"stage": parallel.zero_stage},
            "steps_per_print": None,
        },
    )
    return DeepSpeedEngine(engine, optim)


def _give_address_if_alone(processes: Processes) -> None:
    """Alone, without a launcher, DeepSpeed still wants a process group: of one, on loopback."""
    if processes.world_size == 1 and "MASTER_ADDR" not in os.environ:
        os.environ.update(MASTER_ADDR="127.0.0.1", RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
        os.environ["MASTER_PORT"] = "0"
