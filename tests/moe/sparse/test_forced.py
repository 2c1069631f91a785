"""Forcing a routing: what is forced is used, what is free is untouched."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from moe.config import ExpertsConfig, RouterConfig
from moe.model.transformer import Transformer, build_model
from moe.model_config import ModelConfig
from moe.sparse.forced import Forced, force, last_places
from moe.sparse.layer import MoELayer
from moe.sparse.noise import token_keys
from moe.sparse.router import Routing

MODEL = ModelConfig(
    vocab_size=64, hidden_size=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8,
    intermediate_size=8, num_experts=4, initializer_range=0.4,
)  # fmt: skip
TOKENS = torch.arange(12).view(2, 6)


def recorded(routings: tuple[Routing, ...]) -> list[Forced]:
    return [Forced(r.expert_TK.clone(), r.weight_TK.detach().clone()) for r in routings]


@pytest.fixture(scope="module")
def model() -> Transformer:
    return build_model(MODEL, seed=0).eval()


def test_forced_tokens_take_what_is_forced_and_free_ones_what_the_router_chose() -> None:
    routing = Routing(
        weight_TK=torch.tensor([[0.5, 0.25], [0.75, 0.125], [0.1, 0.2]]),
        expert_TK=torch.tensor([[0, 1], [2, 3], [3, 0]]),
        logit_TE=torch.zeros(3, 4),
        count_E=torch.tensor([2, 1, 1, 2]),
    )
    forced = Forced(
        torch.tensor([[3, 2], [-1, -1], [1, 3]]),
        torch.tensor([[0.9, 0.0], [7.0, 7.0], [0.3, 0.4]], dtype=torch.float64),
    )
    result = force(routing, forced)
    assert result.expert_TK.tolist() == [[3, 2], [2, 3], [1, 3]]
    assert torch.equal(result.weight_TK, torch.tensor([[0.9, 0.0], [0.75, 0.125], [0.3, 0.4]]))
    assert result.count_E.tolist() == [0, 1, 2, 3]
    assert result.logit_TE is routing.logit_TE
    assert routing.count_E.tolist() == [2, 1, 1, 2]  # nothing was written in place


def test_a_forced_layer_is_the_weighted_sum_of_the_forced_experts() -> None:
    layer = MoELayer(MODEL, RouterConfig(), ExpertsConfig(backend="reference"), layer=0)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    x_BSD = torch.randn(1, 3, 16)
    expert_TK, weight_TK = torch.tensor([[0, 2], [3, 1], [1, 0]]), torch.rand(3, 2)
    y_BSD, _ = layer(x_BSD, None, Forced(expert_TK, weight_TK))
    expected = torch.zeros(3, 16)
    for token in range(3):
        for expert, weight in zip(expert_TK[token], weight_TK[token], strict=True):
            gate, up = (layer.experts.gate_up[expert] @ x_BSD[0, token]).chunk(2)
            answer = layer.experts.down[expert] @ (gate * torch.sigmoid(gate) * up)
            expected[token] += weight * answer
    assert torch.allclose(y_BSD[0], expected, atol=1e-5)


def test_a_forced_shape_that_does_not_fit_is_refused(model: Transformer) -> None:
    routings = model(TOKENS).routings
    short = [Forced(f.expert_TK[:5], f.weight_TK[:5]) for f in recorded(routings)]
    with pytest.raises(ValueError, match=r"forced.expert_TK: has shape \(5, 2\); it must be"):
        model(TOKENS, forced=short)
    with pytest.raises(ValueError, match="forced: got 1 layers; the model has 2 sparse layers"):
        model(TOKENS, forced=recorded(routings)[:1])
    dense = build_model(dataclasses.replace(MODEL, num_experts=0)).eval()
    with pytest.raises(ValueError, match="forced: got 2 layers; the model has 0 sparse layers"):
        dense(TOKENS, forced=recorded(routings))


def test_forcing_what_was_chosen_changes_no_bit(model: Transformer) -> None:
    plain = model(TOKENS)
    again = model(TOKENS, forced=recorded(plain.routings))
    assert torch.equal(plain.logits, again.logits)
    for one, other in zip(plain.routings, again.routings, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("layer", [0, 1])
def test_one_layer_alone_can_be_forced(model: Transformer, layer: int) -> None:
    plain = model(TOKENS)
    forced: list[Forced | None] = [None, None]
    chosen = recorded(plain.routings)[layer]
    forced[layer] = Forced((chosen.expert_TK + 1) % 4, chosen.weight_TK)
    output = model(TOKENS, forced=forced)
    assert not torch.allclose(plain.logits, output.logits, atol=1e-3)
    assert torch.equal(output.routings[layer].expert_TK, (chosen.expert_TK + 1) % 4)
    if layer == 1:
        assert torch.equal(output.routings[0].expert_TK, plain.routings[0].expert_TK)


def test_the_last_place_alone_is_forced_as_it_is_among_all(model: Transformer) -> None:
    forced = [Forced((f.expert_TK + 1) % 4, f.weight_TK) for f in recorded(model(TOKENS).routings)]
    every = model(TOKENS, forced=forced)
    last = model(TOKENS, forced=forced, last_only=True)
    assert last.routings[1].expert_TK.shape == (2, 2)
    assert torch.allclose(last.logits[:, 0], every.logits[:, -1], atol=1e-5)


def test_all_places_are_routed_beside_the_last_ones_logits(model: Transformer) -> None:
    every, last = model(TOKENS), model(TOKENS, last_only=True, route_all=True)
    assert last.logits.shape == (2, 1, 64)
    assert torch.allclose(last.logits[:, 0], every.logits[:, -1], atol=1e-5)
    for one, other in zip(every.routings, last.routings, strict=True):
        assert torch.equal(one.expert_TK, other.expert_TK)
        assert torch.equal(one.weight_TK, other.weight_TK)


def test_the_last_places_of_each_row_are_taken() -> None:
    expert_TK = torch.arange(12).view(6, 2)
    part = last_places(Forced(expert_TK, expert_TK.float()), 2, num_rows=2)
    assert part.expert_TK.tolist() == [[2, 3], [4, 5], [8, 9], [10, 11]]
    assert part.weight_TK.tolist() == part.expert_TK.tolist()


@pytest.mark.parametrize("recompute", [False, True])
def test_forced_weights_are_constants_and_the_router_keeps_its_gradient_without_them(
    recompute: bool,
) -> None:
    router = RouterConfig(mask_threshold=0.9)  # or so small a model's choices have no rival
    model = build_model(MODEL, router, seed=0, recompute_activations=recompute).train()
    keys = token_keys(0, torch.arange(2), seq_len=6)
    free = model(TOKENS, key_BS=keys)
    free.logits.logsumexp(dim=-1).mean().backward()
    gate, down = (
        model.blocks[0].feed_forward.router.weight,
        model.blocks[0].feed_forward.experts.down,
    )
    assert gate.grad is not None
    assert gate.grad.abs().max() > 0
    model.zero_grad(set_to_none=True)
    forced = model(TOKENS, key_BS=keys, forced=recorded(free.routings))
    assert torch.equal(forced.logits, free.logits)
    forced.logits.logsumexp(dim=-1).mean().backward()
    assert gate.grad is None or gate.grad.abs().max() == 0
    assert down.grad.abs().max() > 0
