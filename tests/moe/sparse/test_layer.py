"""The whole sparse layer: against a loop over tokens, by finite differences, between back-ends."""

from __future__ import annotations

import phi_kernels
import pytest
import torch

from moe.config import ExpertsConfig, RouterConfig
from moe.model_config import ModelConfig
from moe.sparse.experts import EXPERT_BACKENDS, GroupedExperts
from moe.sparse.layer import MoELayer
from moe.sparse.noise import token_keys

ON_A_GPU_ONLY = ("megablocks", "triton")
MODEL = ModelConfig(hidden_size=8, intermediate_size=16, num_experts=4, num_layers=1)


def make_layer(router="sparsemixer", backend="reference", *, std=0.5, model=MODEL):
    config = RouterConfig(name=router, mask_threshold=0.2)
    layer = MoELayer(model, config, ExpertsConfig(backend=backend), layer=0)
    generator = torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=std, generator=generator)
    return layer


def loop_over_tokens(layer, x_BSD, routing):
    """y of each token from the definition: sum over its choices of w * W2(silu(W1 x) * W3 x)."""
    out = []
    for x, experts, weights in zip(
        x_BSD.flatten(0, 1), routing.expert_TK, routing.weight_TK, strict=True
    ):
        y = torch.zeros_like(x)
        for expert, weight in zip(experts.tolist(), weights, strict=True):
            gate, up = (layer.experts.gate_up[expert] @ x).chunk(2)
            y = y + weight * (layer.experts.down[expert] @ (gate * torch.sigmoid(gate) * up))
        out.append(y)
    return torch.stack(out).view_as(x_BSD)


@pytest.mark.parametrize("router", ["sparsemixer", "topk"])
def test_the_layer_is_the_weighted_sum_of_its_experts(router):
    layer = make_layer(router).double()
    x_BSD = torch.randn(2, 9, 8, dtype=torch.float64)
    y_BSD, routing = layer(x_BSD, None)
    assert torch.allclose(y_BSD, loop_over_tokens(layer, x_BSD, routing), rtol=1e-11)


@pytest.mark.parametrize("router", ["sparsemixer", "topk"])
def test_evaluation_gradients_are_ordinary_derivatives(router):
    """Finite differences in x, the router and every expert weight; float64."""
    layer = make_layer(router).double()
    x_BSD = torch.randn(1, 5, 8, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in layer.named_parameters()]

    def function(x_BSD, *parameters):
        return torch.func.functional_call(
            layer, dict(zip(names, parameters, strict=True)), (x_BSD, None)
        )[0]

    assert torch.autograd.gradcheck(function, (x_BSD, *layer.parameters()), fast_mode=True)


def test_expert_gradients_of_sampled_training_are_ordinary_derivatives():
    layer = make_layer().double()
    x_BSD = torch.randn(1, 6, 8, dtype=torch.float64)
    key_BS = token_keys(0, torch.tensor([0]), seq_len=6)
    names = [name for name, _ in layer.experts.named_parameters()]

    def function(*parameters):
        values = {f"experts.{n}": p for n, p in zip(names, parameters, strict=True)}
        return torch.func.functional_call(layer, values, (x_BSD, key_BS))[0]

    assert torch.autograd.gradcheck(function, tuple(layer.experts.parameters()), fast_mode=True)


def test_the_router_of_sampled_training_gets_its_own_gradient_through_the_layer():
    """dL/ds_i = <dL/dy, E_D(x)> p_D (1[i = D] - p_i) summed over both stages, in float64."""
    layer = make_layer().double()
    layer.input_jitter = 0.0
    x_BSD = torch.randn(1, 40, 8, dtype=torch.float64)
    key_BS = token_keys(3, torch.tensor([0]), seq_len=40)
    y_BSD, routing = layer(x_BSD, key_BS)
    routing.logit_TE.retain_grad()
    upstream = torch.randn_like(y_BSD)
    (y_BSD * upstream).sum().backward()
    for t in range(40):
        scores, expected = routing.logit_TE[t].detach(), torch.zeros(4, dtype=torch.float64)
        stage = scores.clone()
        for k, expert in enumerate(routing.expert_TK[t].tolist()):
            top = stage.max()
            masked = (top - scores) / torch.maximum(scores.abs(), top) > 0.4
            p = stage.masked_fill(masked, -torch.inf).softmax(0)
            gate, up = (layer.experts.gate_up[expert] @ x_BSD[0, t]).chunk(2)
            out = layer.experts.down[expert] @ (gate * torch.sigmoid(gate) * up)
            flow = (upstream[0, t] @ out).detach() * p[expert]
            expected += flow * (torch.nn.functional.one_hot(torch.tensor(expert), 4) - p)
            stage[expert] = -torch.inf
            assert k < 2
        assert torch.allclose(routing.logit_TE.grad[t], expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("name", sorted(EXPERT_BACKENDS))
@pytest.mark.parametrize(
    "experts_of_tokens",
    [
        [[0, 1]],  # one token; two experts stay empty
        [[2, 2]] * 7,  # all on one expert, the first and last ones empty
        [[0, 1], [2, 3], [1, 0], [3, 1], [0, 2]],  # uneven counts, none a multiple of 8
    ],
)
def test_back_ends_agree_with_the_float64_reference_in_all_gradients(name, experts_of_tokens):
    if name in ON_A_GPU_ONLY:
        pytest.skip(f"{name} takes no CPU tensors")
    plan = phi_kernels.make_plan(torch.tensor(experts_of_tokens), num_experts=4)
    generator = torch.Generator().manual_seed(0)
    shapes = ((len(experts_of_tokens), 8), (len(experts_of_tokens), 2), (4, 32, 8), (4, 8, 16))
    inputs = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    results = []
    for backend, dtype in (
        (EXPERT_BACKENDS["reference"], torch.float64),
        (EXPERT_BACKENDS[name], torch.float32),
    ):
        leaves = [t.to(dtype, copy=True).requires_grad_() for t in inputs]
        out = backend(*leaves[:2], plan, *leaves[2:])
        out.square().sum().backward()
        results.append([out.detach(), *(leaf.grad for leaf in leaves)])
    for exact, got in zip(*results, strict=True):
        # float32 rounds by 2^-24; sums of 8 to 32 products, three times in a row, stay below 1e-5
        assert (exact - got).abs().max() < 1e-5 * exact.abs().max()


def test_an_expert_without_tokens_receives_a_zero_gradient():
    layer = make_layer("topk", backend="grouped_mm")
    with torch.no_grad():
        layer.router.weight[3] = -100 * torch.ones(8)
    x_BSD = torch.rand(1, 10, 8)  # positive, so that expert 3 is never chosen
    y_BSD, routing = layer(x_BSD, None)
    y_BSD.sum().backward()
    assert (routing.expert_TK != 3).all()
    assert layer.experts.down.grad[3].abs().max() == 0
    assert layer.experts.down.grad[:3].abs().sum() > 0


def test_jitter_stays_within_its_bounds_and_reaches_gate_and_experts():
    layer = make_layer(std=0.1)
    key_BS = token_keys(0, torch.tensor([0]), seq_len=500)
    factor = layer._jitter(key_BS.flatten(), width=8)
    assert factor.min() >= 0.99
    assert factor.max() <= 1.01
    assert factor.std() == pytest.approx(0.01 / 3**0.5, rel=0.02)
    x_BSD = torch.ones(1, 500, 8)
    _, routing = layer(x_BSD, key_BS)
    expected = factor @ layer.router.weight.T
    assert torch.allclose(routing.logit_TE, expected, rtol=1e-5)


@pytest.mark.parametrize("backend", ["auto", "cpu", "reference"])
def test_recomputed_experts_give_the_same_bits_and_keep_less(backend):
    """Kept are the weights, the input, the routing weights and index arrays."""
    kept, results = [], []
    for recompute in (False, True):
        layer = make_layer("topk", backend)
        layer.experts = GroupedExperts(MODEL, ExpertsConfig(backend=backend, recompute=recompute))
        layer.load_state_dict(make_layer("topk", backend).state_dict())
        x_BSD = torch.randn(1, 60, 8, generator=torch.Generator().manual_seed(1))
        x_BSD.requires_grad_()
        storages = {}

        def pack(tensor, storages=storages):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y_BSD, _ = layer(x_BSD, None)
        y_BSD.square().sum().backward()
        kept.append(sum(storages.values()))
        results.append([y_BSD, x_BSD.grad, *(p.grad for p in layer.parameters())])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
    assert kept[1] < kept[0] - 60 * 2 * 2 * 16 * 4 // 2  # half a pre-activation at least


@pytest.mark.parametrize("backend", ["auto", "grouped_mm"])
@pytest.mark.parametrize("is_training", [False, True])
def test_the_layer_compiles_as_one_graph(backend, is_training):
    layer = make_layer(backend=backend).train(is_training)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x_BSD = torch.randn(2, 9, 8)
    key_BS = token_keys(0, torch.arange(2), seq_len=9) if is_training else None
    with torch.set_grad_enabled(is_training):
        assert torch.allclose(compiled(x_BSD, key_BS)[0], layer(x_BSD, key_BS)[0], atol=1e-6)
