"""Index arrays by hand and by invariants."""

from __future__ import annotations

import pytest
import torch
from phi_kernels import make_plan

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
    assert plan.token_of_row_N().tolist() == [0, 2, 0, 1, 1, 2]


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
