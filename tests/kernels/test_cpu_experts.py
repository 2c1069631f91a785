"""The CPU's experts against the reference in float64: outputs and every gradient."""

from __future__ import annotations

import phi_kernels
import pytest
import torch
from expert_cases import CASES, TOLERANCE, Case, answers, distance, in_float64, make_inputs

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
# at which rows are rounded up, and where the calls change
MORE = {
    "rows at which the padding changes": [3, 8, 9, 16, 17],
    "an empty expert in the middle": [64, 65, 0, 33, 31],
    "what lies beyond the last rows": [40, 0, 0, 0, 7],
    "many rows": [600, 3, 0, 200, 90],
}


def case_of(name):
    if name in CASES:
        return CASES[name]
    experts = [[e] for e, count in enumerate(MORE[name]) for _ in range(count)]
    return Case(experts, len(MORE[name]), 24, 40)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [*CASES, *MORE])
@pytest.mark.usefixtures("poisoned")
def test_outputs_and_gradients_are_those_of_the_reference(name, dtype):
    inputs = make_inputs(case_of(name), dtype)
    exact = answers(phi_kernels.reference_expert_mlp, in_float64(inputs))
    for key, got in answers(phi_kernels.cpu_expert_mlp, inputs).items():
        assert got.dtype == (inputs.weight_TK.dtype if key == "weight" else dtype)
        assert got.shape == exact[key].shape
        assert distance(got, exact[key]) <= TOLERANCE[dtype], key


@pytest.mark.parametrize("name", [*CASES, *MORE])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inference_is_as_near_as_training(name, dtype):
    inputs = make_inputs(case_of(name), dtype)
    exact = phi_kernels.reference_expert_mlp(*in_float64(inputs)[:5])
    with torch.inference_mode():
        plain = phi_kernels.cpu_expert_mlp(*inputs[:5])
    assert distance(plain, exact) <= TOLERANCE[dtype]


def test_an_experts_rows_do_not_depend_on_its_neighbours():
    inputs = make_inputs(case_of("rows at which the padding changes"), torch.bfloat16)
    with torch.no_grad():
        changed = inputs.x_TD.clone()
        changed[20:] = 1e30  # experts 3 and 4, which slices of 0 to 2 may reach into
    before, after = (
        phi_kernels.cpu_expert_mlp(x.requires_grad_(), *inputs[1:5]) for x in (inputs.x_TD, changed)
    )
    assert torch.equal(before[:20], after[:20])


def test_tokens_elsewhere_are_refused():
    inputs = make_inputs(CASES["one token"], torch.float32)
    with pytest.raises(ValueError, match="got tokens on meta"):
        phi_kernels.cpu_expert_mlp(inputs.x_TD.to("meta"), *inputs[1:5])
