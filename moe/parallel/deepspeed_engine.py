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

import contextlib
import io
import logging
import math
import os
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe.config import OptimConfig, ParallelConfig
from moe.errors import ConfigError, UserError
from moe.model.init import KeptPart, WhenReady
from moe.parallel import zero_ranges
from moe.parallel.engine import clip_gradients, held_whole, set_learning_rate, start_moments
from moe.parallel.expert_parallel import ExpertGroups, is_held_apart, mark_held_apart
from moe.parallel.pieces import HeldRange, ReadRange, fill
from moe.parallel.processes import Processes
from moe.sparse.layer import MoELayer
from moe.train.optim import make_optimizer, parameter_groups


class DeepSpeedEngine:
    """See moe.parallel.engine.Engine; ZeRO 0."""

    def __init__(
        self, engine: Any, optim: OptimConfig, processes: Processes, groups: ExpertGroups | None
    ) -> None:
        self._engine, self._max_norm = engine, optim.grad_clip
        self._processes, self._groups = processes, groups
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

    def held(self) -> list[HeldRange]:
        return held_whole(
            self.model, self.optimizer, processes=self._processes, groups=self._groups
        )

    def load(self, read: ReadRange, *, with_moments: bool) -> None:
        if with_moments:
            start_moments(self.optimizer)
        fill(self.held(), read, with_moments=with_moments)


class ZeroEngine(DeepSpeedEngine):
    """ZeRO 1 to 3: gradients are partitioned, so DeepSpeed clips; it skips what is not finite."""

    def step(self, *, lr: float) -> float:
        set_learning_rate(self.optimizer, lr)
        self._engine.step()
        if self.optimizer.overflow:
            zero_ranges.forget_gradients(self.optimizer)
            return math.nan
        return float(self._engine.get_global_grad_norm())  # syncs: it is reported

    def discard(self) -> None:
        # the partitions are DeepSpeed's: let it find them not finite, and clean up as it does then
        zero_ranges.spoil_gradients(self.optimizer)
        self._engine.step()
        zero_ranges.forget_gradients(self.optimizer)

    def held(self) -> list[HeldRange]:
        return zero_ranges.held_ranges(self.model, self.optimizer, self._groups)

    def load(self, read: ReadRange, *, with_moments: bool) -> None:
        if with_moments:
            zero_ranges.start_partitioned_moments(self.optimizer)
        fill(self.held(), read, with_moments=with_moments)
        zero_ranges.round_parameters(self.model, self.optimizer)


def make(
    model: nn.Module,
    optim: OptimConfig,
    parallel: ParallelConfig,
    processes: Processes,
    groups: ExpertGroups | None = None,
) -> DeepSpeedEngine:
    """Return the engine; deepspeed.initialize broadcasts the first rank's parameters."""
    deepspeed = _start_deepspeed(processes, groups)
    if groups is not None:
        mark_held_apart(model, groups)
        _become_deepspeed_layers(model, groups)
    stage = parallel.zero_stage
    # one of its optimisers prints memory figures, and no setting turns them off
    with contextlib.redirect_stdout(io.StringIO()):
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=make_optimizer(model, optim, groups=_groups_with_experts_apart(model, optim)),
            config={
                "gradient_clipping": optim.grad_clip if stage > 0 else 0.0,
                **_settings(parallel),
            },
        )
    return (ZeroEngine if stage > 0 else DeepSpeedEngine)(engine, optim, processes, groups)


def module_partitioner(
    parallel: ParallelConfig, processes: Processes, groups: ExpertGroups | None = None
) -> WhenReady | None:
    """With ZeRO 3, what keeps this rank's part of a module's parameters as soon as they exist."""
    if parallel.zero_stage < 3:
        return None
    deepspeed = _start_deepspeed(processes, groups)
    dtype = torch.bfloat16 if parallel.bf16_parameters else torch.float32

    def partition(module: nn.Module) -> dict[str, KeptPart]:
        if groups is not None:
            mark_held_apart(module, groups)
            for parameter in filter(is_held_apart, module.parameters(recurse=False)):
                parameter.ds_zero_partition_process_group = _expert_data_group(groups)  # type: ignore[attr-defined]
        # only this module's own: the others are still on the meta device
        own = nn.Module()
        for name, parameter in module.named_parameters(recurse=False):
            own.register_parameter(name, parameter)
        deepspeed.zero.Init(module=own, config_dict_or_path=_settings(parallel), dtype=dtype)
        return zero_ranges.kept_parts(own)

    return partition


def _settings(parallel: ParallelConfig) -> dict[str, Any]:
    """What DeepSpeed is told in every case."""
    zero: dict[str, Any] = {"stage": parallel.zero_stage}
    if parallel.zero_stage == 3:
        zero["stage3_param_persistence_threshold"] = 0
    if parallel.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    settings = {
        "train_micro_batch_size_per_gpu": 1,  # only reported by DeepSpeed; the loop has its own
        "gradient_accumulation_steps": 1,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW: nothing to compile, same mathematics
        "steps_per_print": None,
    }
    if parallel.bf16_parameters:
        settings |= {
            "bf16": {"enabled": True, "check_grad_overflow": True},
            # gradients are added up, over micro-batches and over ranks, in float32
            "data_types": {"grad_accum_dtype": "fp32"},
            "communication_data_type": "fp32",
        }
    return settings


def _start_deepspeed(processes: Processes, groups: ExpertGroups | None) -> Any:
    """Import deepspeed and join its process group; the package."""
    wanted = os.environ.setdefault("DS_ACCELERATOR", processes.device.type)
    if processes.device.type == "cpu" and wanted != "cpu":
        raise ConfigError(
            f"environment variable DS_ACCELERATOR: got {wanted!r}, and this rank trains on a CPU; "
            "allowed: cpu. Unset it, or look why torch finds no device: launch/doctor.py."
        )
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # it calls collectives by names that torch is about to change
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
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
        _expert_data_group(groups)
    return deepspeed


def _expert_data_group(groups: ExpertGroups) -> Any:
    """The group of the ranks that hold the same experts; DeepSpeed is given both groups first.

    It would make them all once more, and each of them waits for every rank of the run.
    """
    from deepspeed.utils import groups as deepspeed_groups

    for table, ranks_table, group in (
        (
            deepspeed_groups._EXPERT_PARALLEL_GROUP,
            deepspeed_groups._EXPERT_PARALLEL_GROUP_RANKS,
            groups.expert,
        ),
        (
            deepspeed_groups._EXPERT_DATA_PARALLEL_GROUP,
            deepspeed_groups._EXPERT_DATA_PARALLEL_GROUP_RANKS,
            groups.data,
        ),
    ):
        table[groups.name] = group
        ranks_table[groups.name] = dist.get_process_group_ranks(group)
    return groups.data


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

    class DeepSpeedMoELayer(MoELayer, AutoEPMoELayer):
        """Our layer; what the engine asks of its own is answered, nothing of it runs."""

        def set_deepspeed_parallelism(self, *_: object, **__: object) -> None:
            _expert_data_group(groups)

    for module in model.modules():
        if isinstance(module, MoELayer):
            module.__class__ = DeepSpeedMoELayer
            module.ep_size, module.ep_rank = groups.size, groups.place  # type: ignore[attr-defined]


def _give_address_if_alone(processes: Processes) -> None:
    """Alone, without a launcher, DeepSpeed still wants a process group: of one, on loopback.

    Modules, operators and notebooks leave some of a launcher's variables behind, the address of
    another machine maybe; where one is missing DeepSpeed asks MPI for all of them.
    """
    of_launchers = ("MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK", "WORLD_SIZE")
    if processes.world_size == 1 and any(name not in os.environ for name in of_launchers):
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", RANK="0", WORLD_SIZE="1")
        os.environ.setdefault("LOCAL_RANK", "0")
