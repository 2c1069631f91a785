"""What the loop asks of an engine, and the table of engines.

An engine owns gradients, their reduction over ranks, clipping and the optimiser's step, and knows
which ranges of the parameters and moments this process holds. The mean over ranks of the losses
given to `backward` is what is minimised.
"""

from __future__ import annotations

import importlib
import math
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe.config import OptimConfig, ParallelConfig
from moe.model.init import WhenReady
from moe.parallel.expert_parallel import ExpertGroups, is_held_apart
from moe.parallel.pieces import ADAM_MOMENTS, HeldRange, ReadRange
from moe.parallel.processes import Processes


class Engine(Protocol):
    """What both engines have; the loop and the checkpoints use no more."""

    model: nn.Module  # the bare model: evaluation, counting

    def forward(self, *inputs: Tensor, **named: Tensor | None) -> object:
        """Run the model as the engine wants it run."""
        ...

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        """Add the gradients of loss; is_last marks the step's last micro-batch."""
        ...

    def step(self, *, lr: float) -> float:
        """Clip, update unless a gradient is not finite, clear gradients; return the norm before."""
        ...

    def discard(self) -> None:
        """Clear gradients without an update."""
        ...

    def held(self) -> list[HeldRange]:
        """Every range that this process updates; together the ranks hold every element."""
        ...

    def load(self, read: ReadRange, *, with_moments: bool) -> None:
        """Read every parameter, and moments if asked, in whatever layout they were saved."""
        ...


def make_engine(
    model: nn.Module,
    optim: OptimConfig,
    parallel: ParallelConfig,
    processes: Processes,
    groups: ExpertGroups | None = None,
) -> Engine:
    """Build the engine that the configuration names; deepspeed is imported only if it is wanted.

    groups: those that the model's experts are spread over, if they are.
    """
    return _engine_module(parallel).make(model, optim, parallel, processes, groups)


def module_partitioner(
    parallel: ParallelConfig, processes: Processes, groups: ExpertGroups | None = None
) -> WhenReady | None:
    """What is to be done with each module as soon as its parameters are made, if anything.

    With ZeRO 3 it keeps this rank's part of them only, so that no rank ever holds the model.
    """
    return _engine_module(parallel).module_partitioner(parallel, processes, groups)


def _engine_module(parallel: ParallelConfig) -> Any:
    return importlib.import_module(f"moe.parallel.{_ENGINE_MODULES[parallel.engine]}")


_ENGINE_MODULES = {"deepspeed": "deepspeed_engine", "plain": "plain_engine"}


def held_whole(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    processes: Processes,
    groups: ExpertGroups | None,
) -> list[HeldRange]:
    """The ranges of an engine that partitions nothing: each parameter of the model, all of it."""
    ranges = []
    for name, parameter in model.named_parameters():
        shape, start = whole_shape(tuple(parameter.shape), parameter, groups)
        state = optimizer.state.get(parameter, {})
        moments = {key: state[key].view(-1) for key in ADAM_MOMENTS if key in state}
        replica, num_replicas = processes.rank, processes.world_size
        if groups is not None and is_held_apart(parameter):
            replica, num_replicas = replica // groups.size, num_replicas // groups.size
        values = parameter.detach().view(-1)
        step = state.get("step")
        ranges.append(HeldRange(name, shape, start, values, moments, step, replica, num_replicas))
    return ranges


def whole_shape(
    shape: tuple[int, ...], parameter: Tensor, groups: ExpertGroups | None
) -> tuple[tuple[int, ...], int]:
    """The whole parameter's shape, all experts included, and its element with which ours begins.

    shape: of this process's parameter (ZeRO 3 leaves none in the parameter itself).
    """
    if groups is None or not is_held_apart(parameter):
        return shape, 0
    num_held, *rest = shape
    return (num_held * groups.size, *rest), groups.place * math.prod(shape)


def start_moments(optimizer: torch.optim.Optimizer) -> None:
    """Give every parameter zero moments, as the first update would, for a checkpoint to fill."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            for key in ADAM_MOMENTS:
                if key not in state:
                    state[key] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            if "step" not in state:
                # on the device for a fused AdamW, as torch makes it
                device = parameter.device if group.get("fused") else "cpu"
                state["step"] = torch.zeros((), dtype=torch.float32, device=device)


def clip_gradients(
    optimizer: torch.optim.Optimizer, *, max_norm: float, groups: ExpertGroups | None = None
) -> float:
    """Scale gradients to a global norm of at most max_norm (0: no limit); return the norm before.

    A norm that is not finite leaves the gradients as they are: the engine then skips the step.
    Ranks hold the same reduced gradients but for the experts', whose squares are summed over the
    expert group; so every rank decides the same.
    """
    apart: list[Tensor] = []
    shared: list[Tensor] = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                (apart if is_held_apart(parameter) else shared).append(parameter.grad)
    norm = torch.nn.utils.get_total_norm(shared)
    if groups is not None:
        square = torch.nn.utils.get_total_norm(apart).square()
        dist.all_reduce(square, group=groups.expert)
        norm = (norm.square() + square).sqrt()
    if max_norm > 0 and torch.isfinite(norm):
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for gradient in (*shared, *apart):
            gradient.mul_(scale)
    return float(norm)  # syncs: the decision to apply the step is taken on the host


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every parameter group the rate of this step."""
    for group in optimizer.param_groups:
        group["lr"] = lr
