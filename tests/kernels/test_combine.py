"""Gather and combine against a loop over tokens, and by finite differences."""

from __future__ import annotations

import phi_kernels
import pytest
import torch
from phi_kernels import reference

CHOICES = {
    "one token": [[2, 0]],
    "an expert without tokens": [[0, 1], [1, 0], [0, 3]],
    "all on one expert": [[1, 1], [1, 1]],
    "k = 1": [[3], [0], [3], [2]],
    "k = e": [[0, 1, 2, 3], [3, 2, 1, 0]],
}


@pytest.mark.parametrize("made_by", [phi_kernels, reference], ids=["ours", "reference"])
@pytest.mark.parametrize("name", CHOICES)
def test_combine_of_scaled_rows_is_the_sum_over_choices_with_all_gradients(name, made_by):
    expert_TK = torch.tensor(CHOICES[name])
    plan = phi_kernels.make_plan(expert_TK, num_experts=4)
    x_TD = torch.randn(len(expert_TK), 5, dtype=torch.float64, requires_grad=True)
    weight_TK = torch.rand(expert_TK.shape, dtype=torch.float64, requires_grad=True)

    def layer(x_TD, weight_TK):
        factor_N = expert_TK.flatten()[plan.slot_of_row_N] + 1.0  # expert e multiplies by e + 1
        rows_ND = made_by.gather_rows(x_TD, plan) * factor_N[:, None]
        return made_by.combine_rows(rows_ND, weight_TK, plan)

    expected = torch.stack(
        [
            sum(w * (e + 1) for w, e in zip(weight_TK[t], expert_TK[t], strict=True)) * x_TD[t]
            for t in range(len(expert_TK))
        ]
    )
    assert torch.allclose(layer(x_TD, weight_TK), expected, rtol=1e-12)
    assert torch.autograd.gradcheck(layer, (x_TD, weight_TK))
