"""Our own bfloat16 products on a CPU, each against its twin in float64, then the experts."""

from __future__ import annotations

import phi_kernels
import pytest
import torch
from expert_cases import (
    CASES,
    TOLERANCE,
    Case,
    activation_dot_size,
    answers,
    distance,
    exact_answers,
    in_float64,
    make_inputs,
)
from phi_kernels import avx512_build, avx512_experts, reference
from torch.utils.checkpoint import checkpoint

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.skipif(
        bool(avx512_build.reason_against()),
        reason=f"not for this machine: {avx512_build.reason_against()}",
    ),
]
BF16 = torch.bfloat16


def _rows_each(*counts: int) -> list[list[int]]:
    return [[expert] for expert, count in enumerate(counts) for _ in range(count)]


# a tile is 12 x 32, a task 360 rows, a chunk of the reduction 384, a task of gate_up 64 columns
EDGES = {
    "rows around a tile's 12": Case(_rows_each(11, 12, 13, 1, 0, 24), 6, 32, 64),
    "rows around a task's 360": Case(_rows_each(359, 360, 361, 1), 4, 32, 64),
    "several tasks of one expert": Case(_rows_each(0, 800, 0, 5), 4, 40, 72),
    "a reduction of several chunks": Case(_rows_each(30, 25), 2, 800, 388),
    "rows of several chunks": Case(_rows_each(384, 385, 767), 3, 48, 32),
    "a chunk and two more": Case(_rows_each(9, 14), 2, 386, 386),
    "few rows beside many": Case(_rows_each(30, 400), 2, 48, 388),
    "widths of a pair": Case(_rows_each(7, 9), 2, 2, 2),
    "widths that are no multiple of anything": Case(_rows_each(37, 5, 14), 3, 74, 138),
    "gradients wider than are packed at once": Case(_rows_each(300, 40), 2, 1000, 24),
}
ALL = CASES | EDGES


def prepared(name):
    inputs = make_inputs(ALL[name], BF16)
    inputs = inputs._replace(**{k: v.detach() for k, v in inputs._asdict().items() if k != "plan"})
    return inputs, in_float64(inputs), inputs.plan.token_of_row_N()


def filled(*shape):
    return torch.full(shape, float("nan"), dtype=BF16)


@pytest.fixture(autouse=True)
def is_built():
    assert avx512_build.load_error() == ""  # a machine that could and did not is no machine to skip


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("keeps_hidden", [True, False])
def test_gate_up_is_both_halves_and_their_activation(name, keeps_hidden):
    inputs, exact, token_N = prepared(name)
    hidden, act = reference.gate_up(exact.x_TD, exact.plan, exact.gate_up_EHD)
    got_hidden, got_act = filled(*hidden.shape) if keeps_hidden else None, filled(*act.shape)
    torch.ops.phi_avx512.gate_up(
        inputs.x_TD, inputs.gate_up_EHD, token_N, inputs.plan.offset_E, got_hidden, got_act
    )
    assert distance(got_act, act) <= TOLERANCE[BF16]
    if got_hidden is not None:
        assert distance(got_hidden, hidden) <= TOLERANCE[BF16]


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("is_transposed", [True, False])
def test_grouped_gemm_is_each_experts_rows_times_its_matrix(name, is_transposed):
    inputs, exact, _ = prepared(name)
    matrix = "down_EDF" if is_transposed else "gate_up_EHD"
    width = getattr(exact, matrix).shape[2 if is_transposed else 1]
    rows = torch.randn(len(inputs.plan.slot_of_row_N), width, dtype=torch.float64).to(BF16)
    offset_E = inputs.plan.offset_E
    right = reference.grouped_gemm(
        rows.double(), getattr(exact, matrix), offset_E, is_transposed=is_transposed
    )
    got = filled(*right.shape)
    torch.ops.phi_avx512.grouped_gemm(rows, getattr(inputs, matrix), offset_E, is_transposed, got)
    assert distance(got, right) <= TOLERANCE[BF16]


@pytest.mark.parametrize("name", ALL)
def test_swiglu_backward_is_every_gradient_of_the_activation(name):
    inputs, exact, token_N = prepared(name)
    hidden, _ = reference.gate_up(exact.x_TD, exact.plan, exact.gate_up_EHD)
    hidden = hidden.to(BF16)
    right = reference.swiglu_backward(
        exact.grad_TD, exact.weight_TK, exact.plan, hidden.double(), exact.down_EDF
    )
    weight_N = inputs.weight_TK.flatten()[inputs.plan.slot_of_row_N]
    grad, act = filled(*right[0].shape), filled(*right[1].shape)
    dot_NG = torch.ops.phi_avx512.swiglu_backward(
        inputs.grad_TD, weight_N, inputs.down_EDF, hidden, token_N, inputs.plan.offset_E, grad, act
    )
    dot_TK = dot_NG.sum(dim=1)[inputs.plan.row_of_slot_TK]
    sizes = (None, None, activation_dot_size(exact, hidden.double()))
    for made, exactly, size in zip((grad, act, dot_TK), right, sizes, strict=True):
        assert distance(made, exactly, size=size) <= TOLERANCE[BF16]


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("left_is_tokens", [True, False])
def test_weight_gradient_is_the_sum_over_each_experts_rows(name, left_is_tokens):
    inputs, exact, token_N = prepared(name)
    num_rows, (d, f) = len(token_N), inputs.down_EDF.shape[1:]
    rows = torch.randn(num_rows, f if left_is_tokens else 2 * f, dtype=torch.float64).to(BF16)
    tokens = exact.grad_TD if left_is_tokens else exact.x_TD
    sides = (tokens[token_N], rows.double()) if left_is_tokens else (rows.double(), tokens[token_N])
    parts = zip(
        *(torch.tensor_split(side, inputs.plan.offset_E[:-1].long()) for side in sides), strict=True
    )
    right = torch.stack([left.t() @ other for left, other in parts])
    assert right.shape[1:] == ((d, f) if left_is_tokens else (2 * f, d))
    got, own = filled(*right.shape), tokens.to(BF16)
    torch.ops.phi_avx512.weight_gradient(
        *((own, rows) if left_is_tokens else (rows, own)), token_N, inputs.plan.offset_E,
        left_is_tokens, got,
    )  # fmt: skip
    assert distance(got, right) <= TOLERANCE[BF16]


@pytest.mark.parametrize("rows_of_a_thread", [1, 100, 2048], ids=lambda n: f"{n} rows a pass")
@pytest.mark.parametrize("name", ALL)
def test_outputs_and_gradients_are_those_of_the_reference(name, rows_of_a_thread, monkeypatch):
    monkeypatch.setattr(avx512_experts, "_ROWS_OF_A_THREAD", rows_of_a_thread)
    inputs = make_inputs(ALL[name], BF16)
    exact, size = exact_answers(phi_kernels.reference_expert_mlp, inputs)
    for key, got in answers(phi_kernels.cpu_expert_mlp, inputs).items():
        assert got.dtype == (torch.float32 if key == "weight" else BF16)
        assert distance(got, exact[key], size=size[key]) <= TOLERANCE[BF16], key
    with torch.inference_mode():
        plain = phi_kernels.cpu_expert_mlp(*inputs[:5])
    assert distance(plain, exact["y"]) <= TOLERANCE[BF16]


@pytest.mark.parametrize("name", ["several tasks of one expert", "rows of several chunks"])
def test_the_number_of_threads_changes_no_bit(name):
    inputs = make_inputs(ALL[name], BF16)
    made = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        made.append(answers(phi_kernels.cpu_expert_mlp, inputs))
    torch.set_num_threads(1)
    assert all(torch.equal(made[0][key], other[key]) for other in made[1:] for key in other)


@pytest.mark.parametrize("name", ["few rows beside many", "rows of several chunks"])
def test_which_experts_go_together_changes_no_bit(name, monkeypatch):
    inputs, made = make_inputs(ALL[name], BF16), []
    for rows in (1, 100, 2048):
        monkeypatch.setattr(avx512_experts, "_ROWS_OF_A_THREAD", rows)
        made.append(answers(phi_kernels.cpu_expert_mlp, inputs))
    assert all(torch.equal(made[0][key], other[key]) for other in made[1:] for key in other)


def test_a_tokens_answer_does_not_depend_on_those_beside_it():
    inputs = make_inputs(ALL["rows around a tile's 12"], BF16)
    with torch.no_grad():
        changed = inputs.x_TD.clone()
        changed[11:23] = float("nan")  # the whole of expert 1
    before, after = (
        phi_kernels.cpu_expert_mlp(x.requires_grad_(), *inputs[1:5]) for x in (inputs.x_TD, changed)
    )
    others = [place for place in range(len(changed)) if not 11 <= place < 23]
    assert torch.equal(before[others], after[others])
    assert after[11:23].isnan().all()


@pytest.mark.parametrize("asked", range(1, 16))
def test_each_gradient_is_the_same_alone(asked):
    inputs = make_inputs(ALL["widths that are no multiple of anything"], BF16)
    every, names = answers(phi_kernels.cpu_expert_mlp, inputs), ["x", "weight", "gate_up", "down"]
    for bit, leaf in enumerate(inputs.leaves()):
        leaf.requires_grad_(bool(asked >> bit & 1))
    wanted = {n: leaf for n, leaf in zip(names, inputs.leaves(), strict=True) if leaf.requires_grad}
    y_TD = phi_kernels.cpu_expert_mlp(*inputs[:5])
    grads = torch.autograd.grad(y_TD, list(wanted.values()), inputs.grad_TD)
    for name, got in zip(wanted, grads, strict=True):
        assert torch.equal(got, every[name]), name


def test_routing_weights_are_not_rounded_to_the_rows_type():
    inputs = make_inputs(CASES["rows around a tile's 128"], BF16)
    rounded, eps = inputs.weight_TK.detach().to(BF16).float(), torch.finfo(BF16).eps
    # almost half way to the next bfloat16: rounding would lose 0.22 to 0.45 eps of each
    weight_TK = rounded + 0.45 * eps * 2.0 ** (torch.frexp(rounded).exponent - 1)
    exact = answers(
        phi_kernels.reference_expert_mlp,
        in_float64(inputs)._replace(weight_TK=weight_TK.double().requires_grad_()),
    )
    inputs = inputs._replace(weight_TK=weight_TK.requires_grad_())
    for key, got in answers(phi_kernels.cpu_expert_mlp, inputs).items():
        along = (got.double() * exact[key]).sum() / exact[key].square().sum()
        assert key == "weight" or abs(along.item() - 1) < 0.1 * eps, key


def test_a_checkpoint_gives_the_same_gradients():
    inputs = make_inputs(ALL["several tasks of one expert"], BF16)
    plain = answers(phi_kernels.cpu_expert_mlp, inputs)

    def checkpointed(*tensors):
        return checkpoint(phi_kernels.cpu_expert_mlp, *tensors, use_reentrant=False)

    again = answers(checkpointed, inputs)
    assert all(torch.equal(plain[key], again[key]) for key in plain)


def test_extreme_pre_activations_give_their_limits():
    gate = torch.tensor([-3e38, -200.0, -80.0, 0.0, 80.0, 200.0, 1e30, 3e38], dtype=BF16)
    hidden = torch.cat([gate, torch.ones_like(gate)])[None]
    down, one = torch.ones(1, 2, 8, dtype=BF16), torch.tensor([0])
    grad, act = filled(1, 16), filled(1, 8)
    torch.ops.phi_avx512.swiglu_backward(
        torch.full((1, 2), 0.5, dtype=BF16), torch.ones(1), down, hidden, one,
        torch.tensor([1], dtype=torch.int32), grad, act,
    )  # fmt: skip
    exact = gate.double().requires_grad_()
    silu = torch.nn.functional.silu(exact)
    (of_gate,) = torch.autograd.grad(silu.sum(), exact)
    assert torch.equal(act[0].double(), silu.detach().to(BF16).double())
    assert (grad[0, :8].double() - of_gate).abs().max() <= 2 * torch.finfo(BF16).eps


def test_what_it_does_not_take_goes_the_other_way():
    inputs = make_inputs(CASES["one token"], BF16)
    x, gate_up, down = inputs.x_TD, inputs.gate_up_EHD, inputs.down_EDF
    across = gate_up.detach().transpose(1, 2).contiguous().transpose(1, 2)
    assert avx512_experts.takes(x, gate_up, down)
    assert not avx512_experts.takes(x, across, down)
    assert not avx512_experts.takes(x.float(), gate_up.float(), down.float())
    odd = torch.zeros(1, 3, 4, dtype=BF16)
    assert not avx512_experts.takes(x[:, :3], torch.zeros(1, 8, 3, dtype=BF16), odd)
