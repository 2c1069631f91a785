"""The engine on DeepSpeed: the only file that imports deepspeed.

ZeRO 0 to 3, with experts on every process or spread over expert groups. With ZeRO 0 the gradient
norm and clipping are ours (clip_gradients): DeepSpeed's averages the ranks' norms there, which
differ once experts are spread (DeepSpeed#8475). With ZeRO 1 to 3 they are DeepSpeed's. An update
with a gradient that is not finite is never applied, on any rank.

DeepSpeed looks after expert parameters only where some module is one of its own MoE layers. So with
spread experts our sparse layers also become instances of its AutoEPMoELayer, of which nothing but
the name is used: router, exchange and experts stay ours.
"""

from __future__ import annotations

import logging
import math
import os
from typing import Any

from torch import Tensor, nn

from moe.config import OptimConfig, ParallelConfig
from moe.errors import UserError
from moe.parallel.engine import clip_gradients, set_learning_rate
from moe.parallel.expert_parallel import ExpertGroups, is_held_apart, mark_held_apart
from moe.parallel.processes import Processes
from moe.sparse.layer import MoELayer
from moe.train.optim import make_optimizer, parameter_groups


class DeepSpeedEngine:
    """See moe.parallel.engine.Engine; ZeRO 0."""

    def __init__(self, engine: Any, optim: OptimConfig, groups: ExpertGroups | None) -> None:
        self._engine, self._max_norm, self._groups = engine, optim.grad_clip, groups
        self.model, self.optimizer = engine.module, engine.optimizer

    def forward(self, *inputs: Tensor, **named: Tensor | None) -> object:
        return self._engine(*inputs, **named)

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        # the loss is already scaled by the step's number of labels, so not by accumulation steps
        self._engine.set_gradient_accumulation_boundary(is_last)
        self._engine.backward(loss, scale_wrt_gas=False)

    def step(self, *, lr: float) -> float:
        norm = clip_gradients(self.optimizer, max_norm=self._max_norm, groups=self._groups)
        if math.isfinite(norm):
            set_learning_rate(self.optimizer, lr)
            self._engine.step()
        self.discard()
        return norm

    def discard(self) -> None:
        self._engine.zero_grad()


class ZeroEngine(DeepSpeedEngine):
    """ZeRO 1 to 3: gradients are partitioned, so DeepSpeed clips; it skips what is not finite."""

    def step(self, *, lr: float) -> float:
        set_learning_rate(self.optimizer, lr)
        self._engine.step()
        # syncs: the norm is reported, and whether the step was skipped is counted on the host
        return math.nan if self.optimizer.overflow else float(self._engine.get_global_grad_norm())


def make(
    model: nn.Module,
    optim: OptimConfig,
    parallel: ParallelConfig,
    processes: Processes,
    groups: ExpertGroups | None = None,
) -> DeepSpeedEngine:
    """Return the engine; deepspeed.initialize broadcasts the first rank's parameters."""
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
    if groups is not None:
        mark_held_apart(model, groups)
        _become_deepspeed_layers(model, groups)
    stage = parallel.zero_stage
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=make_optimizer(model, optim, groups=_groups_with_experts_apart(model, optim)),
        config={
            "train_micro_batch_size_per_gpu": 1,  # only reported by DeepSpeed; the loop has its own
            "gradient_accumulation_steps": 1,
            "gradient_clipping": optim.grad_clip if stage > 0 else 0.0,
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
            "zero_allow_untested_optimizer": True,
            "steps_per_print": None,
        },
    )
    return (ZeroEngine if stage > 0 else DeepSpeedEngine)(engine, optim, groups)


def _groups_with_experts_apart(model: nn.Module, optim: OptimConfig) -> list[dict[str, Any]]:
    """Parameters held apart in groups of their own, as DeepSpeed wants them from a caller."""
    made = []
    for group in parameter_groups(model, optim):
        rest = {key: value for key, value in group.items() if key != "params"}
        apart = [p for p in group["params"] if is_held_apart(p)]
        shared = [p for p in group["params"] if not is_held_apart(p)]
        made.append({"params": shared, **rest})
        if apart:
            name = apart[0].group_name
            made.append({"params": apart, "moe": True, "name": name, **rest})
    return made


def _become_deepspeed_layers(model: nn.Module, groups: ExpertGroups) -> None:
    """Make every sparse layer an AutoEPMoELayer as well, and give DeepSpeed our groups."""
    from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
    from deepspeed.utils import groups as deepspeed_groups

    class DeepSpeedMoELayer(MoELayer, AutoEPMoELayer):
        """Our layer; what the engine asks of its own is answered, nothing of it runs."""

        def set_deepspeed_parallelism(self, *_: object, **__: object) -> None:
            if groups.name not in deepspeed_groups._get_expert_parallel_group_dict():
                deepspeed_groups._create_expert_and_data_parallel(groups.size)

    for module in model.modules():
        if isinstance(module, MoELayer):
            module.__class__ = DeepSpeedMoELayer
            module.ep_size, module.ep_rank = groups.size, groups.place  # type: ignore[attr-defined]


def _give_address_if_alone(processes: Processes) -> None:
    """Alone, without a launcher, DeepSpeed still wants a process group: of one, on loopback."""
    if processes.world_size == 1 and "MASTER_ADDR" not in os.environ:
        os.environ.update(MASTER_ADDR="127.0.0.1", RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
        os.environ["MASTER_PORT"] = "0"
