"""Index arrays by hand and by invariants; dispatch and combine against a loop over tokens."""

from __future__ import annotations

import pytest
import torch

from moe.sparse.dispatch import LocalDispatcher, make_plan
from moe.sparse.router import Routing

CHOICES = {
    "one token": [[2, 0]],
    "an expert without tokens": [[0, 1], [1, 0], [0, 3]],
    "all on one expert": [[1, 1], [1, 1]],
    "k = 1": [[3], [0], [3], [2]],
    "k = e": [[0, 1, 2, 3], [3, 2, 1, 0]],
}


def test_a_plan_worked_by_hand():
    plan = make_plan(torch.tensor([[1, 0], [2, 1], [0, 2]]), num_experts=4)
    # slots: token 0 -> 0, 1; token 1 -> 2, 3; token 2 -> 4, 5; expert 3 is empty
    assert plan.slot_of_row_N.tolist() == [1, 4, 0, 3, 2, 5]
    assert plan.row_of_slot_TK.tolist() == [[2, 0], [4, 3], [1, 5]]
    assert plan.offset_E.tolist() == [2, 4, 6, 6]


@pytest.mark.parametrize("name", CHOICES)
def test_rows_are_sorted_by_expert_and_the_maps_are_inverse(name):
    expert_TK = torch.tensor(CHOICES[name])
    plan = make_plan(expert_TK, num_experts=4)
    rows = expert_TK.flatten()[plan.slot_of_row_N]
    assert torch.equal(rows, rows.sort().values)
    num = expert_TK.numel()
    assert torch.equal(plan.slot_of_row_N[plan.row_of_slot_TK.flatten()], torch.arange(num))
    counts = torch.bincount(expert_TK.flatten(), minlength=4)
    assert torch.equal(plan.offset_E, counts.cumsum(0).int())


@pytest.mark.parametrize("name", CHOICES)
def test_combine_of_scaled_rows_is_the_sum_over_choices_with_all_gradients(name):
    expert_TK = torch.tensor(CHOICES[name])
    num_tokens = expert_TK.shape[0]
    x_TD = torch.randn(num_tokens, 5, dtype=torch.float64, requires_grad=True)
    weight_TK = torch.rand(expert_TK.shape, dtype=torch.float64, requires_grad=True)

    def layer(x_TD, weight_TK):
        routing = Routing(weight_TK, expert_TK, torch.zeros(num_tokens, 4))
        dispatcher = LocalDispatcher()
        rows_ND, plan = dispatcher.dispatch(x_TD, routing, num_experts=4)
        factor_N = expert_TK.flatten()[plan.slot_of_row_N] + 1.0  # expert e multiplies by e + 1
        return dispatcher.combine(rows_ND * factor_N[:, None], routing, plan)

    expected = torch.stack(
        [
            sum(w * (e + 1) for w, e in zip(weight_TK[t], expert_TK[t], strict=True)) * x_TD[t]
            for t in range(num_tokens)
        ]
    )
    assert torch.allclose(layer(x_TD, weight_TK), expected, rtol=1e-12)
    assert torch.autograd.gradcheck(layer, (x_TD, weight_TK))
