"""The engine without a library: one process, torch only; the yardstick of the other engine."""

from __future__ import annotations

import math

from torch import Tensor, nn

from moe.config import OptimConfig, ParallelConfig
from moe.errors import ConfigError
from moe.parallel.engine import clip_gradients, set_learning_rate
from moe.parallel.expert_parallel import ExpertGroups
from moe.parallel.processes import Processes
from moe.train.optim import make_optimizer


class PlainEngine:
    """See moe.parallel.engine.Engine."""

    def __init__(self, model: nn.Module, optim: OptimConfig) -> None:
        self.model, self.optimizer = model, make_optimizer(model, optim)
        self._max_norm = optim.grad_clip

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
    return PlainEngine(model, optim)
