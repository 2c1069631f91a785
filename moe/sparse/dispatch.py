"""Where the tokens of an expert are computed: dispatch and combine on one process.

A dispatcher has two methods. `dispatch` brings tokens to the process that holds their experts and
says which expert each of them takes there; `combine` brings the answers back. On one process no row
moves: the experts gather what they read and sum what they return (phi_kernels). Over several
processes see moe/parallel/expert_parallel.py.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import phi_kernels
from phi_kernels import DispatchPlan
from torch import Tensor

from moe.sparse.router import Routing


class ExpertInput(NamedTuple):
    """What GroupedExperts takes: R tokens, each with K choices among this process's experts."""

    x_RD: Tensor
    weight_RK: Tensor
    plan: DispatchPlan


class Exchange(NamedTuple):
    """How tokens left, for the way back: rows sorted by expert, and how many went where."""

    plan: DispatchPlan  # over all experts
    sent_P: list[int]  # rows to each process
    received_P: list[int]  # rows from each process


class Dispatcher(Protocol):
    """What a sparse layer needs of a dispatcher."""

    def dispatch(
        self, x_TD: Tensor, routing: Routing, *, num_experts: int
    ) -> tuple[ExpertInput, Exchange | None]:
        """Return the experts' input here, and what `combine` needs (None where no row moved)."""
        ...

    def combine(self, y_RD: Tensor, routing: Routing, exchange: Exchange | None) -> Tensor:
        """Return y_TD of the tokens that `dispatch` was given."""
        ...


class Placement(NamedTuple):
    """Which experts this process holds, and how tokens reach the others."""

    held: range
    dispatcher: Dispatcher


class LocalDispatcher:
    """Every expert is on this process; stateless."""

    def dispatch(
        self, x_TD: Tensor, routing: Routing, *, num_experts: int
    ) -> tuple[ExpertInput, Exchange | None]:
        """Tokens stay; the plan sorts their choices by expert."""
        plan = phi_kernels.make_plan(routing.expert_TK, num_experts=num_experts)
        return ExpertInput(x_TD, routing.weight_TK, plan), None

    def combine(self, y_RD: Tensor, routing: Routing, exchange: Exchange | None) -> Tensor:
        """The experts' own answer: they weight and sum."""
        return y_RD
