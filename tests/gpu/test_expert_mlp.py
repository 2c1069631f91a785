"""The Triton expert layer at the edges of its arithmetic, and what has to be equal bit for bit."""

from __future__ import annotations

import pytest
import torch
from expert_cases import (
    CASES,
    TOLERANCE,
    answers,
    distance,
    exact_answers,
    in_float64,
    make_inputs,
    tolerance,
)
from layer_on_device import (
    DEVICE,
    DTYPES,
    HALF,
    HAS_GPU,
    IS_DRY_RUN,
    NEEDS_DEVICE,
    Problem,
    Size,
    answers_of,
    assert_same_bits,
    draw_experts,
    expert_mlp,
    make_problem,
)
from phi_kernels import reference
from torch import Tensor

pytestmark = NEEDS_DEVICE
SMALL = Size(48, 48, 40, 3) if IS_DRY_RUN else Size(300, 96, 80, 5)

# a float32 product on a GPU is one chain of additions over the reduction: its error grows with
# the root of the reduction's length, 0.3 sqrt(200) roundoffs in the widest case, thrice in a row
LIMIT = {**TOLERANCE, torch.float32: 4 * TOLERANCE[torch.float32]}
# the edges of the other types that differ by type: the rest is the same index arithmetic
EDGES = ("one token", "first and last expert empty", "widths that no tile divides")
PAIRS = [
    (name, dtype) for dtype in dict.fromkeys(DTYPES) for name in (CASES if dtype == HALF else EDGES)
]


def assert_same_rows(one: Tensor, other: Tensor) -> None:
    """Equal in every bit on a GPU; numpy, which multiplies in the interpreter, rounds edge rows of

    a block in another order.
    """
    if HAS_GPU:
        assert torch.equal(one, other)
    assert distance(one, other) <= TOLERANCE[HALF]


@pytest.mark.parametrize(("name", "dtype"), PAIRS, ids=lambda value: str(value))
@pytest.mark.usefixtures("poisoned")
def test_forward_and_every_gradient_against_float64(name, dtype):
    inputs = make_inputs(CASES[name], dtype, device=DEVICE)
    exact, size = exact_answers(reference.expert_mlp, inputs)
    got = answers(expert_mlp, inputs)
    for key, value in got.items():
        right = exact[key]
        assert value.dtype == (torch.float32 if key == "weight" else dtype)
        if not right.numel() or not right.any():
            assert not value.any(), key
        else:
            assert distance(value, right, size=size[key]) <= tolerance(inputs), key


@pytest.mark.parametrize("name", ["first and last expert empty", "no token"])
def test_an_expert_without_rows_gets_a_gradient_of_exactly_zero(name):
    inputs = make_inputs(CASES[name], HALF, device=DEVICE)
    got = answers(expert_mlp, inputs)
    is_empty_E = torch.diff(inputs.plan.offset_E, prepend=inputs.plan.offset_E.new_zeros(1)) == 0
    assert is_empty_E.any()
    assert not got["gate_up"][is_empty_E].any()
    assert not got["down"][is_empty_E].any()


def test_two_runs_are_equal_in_every_bit():
    problem = make_problem(SMALL, HALF)
    assert_same_bits(answers_of(problem), answers_of(problem))


def test_recomputation_changes_no_bit():
    problem = make_problem(SMALL, HALF)
    assert_same_bits(answers_of(problem), answers_of(problem, recompute=True))


def test_activation_checkpointing_changes_no_bit():
    problem = make_problem(SMALL, HALF)

    def checkpointed():
        y_TD = torch.utils.checkpoint.checkpoint(
            expert_mlp, *problem.arguments(), use_reentrant=False
        )
        grads = torch.autograd.grad(y_TD, problem.leaves(), problem.grad_TD)
        return dict(zip(("y", "x", "weight", "gate_up", "down"), (y_TD, *grads), strict=True))

    assert_same_bits(answers_of(problem), checkpointed())


def test_a_permuted_batch_gives_the_permuted_answer():
    """What belongs to a token (y and the gradients of x and of its weights) is equal in every bit:

    a row's products sum over D and F in the same order wherever in a tile the row lies. Gradients
    of expert weights sum over tokens, in the order of the batch, so they agree only to rounding.
    """
    expert_TK = draw_experts(SMALL, seed=3, skew=1.0)
    generator = torch.Generator(DEVICE).manual_seed(4)
    order_T = torch.randperm(SMALL.t, device=DEVICE, generator=generator)
    problem = make_problem(SMALL, HALF, expert_TK=expert_TK)
    other = Problem(
        problem.x_TD.detach()[order_T].requires_grad_(),
        problem.weight_TK.detach()[order_T].requires_grad_(),
        reference.make_plan(expert_TK[order_T], num_experts=SMALL.e),
        problem.gate_up_EHD,
        problem.down_EDF,
        problem.grad_TD[order_T],
    )
    one, permuted = answers_of(problem), answers_of(other)
    of_tokens = ("y", "x", "weight")
    for key in of_tokens:
        assert_same_rows(one[key][order_T], permuted[key])
    for key in ("gate_up", "down"):
        assert distance(permuted[key], one[key]) <= TOLERANCE[HALF]


def test_a_tokens_answer_does_not_depend_on_the_other_tokens():
    expert_TK = draw_experts(SMALL, seed=5)
    problem = make_problem(SMALL, HALF, expert_TK=expert_TK)
    elsewhere_TK = draw_experts(SMALL, seed=6, skew=2.0)
    kept = SMALL.t // 2
    elsewhere_TK[:kept] = expert_TK[:kept]
    plan = reference.make_plan(elsewhere_TK, num_experts=SMALL.e)
    assert not torch.equal(plan.offset_E, problem.plan.offset_E)
    one, other = answers_of(problem), answers_of(problem._replace(plan=plan))
    for key in ("y", "x", "weight"):
        assert_same_rows(one[key][:kept], other[key][:kept])


@pytest.mark.parametrize("dtype", dict.fromkeys((HALF, torch.float32)), ids=str)
def test_weight_gradients_are_added_to_main_gradients_in_float32(dtype):
    """Two micro-batches into one float32 buffer: the sum, without rounding to the type between."""
    problems = [make_problem(SMALL, dtype, seed=seed) for seed in (0, 1)]
    first = problems[0]
    buffers = tuple(
        torch.full_like(t, 0.5, dtype=torch.float32).detach() for t in first.arguments()[3:]
    )
    expected = [b.double() for b in buffers]
    for problem in problems:
        problem = problem._replace(gate_up_EHD=first.gate_up_EHD, down_EDF=first.down_EDF)
        y_TD = expert_mlp(*problem.arguments(), main_gradients=buffers)
        grads = torch.autograd.grad(
            y_TD, problem.leaves(), problem.grad_TD, allow_unused=True, materialize_grads=False
        )
        plain = answers_of(problem)
        # with main gradients nothing is returned for the weights, or nothing but zeros
        assert all(g is None or not g.any() for g in grads[2:])
        assert torch.equal(grads[0], plain["x"])
        assert torch.equal(grads[1], plain["weight"])
        inputs = in_float64(problem)  # type: ignore[arg-type]
        exact = answers(reference.expert_mlp, inputs)
        expected = [e + exact[k] for e, k in zip(expected, ("gate_up", "down"), strict=True)]
    for buffer, right in zip(buffers, expected, strict=True):
        assert distance(buffer, right) <= LIMIT[dtype]


@pytest.mark.parametrize("frozen", ["x", "weight", "gate_up", "down", "both weights"])
def test_frozen_leaves_get_no_gradient_and_change_no_other(frozen):
    problem = make_problem(SMALL, HALF)
    everything = answers_of(problem)
    names = ("x", "weight", "gate_up", "down")
    off = ("gate_up", "down") if frozen == "both weights" else (frozen,)
    leaves = {
        name: leaf.detach().requires_grad_(name not in off)
        for name, leaf in zip(names, problem.leaves(), strict=True)
    }
    y_TD = expert_mlp(
        leaves["x"], leaves["weight"], problem.plan, leaves["gate_up"], leaves["down"]
    )
    y_TD.backward(problem.grad_TD)
    assert [name for name in names if leaves[name].grad is None] == list(off)
    for name in names:
        if name not in off:
            assert torch.equal(leaves[name].grad, everything[name]), name


def test_without_gradients_the_answer_is_the_same_bits():
    problem = make_problem(SMALL, HALF)
    with torch.no_grad():
        y_TD = expert_mlp(*problem.arguments())
    assert not y_TD.requires_grad
    assert torch.equal(y_TD, answers_of(problem)["y"])
