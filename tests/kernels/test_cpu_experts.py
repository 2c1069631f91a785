"""The CPU's experts on torch's products, against the reference in float64."""

from __future__ import annotations

import phi_kernels
import pytest
import torch
from expert_cases import (
    CASES,
    Case,
    answers,
    distance,
    exact_answers,
    in_float64,
    make_inputs,
    sizes,
    tolerance,
)
from phi_kernels import avx512_experts, cpu_experts, cpu_products
from torch.utils.checkpoint import checkpoint

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
# at which rows are rounded up, and where the calls change
MORE = {
    "rows at which the padding changes": [3, 8, 9, 16, 17],
    "an empty expert in the middle": [64, 65, 0, 33, 31],
    "what lies beyond the last rows": [40, 0, 0, 0, 7],
    "many rows": [600, 3, 0, 200, 90],
}


@pytest.fixture(autouse=True)
def torchs_products(monkeypatch):
    """Our own have tests of their own: test_avx512_experts.py."""
    monkeypatch.setattr(avx512_experts, "takes", lambda *_: False)


@pytest.fixture(params=["torch's products", "oneDNN's products"])
def library(request, monkeypatch):
    """Both libraries for float32, whichever this machine would take."""
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this torch has no oneDNN")
    is_faster = request.param == "oneDNN's products"
    for module in (cpu_experts, cpu_products):
        monkeypatch.setattr(
            module, "is_onednn_faster", lambda dtype: is_faster and dtype == torch.float32
        )


def case_of(name):
    if name in CASES:
        return CASES[name]
    experts = [[e] for e, count in enumerate(MORE[name]) for _ in range(count)]
    return Case(experts, len(MORE[name]), 24, 40)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [*CASES, *MORE])
@pytest.mark.usefixtures("poisoned", "library")
def test_outputs_and_gradients_are_those_of_the_reference(name, dtype):
    inputs = make_inputs(case_of(name), dtype)
    exact, size = exact_answers(phi_kernels.reference_expert_mlp, inputs)
    for key, got in answers(phi_kernels.cpu_expert_mlp, inputs).items():
        assert got.dtype == (inputs.weight_TK.dtype if key == "weight" else dtype)
        assert got.shape == exact[key].shape
        assert distance(got, exact[key], size=size[key]) <= tolerance(inputs), key


@pytest.mark.parametrize("name", [*CASES, *MORE])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("library")
def test_inference_is_as_near_as_training(name, dtype):
    inputs = make_inputs(case_of(name), dtype)
    exact = phi_kernels.reference_expert_mlp(*in_float64(inputs)[:5])
    with torch.inference_mode():
        plain = phi_kernels.cpu_expert_mlp(*inputs[:5])
    size = max(sizes(in_float64(inputs))["y"], exact.norm().item())
    assert distance(plain, exact, size=size) <= tolerance(inputs)


def test_an_experts_rows_do_not_depend_on_its_neighbours():
    inputs = make_inputs(case_of("rows at which the padding changes"), torch.bfloat16)
    with torch.no_grad():
        changed = inputs.x_TD.clone()
        changed[20:] = 1e30  # experts 3 and 4, which slices of 0 to 2 may reach into
    before, after = (
        phi_kernels.cpu_expert_mlp(x.requires_grad_(), *inputs[1:5]) for x in (inputs.x_TD, changed)
    )
    assert torch.equal(before[:20], after[:20])


@pytest.mark.parametrize("asked", range(1, 16))
@pytest.mark.usefixtures("library", "poisoned")
def test_each_gradient_is_the_same_alone(asked):
    inputs = make_inputs(case_of("an empty expert in the middle"), torch.float32)
    every = answers(phi_kernels.cpu_expert_mlp, inputs)
    names = [
        name for bit, name in enumerate(["x", "weight", "gate_up", "down"]) if asked >> bit & 1
    ]
    for name, leaf in zip(["x", "weight", "gate_up", "down"], inputs.leaves(), strict=True):
        leaf.requires_grad_(name in names)
    y_TD = phi_kernels.cpu_expert_mlp(*inputs[:5])
    wanted = [leaf for leaf in inputs.leaves() if leaf.requires_grad]
    for name, got in zip(names, torch.autograd.grad(y_TD, wanted, inputs.grad_TD), strict=True):
        assert torch.equal(got, every[name]), name


def test_frozen_weights_cost_no_product(monkeypatch):
    inputs = make_inputs(case_of("many rows"), torch.float32)
    inputs.gate_up_EHD.requires_grad_(False)
    inputs.down_EDF.requires_grad_(False)
    y_TD = phi_kernels.cpu_expert_mlp(*inputs[:5])
    outputs = []
    multiply = cpu_experts.product_into
    monkeypatch.setattr(
        cpu_experts,
        "product_into",
        lambda out, a, b: (outputs.append(out.shape[0]), multiply(out, a, b)),
    )
    torch.autograd.grad(y_TD, [inputs.x_TD, inputs.weight_TK], inputs.grad_TD)
    assert len(outputs) == 4  # one for the rows of each of the four experts that have any


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("library")
def test_two_runs_give_the_same_bits(dtype):
    inputs = make_inputs(case_of("many experts, uneven"), dtype)
    once, again = (answers(phi_kernels.cpu_expert_mlp, inputs) for _ in range(2))
    assert all(torch.equal(once[key], again[key]) for key in once)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_routing_weights_are_not_rounded_to_the_rows_type(dtype):
    inputs = make_inputs(case_of("rows around a tile's 128"), dtype)
    rounded, eps = inputs.weight_TK.detach().to(dtype).float(), torch.finfo(dtype).eps
    # almost half way to the next number of dtype: rounding would lose 0.22 to 0.45 eps of each
    weight_TK = rounded + 0.45 * eps * 2.0 ** (torch.frexp(rounded).exponent - 1)
    exact = answers(
        phi_kernels.reference_expert_mlp,
        in_float64(inputs)._replace(weight_TK=weight_TK.double().requires_grad_()),
    )
    inputs = inputs._replace(weight_TK=weight_TK.requires_grad_())
    for key, got in answers(phi_kernels.cpu_expert_mlp, inputs).items():
        along = (got.double() * exact[key]).sum() / exact[key].square().sum()
        assert key == "weight" or abs(along.item() - 1) < 0.1 * eps, key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("library")
def test_a_token_that_is_not_a_number_spoils_itself_only(dtype):
    inputs = make_inputs(case_of("rows at which the padding changes"), dtype)
    spoilt = inputs.x_TD.detach().clone()
    spoilt[20] = float("nan")  # the first of expert 3
    y_TD = phi_kernels.cpu_expert_mlp(spoilt.requires_grad_(), *inputs[1:5])
    leaves = [spoilt, inputs.gate_up_EHD, inputs.down_EDF]
    grad_TD, *of_weights = torch.autograd.grad(y_TD, leaves, inputs.grad_TD)
    # expert 2 has 9 rows and computes more
    for result, place in [(y_TD, 20), (grad_TD, 20), *((grad, 3) for grad in of_weights)]:
        assert result[place].isnan().any()
        assert not torch.cat([result[:place], result[place + 1 :]]).isnan().any()


def test_a_checkpoint_gives_the_same_gradients():
    inputs = make_inputs(case_of("many rows"), torch.bfloat16)
    plain = answers(phi_kernels.cpu_expert_mlp, inputs)

    def checkpointed(*tensors):
        return checkpoint(phi_kernels.cpu_expert_mlp, *tensors, use_reentrant=False)

    again = answers(checkpointed, inputs)
    assert all(torch.equal(plain[key], again[key]) for key in plain)


def test_operands_of_any_stride_are_taken():
    inputs = make_inputs(case_of("many rows"), torch.float32)
    plain = answers(phi_kernels.cpu_expert_mlp, inputs)
    _, size = exact_answers(phi_kernels.reference_expert_mlp, inputs)

    def across(tensor):  # the same numbers, columns first
        return tensor.detach().transpose(-1, -2).contiguous().transpose(-1, -2).requires_grad_()

    x, gate_up, down = (across(t) for t in (inputs.x_TD, inputs.gate_up_EHD, inputs.down_EDF))
    strided = inputs._replace(
        x_TD=x, gate_up_EHD=gate_up, down_EDF=down, grad_TD=across(inputs.grad_TD).detach()
    )
    for key, got in answers(phi_kernels.cpu_expert_mlp, strided).items():
        assert distance(got, plain[key], size=size[key]) <= 2 * tolerance(inputs), key


def test_what_is_saved_is_the_tokens_and_the_pre_activation():
    inputs, saved = make_inputs(case_of("many rows"), torch.float32), []
    given = {leaf.data_ptr() for leaf in inputs.leaves()}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        phi_kernels.cpu_expert_mlp(*inputs[:5])
    (kept,) = (each for each in saved if each.data_ptr() not in given and each.is_floating_point())
    num_rows, width = len(inputs.plan.slot_of_row_N), inputs.gate_up_EHD.shape[1]
    assert kept.shape[1] == width
    # room for every expert's rounding up to 16 rows; what is not written takes no memory
    assert num_rows <= kept.shape[0] <= num_rows + 15 * len(inputs.gate_up_EHD)


def test_tokens_elsewhere_are_refused():
    inputs = make_inputs(CASES["one token"], torch.float32)
    with pytest.raises(ValueError, match="got tokens on meta"):
        phi_kernels.cpu_expert_mlp(inputs.x_TD.to("meta"), *inputs[1:5])
