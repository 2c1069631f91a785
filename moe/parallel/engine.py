"""What the loop asks of an engine, and the table of engines.

An engine owns gradients, their reduction over ranks, clipping and the optimiser's step. The mean
over ranks of the losses given to `backward` is what is minimised.
"""

from __future__ import annotations

import importlib
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe.config import OptimConfig, ParallelConfig
from moe.parallel.expert_parallel import ExpertGroups, is_held_apart
from moe.parallel.processes import Processes


class Engine(Protocol):
    """Five members; both engines have these and the loop uses no others."""

    model: nn.Module  # the bare model: evaluation, counting, state_dict
    optimizer: torch.optim.Optimizer

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
    module = importlib.import_module(f"moe.parallel.{_ENGINE_MODULES[parallel.engine]}")
    return module.make(model, optim, parallel, processes, groups)


_ENGINE_MODULES = {"deepspeed": "deepspeed_engine", "plain": "plain_engine"}


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
