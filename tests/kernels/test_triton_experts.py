"""The experts on Triton kernels, in the interpreter: every gradient, every option, every edge."""

from __future__ import annotations

import pytest
import torch
from expert_cases import CASES, TOLERANCE, answers, distance, exact_answers, make_inputs, tolerance
from phi_kernels import reference, triton_experts
from torch.utils.checkpoint import checkpoint

DTYPES = [torch.float32, torch.float16]
UNEVEN = "both slots on one expert"


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """CPU tensors are refused by the public function; here the interpreter takes them."""
    monkeypatch.setattr(triton_experts, "runs_triton", lambda tensor: True)


def with_options(**options):
    return lambda *arguments: triton_experts.expert_mlp(*arguments, **options)


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.usefixtures("poisoned")
def test_outputs_and_gradients_are_those_of_the_reference(name, dtype, recompute):
    inputs = make_inputs(CASES[name], dtype)
    exact, size = exact_answers(reference.expert_mlp, inputs)
    for key, got in answers(with_options(recompute=recompute), inputs).items():
        assert got.dtype == (torch.float32 if key == "weight" else dtype)
        assert got.shape == exact[key].shape
        assert distance(got, exact[key], size=size[key]) <= tolerance(inputs), key


@pytest.mark.parametrize("name", ["widths above one tile", "many experts, uneven"])
def test_two_runs_and_a_recomputed_one_give_the_same_bits(name):
    inputs = make_inputs(CASES[name], torch.float32)
    first = answers(triton_experts.expert_mlp, inputs)
    for options in ({}, {"recompute": True}):
        again = answers(with_options(**options), inputs)
        assert all(torch.equal(first[key], again[key]) for key in first)


def test_a_permuted_batch_gives_the_permuted_answer():
    """Bit by bit on a GPU (tests/gpu), but for the weights' gradients, whose sums over rows change
    their order. Here numpy's own product sums a row differently at another place in its matrix."""
    inputs = make_inputs(CASES["many experts, uneven"], torch.float32)
    order_T = torch.randperm(len(inputs.x_TD), generator=torch.Generator().manual_seed(0))
    expert_TK = torch.tensor(CASES["many experts, uneven"].experts)
    moved = inputs._replace(
        x_TD=inputs.x_TD.detach()[order_T].requires_grad_(),
        weight_TK=inputs.weight_TK.detach()[order_T].requires_grad_(),
        plan=reference.make_plan(expert_TK[order_T], num_experts=20),
        grad_TD=inputs.grad_TD[order_T],
    )
    _, size = exact_answers(reference.expert_mlp, inputs)
    before = answers(triton_experts.expert_mlp, inputs)
    after = answers(triton_experts.expert_mlp, moved)
    for key in before:
        expected = before[key][order_T] if key in ("y", "x", "weight") else before[key]
        assert distance(after[key], expected, size=size[key]) <= 2 * tolerance(inputs), key


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_weight_gradients_are_added_to_main_gradients_in_float32(recompute):
    inputs = make_inputs(CASES[UNEVEN], torch.float16)
    plain = answers(triton_experts.expert_mlp, make_inputs(CASES[UNEVEN], torch.float32))
    mains = torch.randn(inputs.gate_up_EHD.shape), torch.randn(inputs.down_EDF.shape)
    before = [main.clone() for main in mains]
    for _ in range(2):  # two micro-batches
        y_TD = triton_experts.expert_mlp(*inputs[:5], recompute=recompute, main_gradients=mains)
        y_TD.backward(inputs.grad_TD)
    assert inputs.gate_up_EHD.grad is None
    assert inputs.down_EDF.grad is None
    for main, old, key in zip(mains, before, ("gate_up", "down"), strict=True):
        assert distance(main - old, 2 * plain[key]) <= TOLERANCE[torch.float16]
    assert distance(inputs.x_TD.grad, 2 * plain["x"]) <= TOLERANCE[torch.float16]


@pytest.mark.parametrize(
    "needed",
    [("x_TD",), ("weight_TK",), ("gate_up_EHD",), ("down_EDF",), ("x_TD", "down_EDF")],
    ids="+".join,
)
def test_what_is_frozen_gets_no_gradient_and_the_rest_the_same(needed):
    inputs = make_inputs(CASES[UNEVEN], torch.float32)
    names = ("x_TD", "weight_TK", "gate_up_EHD", "down_EDF")
    exact = answers(triton_experts.expert_mlp, inputs)
    keys = dict(zip(names, ("x", "weight", "gate_up", "down"), strict=True))
    for name in names:
        getattr(inputs, name).requires_grad_(name in needed)
    triton_experts.expert_mlp(*inputs[:5]).backward(inputs.grad_TD)
    for name in names:
        grad = getattr(inputs, name).grad
        if name in needed:
            assert torch.equal(grad, exact[keys[name]])
        else:
            assert grad is None


def test_frozen_weights_cost_no_product(monkeypatch):
    inputs = make_inputs(CASES[UNEVEN], torch.float32)
    inputs.gate_up_EHD.requires_grad_(False)
    inputs.down_EDF.requires_grad_(False)
    monkeypatch.delattr(triton_experts, "launch_weight_gradient")
    triton_experts.expert_mlp(*inputs[:5]).backward(inputs.grad_TD)
    assert inputs.x_TD.grad is not None


def saved_bytes(function):
    """Bytes of the tensors kept for the backward pass, each storage once."""
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return sum(storages.values())


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_what_is_kept_is_the_input_and_the_pre_activation(recompute):
    case = CASES["many experts, uneven"]
    inputs = make_inputs(case, torch.float16)
    num_tokens, top_k = inputs.weight_TK.shape
    weights = sum(t.nbytes for t in (inputs.gate_up_EHD, inputs.down_EDF))
    index = sum(t.nbytes for t in (*inputs.plan, inputs.weight_TK))
    hidden = 0 if recompute else num_tokens * top_k * 2 * case.f * 2
    kept = saved_bytes(lambda: with_options(recompute=recompute)(*inputs[:5]))
    assert kept == weights + index + inputs.x_TD.nbytes + hidden


def test_without_gradients_nothing_is_kept_and_the_answer_is_the_same():
    inputs = make_inputs(CASES[UNEVEN], torch.float32)
    with torch.no_grad():
        quiet = triton_experts.expert_mlp(*inputs[:5])
    assert torch.equal(quiet, triton_experts.expert_mlp(*inputs[:5]))
    assert quiet.grad_fn is None


def test_activation_checkpointing_gives_the_same_bits():
    inputs = make_inputs(CASES[UNEVEN], torch.float32)
    plain = answers(triton_experts.expert_mlp, inputs)
    again = answers(
        lambda *arguments: checkpoint(triton_experts.expert_mlp, *arguments, use_reentrant=False),
        inputs,
    )
    assert all(torch.equal(plain[key], again[key]) for key in plain)


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_the_layer_compiles_as_one_graph_with_gradients(recompute):
    inputs = make_inputs(CASES[UNEVEN], torch.float32)
    plain = answers(triton_experts.expert_mlp, inputs)
    compiled = torch.compile(with_options(recompute=recompute), fullgraph=True, backend="aot_eager")
    again = answers(compiled, inputs)
    assert all(torch.equal(plain[key], again[key]) for key in plain)


@pytest.mark.parametrize("keeps_hidden", [False, True])
def test_the_operator_is_registered_as_torch_wants_it(keeps_hidden):
    inputs = make_inputs(CASES[UNEVEN], torch.float32)
    x, weight, plan, gate_up, down, _ = inputs
    torch.library.opcheck(
        torch.ops.phi_kernels.expert_mlp,
        (x, weight, *plan, gate_up, down, None, None, keeps_hidden),
    )


def test_strided_inputs_give_the_same_answer():
    inputs = make_inputs(CASES[UNEVEN], torch.float32)
    strided = inputs._replace(
        x_TD=inputs.x_TD.detach().T.contiguous().T.requires_grad_(),
        down_EDF=inputs.down_EDF.detach().transpose(1, 2).contiguous().transpose(1, 2)
        .requires_grad_(),
        grad_TD=inputs.grad_TD.T.contiguous().T,
    )  # fmt: skip
    plain, again = (answers(triton_experts.expert_mlp, i) for i in (inputs, strided))
    assert all(torch.equal(plain[key], again[key]) for key in plain)


def test_cpu_tensors_are_refused(monkeypatch):
    monkeypatch.undo()
    inputs = make_inputs(CASES[UNEVEN], torch.float32)
    with pytest.raises(ValueError, match="tokens on cpu; it takes bfloat16"):
        triton_experts.expert_mlp(*inputs[:5])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i: i._replace(x_TD=i.x_TD.half()), "one of .* for all"),
        (lambda i: i._replace(x_TD=i.x_TD[:, :30], gate_up_EHD=i.gate_up_EHD[..., :30],
                              down_EDF=i.down_EDF[:, :30]), "D = 30; .* a multiple of 4"),
        (lambda i: i._replace(down_EDF=i.down_EDF[..., :46]), "F = 46"),
    ],
)  # fmt: skip
def test_what_the_kernels_do_not_take_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        triton_experts.expert_mlp(*change(make_inputs(CASES[UNEVEN], torch.float32))[:5])


def test_tensors_that_start_off_a_16_byte_boundary_are_taken():
    def shifted(tensor):
        moved = torch.cat([tensor.new_zeros(1), tensor.detach().flatten()])[1:].view_as(tensor)
        assert moved.data_ptr() % 16
        return moved.requires_grad_()

    inputs = make_inputs(CASES[UNEVEN], torch.float32)
    expected = answers(triton_experts.expert_mlp, inputs)
    moved = inputs._replace(
        x_TD=shifted(inputs.x_TD), gate_up_EHD=shifted(inputs.gate_up_EHD),
        down_EDF=shifted(inputs.down_EDF),
    )  # fmt: skip
    for key, got in answers(triton_experts.expert_mlp, moved).items():
        assert torch.equal(got, expected[key]), key


def test_main_gradients_of_another_shape_or_type_are_refused():
    inputs = make_inputs(CASES[UNEVEN], torch.float16)
    mains = torch.zeros_like(inputs.gate_up_EHD), torch.zeros_like(inputs.down_EDF)
    with pytest.raises(ValueError, match=r"main_gradients: got torch\.float16"):
        triton_experts.expert_mlp(*inputs[:5], main_gradients=mains)
