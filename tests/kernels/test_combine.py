"""Gather and combine against a loop over tokens: a CPU's, the reference, and the kernels as ops."""

from __future__ import annotations

from types import SimpleNamespace

import phi_kernels
import pytest
import torch
from expert_cases import TOLERANCE, distance
from phi_kernels import reference
from torch import Tensor

OPS = torch.ops.phi_kernels


def gather_by_kernel(x_TD, plan):
    return OPS.gather_rows(x_TD, plan.slot_of_row_N, plan.row_of_slot_TK)


def combine_by_kernel(rows_ND, weight_TK, plan):
    return OPS.gather_sum(rows_ND, weight_TK, plan.slot_of_row_N, plan.row_of_slot_TK)


KERNELS = SimpleNamespace(gather_rows=gather_by_kernel, combine_rows=combine_by_kernel)
OURS = {"on a cpu": phi_kernels, "kernels": KERNELS}

# choices of the tokens, and the width; a program takes 2048 / width tokens of 1024 columns
EDGES = {
    "one token": ([[2, 0]], 32),
    "no token": ([], 32),
    "an expert without tokens": ([[0, 1], [1, 0], [0, 3]], 5),
    "all on one expert": ([[1, 1], [1, 1]], 5),
    "k = 1": ([[3], [0], [3], [2]], 40),
    "k = e": ([[0, 1, 2, 3], [3, 2, 1, 0]], 40),
    "k is no power of two": ([[0, 1, 2], [3, 2, 1]] * 3, 16),
    "one token more than a block": ([[0, 1], [1, 3], [2, 0]] * 11, 64),
    "columns beyond a block, not divided by it": ([[0, 1], [1, 2], [3, 2]], 1100),
    "one column": ([[0, 1], [1, 2]], 1),
}


def make_plan(choices):
    top_k = len(choices[0]) if choices else 2
    expert_TK = torch.tensor(choices, dtype=torch.int64).view(-1, top_k)
    return expert_TK, reference.make_plan(expert_TK, num_experts=4)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def loop_over_tokens(rows_ND, weight_TK, plan, grad_TD):
    """y and the gradients of rows and weights in float64, slot after slot."""
    rows_ND, weight_TK, grad_TD = rows_ND.double(), weight_TK.double(), grad_TD.double()
    y_TD, grad_rows_ND = torch.zeros_like(grad_TD), torch.zeros_like(rows_ND)
    grad_weight_TK = torch.zeros_like(weight_TK)
    for t, rows in enumerate(plan.row_of_slot_TK.tolist()):
        for k, row in enumerate(rows):
            y_TD[t] += weight_TK[t, k] * rows_ND[row]
            grad_rows_ND[row] += weight_TK[t, k] * grad_TD[t]
            grad_weight_TK[t, k] += grad_TD[t] @ rows_ND[row]
    return y_TD, grad_rows_ND, grad_weight_TK


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("made_by", OURS)
def test_combine_is_the_weighted_sum_with_all_gradients(made_by, edge, dtype, poisoned):
    choices, width = EDGES[edge]
    expert_TK, plan = make_plan(choices)
    rows_ND = draw(expert_TK.numel(), width).to(dtype).requires_grad_()
    weight_TK = draw(*expert_TK.shape, seed=1).requires_grad_()
    grad_TD = draw(len(expert_TK), width, seed=2).to(dtype)
    y_TD = OURS[made_by].combine_rows(rows_ND, weight_TK, plan)
    grads = torch.autograd.grad(y_TD, (rows_ND, weight_TK), grad_TD)
    expected = loop_over_tokens(rows_ND.detach(), weight_TK.detach(), plan, grad_TD)
    assert [tensor.dtype for tensor in (y_TD, *grads)] == [dtype, dtype, torch.float32]
    assert distance(y_TD, expected[0]) < TOLERANCE[dtype]
    assert distance(grads[0], expected[1]) < TOLERANCE[dtype]
    # products of two inputs, summed in float32 whatever their type; few sums, which may cancel
    token_N = plan.slot_of_row_N // expert_TK.shape[1]
    size = (rows_ND.detach().double() * grad_TD.double()[token_N]).norm().item()
    assert distance(grads[1], expected[2], size=size) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("made_by", OURS)
def test_gather_copies_each_token_and_its_gradient_is_the_sum(made_by, edge, dtype, poisoned):
    choices, width = EDGES[edge]
    expert_TK, plan = make_plan(choices)
    x_TD = draw(len(expert_TK), width).to(dtype).requires_grad_()
    grad_ND = draw(expert_TK.numel(), width, seed=1).to(dtype)
    rows_ND = OURS[made_by].gather_rows(x_TD, plan)
    assert torch.equal(rows_ND, x_TD[plan.slot_of_row_N // expert_TK.shape[1]])
    (grad_TD,) = torch.autograd.grad(rows_ND, x_TD, grad_ND)
    ones_TK = torch.ones(expert_TK.shape)
    expected_TD, _, _ = loop_over_tokens(grad_ND, ones_TK, plan, torch.zeros_like(x_TD))
    assert grad_TD.dtype == dtype
    assert distance(grad_TD, expected_TD) < TOLERANCE[dtype]


@pytest.mark.parametrize("made_by", [phi_kernels, reference], ids=["ours", "reference"])
@pytest.mark.parametrize("edge", ["an expert without tokens", "all on one expert", "k = e"])
def test_float64_passes_finite_differences(edge, made_by):
    expert_TK, plan = make_plan(EDGES[edge][0])
    x_TD = draw(len(expert_TK), 5).double().requires_grad_()
    weight_TK = draw(*expert_TK.shape, seed=1).double().requires_grad_()
    factor_N = expert_TK.flatten()[plan.slot_of_row_N] + 1.0  # expert e multiplies by e + 1

    def layer(x_TD, weight_TK):
        rows_ND = made_by.gather_rows(x_TD, plan) * factor_N[:, None]
        return made_by.combine_rows(rows_ND, weight_TK, plan)

    expected_TD = ((expert_TK + 1) * weight_TK).sum(dim=1)[:, None] * x_TD
    assert torch.allclose(layer(x_TD, weight_TK), expected_TD, rtol=1e-12)
    assert torch.autograd.gradcheck(layer, (x_TD, weight_TK))


@pytest.mark.parametrize("made_by", OURS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_keep_float32_beside_short_rows(made_by, dtype):
    _, plan = make_plan([[0, 1]])
    difference = 2.0**-12  # 1 + this is 1 in bfloat16 and in float16
    weight_TK = torch.tensor([[1 + difference, -1.0]])
    y_TD = OURS[made_by].combine_rows(torch.ones(2, 8, dtype=dtype), weight_TK, plan)
    assert y_TD.tolist() == [[difference] * 8]


@pytest.mark.parametrize("made_by", OURS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_are_made_in_float32(made_by, dtype):
    _, plan = make_plan([[0, 1, 2]])
    rows_ND = torch.tensor([4096.0, 1.0, -4096.0]).to(dtype)[:, None].expand(3, 8).contiguous()
    y_TD = OURS[made_by].combine_rows(rows_ND, torch.ones(1, 3), plan)
    assert y_TD.tolist() == [[1.0] * 8]  # 4096 + 1 is 4096 in both types


def test_two_runs_of_the_kernels_are_bitwise_equal():
    expert_TK, plan = make_plan(EDGES["one token more than a block"][0])
    x_TD = draw(len(expert_TK), 64).requires_grad_()
    weight_TK = draw(*expert_TK.shape, seed=1).requires_grad_()

    def run():
        y_TD = combine_by_kernel(gather_by_kernel(x_TD, plan), weight_TK, plan)
        return y_TD, *torch.autograd.grad(y_TD.square().sum(), (x_TD, weight_TK))

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_a_tokens_sum_does_not_depend_on_its_place_in_the_batch():
    choices = EDGES["one token more than a block"][0]
    new_of_old_T = torch.randperm(len(choices), generator=torch.Generator().manual_seed(0))
    old_of_new_T = new_of_old_T.argsort()
    expert_TK, plan = make_plan(choices)
    _, permuted_plan = make_plan(expert_TK[old_of_new_T].tolist())
    x_TD, weight_TK = draw(len(choices), 64), draw(*expert_TK.shape, seed=1)
    y_TD = combine_by_kernel(gather_by_kernel(x_TD, plan), weight_TK, plan)
    rows_ND = gather_by_kernel(x_TD[old_of_new_T], permuted_plan)
    permuted_TD = combine_by_kernel(rows_ND, weight_TK[old_of_new_T], permuted_plan)
    assert torch.equal(permuted_TD, y_TD[old_of_new_T])


def test_strided_inputs_and_gradients_are_read_right():
    _, plan = make_plan([[0, 1], [1, 3], [2, 0]])
    x_TD = draw(12, 3).t()[:, ::2].requires_grad_()
    weight_TK = draw(2, 3, seed=1).t().requires_grad_()
    grad_TD = draw(6, 3, seed=2).t()
    assert not any(t.is_contiguous() for t in (x_TD, weight_TK, grad_TD))

    def answers(made_by, dtype):
        x, weight = (t.detach().to(dtype).requires_grad_() for t in (x_TD, weight_TK))
        y = made_by.combine_rows(made_by.gather_rows(x, plan), weight, plan)
        return y, *torch.autograd.grad(y, (x, weight), grad_TD.to(dtype))

    got, expected = answers(KERNELS, torch.float32), answers(reference, torch.float64)
    for a, b in zip(got, expected, strict=True):
        assert distance(a, b) < TOLERANCE[torch.float32]


def test_gather_is_differentiable_twice():
    _, plan = make_plan([[0, 1], [1, 3], [2, 0]])
    x_TD = draw(3, 4).requires_grad_()
    rows_ND = gather_by_kernel(x_TD, plan)
    (grad_TD,) = torch.autograd.grad(rows_ND.pow(3).sum(), x_TD, create_graph=True)
    (second_TD,) = torch.autograd.grad(grad_TD.sum(), x_TD)
    # the sum over both copies of x^3: 2 * 6 x
    assert torch.allclose(second_TD, 12 * x_TD)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_ops_follow_the_rules_of_torch_library(dtype):
    _, plan = make_plan([[0, 1], [1, 3], [2, 0]])
    maps = (plan.slot_of_row_N, plan.row_of_slot_TK)
    x_TD = draw(3, 16).to(dtype).requires_grad_()
    rows_ND = draw(6, 16, seed=1).to(dtype).requires_grad_()
    weight_TK = draw(3, 2, seed=2).requires_grad_()
    torch.library.opcheck(OPS.gather_rows, (x_TD, *maps))
    torch.library.opcheck(OPS.gather_sum, (rows_ND, weight_TK, *maps))
    torch.library.opcheck(OPS.gather_sum, (rows_ND, None, *maps))
    constants = [t.detach() for t in (x_TD, rows_ND, weight_TK)]
    torch.library.opcheck(OPS.combine_backward, (*constants, plan.row_of_slot_TK))


def test_gather_and_combine_are_traced_into_one_graph_with_their_gradients():
    _, plan = make_plan([[0, 1], [1, 3], [2, 0]])
    x_TD, weight_TK = draw(3, 16).requires_grad_(), draw(3, 2, seed=1).requires_grad_()

    def layer(x_TD, weight_TK, plan):
        return combine_by_kernel(gather_by_kernel(x_TD, plan).sin(), weight_TK, plan)

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for run in (layer, compiled):
        y_TD = run(x_TD, weight_TK, plan)
        answers = (y_TD, *torch.autograd.grad(y_TD.square().sum(), (x_TD, weight_TK)))
        if run is layer:
            expected = answers
    assert all(torch.equal(a, b) for a, b in zip(answers, expected, strict=True))
