"""Where the tokens of an expert are computed: dispatch and combine on one process.

A dispatcher has two methods. `dispatch` brings tokens to the process that holds their experts and
says which expert each of them takes there; `combine` brings the results back. On one process no row
moves: the experts gather what they read and sum what they return (phi_kernels).
"""

from __future__ import annotations

import phi_kernels
from phi_kernels import DispatchPlan
from torch import Tensor

from moe.sparse.router import Routing


class LocalDispatcher:
    """Every expert is on this process; stateless."""

    def dispatch(
        self, x_TD: Tensor, routing: Routing, *, num_experts: int
    ) -> tuple[Tensor, Tensor, DispatchPlan]:
        """Return what GroupedExperts takes: tokens, their weights and the plan of their rows."""
        plan = phi_kernels.make_plan(routing.expert_TK, num_experts=num_experts)
        return x_TD, routing.weight_TK, plan

    def combine(self, y_TD: Tensor, routing: Routing) -> Tensor:
        """Return y_TD of the tokens that `dispatch` was given: the experts' own answer here."""
        return y_TD
