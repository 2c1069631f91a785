"""The engine without a library: one process, torch only; the yardstick of the other engine."""

from __future__ import annotations

import math

from torch import Tensor, nn

from moe.config import OptimConfig, ParallelConfig
from moe.errors import ConfigError
from moe.model.init import WhenReady
from moe.parallel.engine import clip_gradients, held_whole, set_learning_rate, start_moments
from moe.parallel.expert_parallel import ExpertGroups
from moe.parallel.pieces import HeldRange, ReadRange, fill
from moe.parallel.processes import Processes
from moe.train.optim import make_optimizer


class PlainEngine:
    """See moe.parallel.engine.Engine."""

    def __init__(self, model: nn.Module, optim: OptimConfig, processes: Processes) -> None:
        self.model, self.optimizer = model, make_optimizer(model, optim)
        self._max_norm, self._processes = optim.grad_clip, processes

    def forward(self, *inputs: Tensor, **named: Tensor | None) -> object:
        return self.model(*inputs, **named)

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        loss.backward()

    def step(self, *, lr: float) -> float:
        norm = clip_gradients(self.optimizer, max_norm=self._max_norm)
        if math.isfinite(norm):
            set_learning_rate(self.optimizer, lr)
            self.optimizer.step()
        self.discard()
        return norm

    def discard(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def held(self) -> list[HeldRange]:
        return held_whole(self.model, self.optimizer, processes=self._processes, groups=None)

    def load(self, read: ReadRange, *, with_moments: bool) -> None:
        if with_moments:
            start_moments(self.optimizer)
        fill(self.held(), read, with_moments=with_moments)


def module_partitioner(
    parallel: ParallelConfig, processes: Processes, groups: ExpertGroups | None = None
) -> WhenReady | None:
    """None: every parameter is whole."""
    return None


def make(
    model: nn.Module,
    optim: OptimConfig,
    parallel: ParallelConfig,
    processes: Processes,
    groups: ExpertGroups | None = None,
) -> PlainEngine:
    """Return the engine; several processes need parallel.engine=deepspeed."""
    if processes.world_size > 1:
        raise ConfigError(
            f"parallel.engine: got 'plain' with {processes.world_size} processes; it runs on one. "
            "Use parallel=deepspeed, or start one process."
        )
    return PlainEngine(model, optim, processes)
