"""The experts under torch.compile and torch.func: whole graphs, equal numbers, one clear line."""

from __future__ import annotations

import functools

import phi_kernels
import pytest
import torch
from expert_cases import CASES, answers, distance, make_inputs
from phi_kernels import reference
from torch import Tensor

BACKENDS = {
    "cpu": phi_kernels.cpu_expert_mlp,
    "grouped_mm": phi_kernels.grouped_mm_expert_mlp,
}
E, K, D, F = 6, 2, 32, 24


def leaves(num_tokens: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(num_tokens)
    draw = functools.partial(torch.randn, generator=generator)
    made = (draw(num_tokens, D), draw(E, 2 * F, D) / D**0.5, draw(E, D, F) / F**0.5)
    x_TD, gate_up, down = (tensor.to(dtype).requires_grad_() for tensor in made)
    weight_TK = torch.rand(num_tokens, K, generator=generator).requires_grad_()
    return [x_TD, weight_TK, gate_up, down]


def choices(num_tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(num_tokens)
    return torch.rand(num_tokens, E - 1, generator=generator).argsort(dim=1)[:, :K]  # one unused


def layer(name: str, x_TD: Tensor, weight_TK: Tensor, expert_TK: Tensor, *weights: Tensor):
    plan = phi_kernels.make_plan(expert_TK, num_experts=E)
    return BACKENDS[name](x_TD, weight_TK, plan, *weights)


@pytest.fixture(autouse=True)
def forget_what_was_compiled():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", BACKENDS)
def test_a_layer_is_one_graph_at_inference_and_gives_the_same_bits(name, dtype):
    plain = functools.partial(layer, name)
    compiled = torch.compile(plain, fullgraph=True, backend="aot_eager", dynamic=True)
    for mode in (torch.no_grad, torch.inference_mode):
        for num_tokens in (24, 7, 11):
            x_TD, weight_TK, *weights = leaves(num_tokens, dtype)
            inputs = (x_TD, weight_TK, choices(num_tokens), *weights)
            with mode():
                assert torch.equal(compiled(*inputs), plain(*inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", BACKENDS)
def test_a_layer_is_one_graph_in_training_and_its_gradients_are_the_same(name, dtype):
    plain = functools.partial(layer, name)
    compiled = torch.compile(plain, fullgraph=True, backend="aot_eager")
    for num_tokens in (24, 7):
        gradients = []
        for run in (compiled, plain):
            x_TD, weight_TK, *weights = all_leaves = leaves(num_tokens, dtype)
            y_TD = run(x_TD, weight_TK, choices(num_tokens), *weights)
            y_TD.float().square().sum().backward()
            gradients.append([y_TD, *(leaf.grad for leaf in all_leaves)])
        for got, expected in zip(*gradients, strict=True):
            assert got.dtype == expected.dtype
            # bfloat16: a compiler may leave roundings between operations out
            limit = 1e-6 if dtype == torch.float32 else 2e-2
            assert distance(got, expected) <= limit


@pytest.mark.parametrize("name", BACKENDS)
def test_operators_keep_what_they_promise_torch(name):
    x_TD, weight_TK, *weights = leaves(9, torch.float32)
    plan = phi_kernels.make_plan(choices(9), num_experts=E)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    if name == "cpu":
        arguments = (x_TD, weight_TK, *plan, *weights, True)
        torch.library.opcheck(torch.ops.phi_kernels.cpu_expert_mlp, arguments, test_utils=checks)
        return
    arguments = (x_TD[plan.token_of_row_N()], weights[0].transpose(1, 2), plan.offset_E)
    torch.library.opcheck(torch.ops.phi_kernels.grouped_product, arguments, test_utils=checks)


@pytest.mark.parametrize("case", ["one token", "first and last expert empty"])
def test_every_expert_computed_for_every_token_is_the_same(case):
    inputs = make_inputs(CASES[case], torch.float64)
    expected = answers(reference.expert_mlp, inputs)
    for key, got in answers(reference.every_expert_mlp, inputs).items():
        assert distance(got, expected[key]) < 1e-12, key


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # torch's own jvp
@pytest.mark.filterwarnings("ignore:.*searchsorted.*non-contiguous.*:UserWarning")  # under vmap
@pytest.mark.parametrize("name", BACKENDS)
def test_transforms_of_torch_func_look_into_the_layer(name):
    x_TD, weight_TK, *weights = (leaf.detach() for leaf in leaves(5, torch.float32))
    expert_TK = choices(5)

    def loss(down, x_TD, weight_TK, expert_TK, *, of):
        return of(x_TD, weight_TK, expert_TK, weights[0], down).square().sum()

    def by_reference(x_TD, weight_TK, expert_TK, *both):
        plan = reference.make_plan(expert_TK, num_experts=E)
        return reference.expert_mlp(x_TD, weight_TK, plan, *both)

    own, plain = (
        functools.partial(loss, of=of) for of in (functools.partial(layer, name), by_reference)
    )
    down = weights[1]
    expected = torch.func.grad(plain)(down, x_TD, weight_TK, expert_TK)
    assert distance(torch.func.grad(own)(down, x_TD, weight_TK, expert_TK), expected) < 1e-6
    tokens = [tensor[:, None] for tensor in (x_TD, weight_TK, expert_TK)]
    each = torch.func.vmap(torch.func.grad(own), in_dims=(None, 0, 0, 0))(down, *tokens)
    assert distance(each.sum(dim=0), expected) < 1e-6
    along = torch.ones_like(x_TD)
    moved = torch.func.jvp(
        lambda x: layer(name, x, weight_TK, expert_TK, *weights), (x_TD,), (along,)
    )[1]
    step = 1e-3
    ends = [
        by_reference(x_TD + sign * step * along, weight_TK, expert_TK, *weights) for sign in (1, -1)
    ]
    assert distance(moved, (ends[0] - ends[1]) / (2 * step)) < 1e-3


@pytest.mark.parametrize("name", BACKENDS)
def test_a_gradient_of_a_gradient_is_refused_in_one_line_that_says_what_to_use(name):
    x_TD, weight_TK, *weights = leaves(5, torch.float32)
    y_TD = layer(name, x_TD, weight_TK, choices(5), *weights)
    (grad_x,) = torch.autograd.grad(y_TD.square().sum(), x_TD, create_graph=True)
    with pytest.raises(RuntimeError, match="For a gradient of a gradient use"):
        grad_x.square().sum().backward()
