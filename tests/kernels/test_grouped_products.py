"""Each grouped product in the interpreter against its twin in float64, memory poisoned."""

from __future__ import annotations

import pytest
import torch
from expert_cases import (
    CASES,
    TOLERANCE,
    activation_dot_size,
    distance,
    in_float64,
    make_inputs,
)
from phi_kernels import reference
from phi_kernels.gate_up import launch_gate_up
from phi_kernels.grouped_gemm import launch_grouped_gemm
from phi_kernels.plan import launch_make_tiles
from phi_kernels.swiglu_backward import launch_swiglu_backward
from phi_kernels.tuning import Tile, shipped_tiles
from phi_kernels.weight_gradient import launch_weight_gradient

pytestmark = pytest.mark.usefixtures("poisoned")
# bfloat16 products are wrong in the interpreter: numpy multiplies the raw bits
DTYPES = [torch.float32, torch.float16]
NAMES = [name for name in CASES if name != "no token"]  # no launch without rows
SMALL = Tile(16, 32, 16, 4, 2, 3)  # several tiles both ways, groups that do not divide them
# the interpreter needs a millisecond a step: small tiles where they say something new
FEW = ("both slots on one expert", "rows around a tile's 64", "widths that no tile divides")
SIZES = [
    (name, size)
    for name in NAMES
    for size in ("many", "few", "small")
    if size != "small" or name in FEW
]
over_tiles = pytest.mark.parametrize(("name", "size"), SIZES)


def tiles_of(dtype, size):
    many, few = shipped_tiles(90, dtype)
    return {"many": many, "few": few, "small": type(many)(*[SMALL] * 5)}[size]


def prepared(name, dtype, rows):
    inputs = make_inputs(CASES[name], dtype)
    inputs = inputs._replace(**{k: v.detach() for k, v in inputs._asdict().items() if k != "plan"})
    table = launch_make_tiles(inputs.plan.offset_E, inputs.plan.slot_of_row_N.numel(), rows)
    return inputs, in_float64(inputs), table


@over_tiles
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gate_up_is_both_halves_and_their_activation(name, dtype, size):
    tiles = tiles_of(dtype, size)
    inputs, exact, table = prepared(name, dtype, tiles.gate_up.rows)
    expected = reference.gate_up(exact.x_TD, exact.plan, exact.gate_up_EHD)
    for needs_hidden, needs_act in ((True, True), (True, False), (False, True)):
        got = launch_gate_up(
            inputs.x_TD, inputs.plan, inputs.gate_up_EHD, tiles=table, tile=tiles.gate_up,
            needs_hidden=needs_hidden, needs_act=needs_act,
        )  # fmt: skip
        for made, right, is_needed in zip(got, expected, (needs_hidden, needs_act), strict=True):
            if is_needed:
                assert distance(made, right) <= TOLERANCE[dtype]
            else:
                assert len(made) == 0


@over_tiles
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_grouped_gemm_multiplies_each_experts_rows_by_its_matrix(name, dtype, size):
    tiles = tiles_of(dtype, size)
    inputs, exact, table = prepared(name, dtype, tiles.down.rows)
    for is_transposed, weights in ((True, "down_EDF"), (False, "gate_up_EHD")):
        weight = getattr(inputs, weights)
        width = weight.shape[2 if is_transposed else 1]
        rows = torch.randn(inputs.plan.slot_of_row_N.numel(), width).to(dtype)
        tile = tiles.down if is_transposed else tiles.input_gradient
        got = launch_grouped_gemm(
            rows, weight, inputs.plan.offset_E, is_transposed=is_transposed, tiles=table, tile=tile
        )
        right = reference.grouped_gemm(
            rows.double(), getattr(exact, weights), exact.plan.offset_E, is_transposed=is_transposed
        )
        assert distance(got, right) <= TOLERANCE[dtype]


@over_tiles
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_swiglu_backward_is_the_gradient_of_hidden_and_of_the_weights(name, dtype, size):
    tiles = tiles_of(dtype, size)
    inputs, exact, table = prepared(name, dtype, tiles.swiglu_backward.rows)
    hidden = torch.randn(inputs.plan.slot_of_row_N.numel(), inputs.gate_up_EHD.shape[1]).to(dtype)
    got = launch_swiglu_backward(
        inputs.grad_TD, inputs.weight_TK, inputs.plan, hidden, inputs.down_EDF, tiles=table,
        tile=tiles.swiglu_backward,
    )  # fmt: skip
    expected = reference.swiglu_backward(
        exact.grad_TD, exact.weight_TK, exact.plan, hidden.double(), exact.down_EDF
    )
    sizes = (None, None, activation_dot_size(exact, hidden.double()))
    for made, right, size in zip(got, expected, sizes, strict=True):
        assert distance(made, right, size=size) <= TOLERANCE[dtype]


@pytest.mark.parametrize("is_added", [False, True], ids=["returned", "added"])
@over_tiles
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weight_gradient_sums_over_each_experts_rows(name, dtype, size, is_added):
    tiles = tiles_of(dtype, size)
    inputs, exact, _ = prepared(name, dtype, tiles.down.rows)
    num_rows, num_experts = inputs.plan.slot_of_row_N.numel(), inputs.plan.offset_E.numel()
    rows = torch.randn(num_rows, inputs.down_EDF.shape[2]).to(dtype)
    for left, right, is_left in ((inputs.x_TD, rows, True), (rows, inputs.x_TD, False)):
        sides = {"left_is_tokens": is_left, "right_is_tokens": not is_left}
        before = torch.randn(num_experts, left.shape[1], right.shape[1])
        into = before.clone() if is_added else None
        got = launch_weight_gradient(
            left, right, inputs.plan, **sides, tile=tiles.weight_gradient, into=into
        )
        truth = reference.weight_gradient(left.double(), right.double(), exact.plan, **sides)
        if is_added:
            assert got is into
            truth = truth + before.double()
        assert got.dtype == (torch.float32 if is_added else dtype)
        assert distance(got, truth) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_expert_whose_rows_are_not_finite_spoils_no_other(dtype):
    """Tiles and boxes reach into the next expert's rows; nothing of them may count."""
    tiles = tiles_of(dtype, "many")
    inputs, _, table = prepared("rows around a tile's 64", dtype, tiles.down.rows)
    first, second = inputs.plan.offset_E.tolist()[:2]
    rows = torch.randn(inputs.plan.slot_of_row_N.numel(), inputs.down_EDF.shape[2]).to(dtype)
    rows[first:second] = float("nan")
    out = launch_grouped_gemm(
        rows, inputs.down_EDF, inputs.plan.offset_E, is_transposed=True, tiles=table,
        tile=tiles.down,
    )  # fmt: skip
    assert out[first:second].isnan().all()
    assert out[:first].isfinite().all()
    assert out[second:].isfinite().all()
    grad = launch_weight_gradient(
        rows, inputs.x_TD, inputs.plan, left_is_tokens=False, right_is_tokens=True,
        tile=tiles.weight_gradient,
    )  # fmt: skip
    assert grad[1].isnan().all()
    assert grad[0].isfinite().all()
    assert grad[2].isfinite().all()


def test_an_expert_without_rows_gets_zeros_and_leaves_a_main_gradient_as_it_is():
    tiles = tiles_of(torch.float32, "many")
    inputs, _, _ = prepared("all on one expert, the others empty", torch.float32, 64)
    rows = torch.randn(inputs.plan.slot_of_row_N.numel(), 48)
    arguments = (inputs.x_TD, rows, inputs.plan)
    sides = {"left_is_tokens": True, "right_is_tokens": False, "tile": tiles.weight_gradient}
    grad = launch_weight_gradient(*arguments, **sides)
    assert [int(g.count_nonzero()) > 0 for g in grad] == [False, True, False, False]
    main = torch.full((4, 32, 48), float("nan"))
    main[1] = 0.0
    assert torch.equal(launch_weight_gradient(*arguments, **sides, into=main)[1], grad[1])
    assert main[[0, 2, 3]].isnan().all()
