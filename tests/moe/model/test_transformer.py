"""The decoder: counts, isolation of documents, cache, recomputation, initialisation."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moe.config import ExpertsConfig, RouterConfig
from moe.model.attention import KeyValueCache
from moe.model.transformer import build_model
from moe.model_config import ModelConfig, RopeConfig
from moe.sparse.noise import token_keys

NANO = ModelConfig(
    vocab_size=64, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
    intermediate_size=16, num_experts=16, max_position=64,
    rope=RopeConfig(original_max_position=64),
)  # fmt: skip
DENSE = replace(NANO, num_experts=0, norm="rmsnorm", attention_bias=False, head_bias=False)


def randomised(config, router="sparsemixer", **named):
    """A model whose norms and biases are random too: ones and zeros hide mistakes."""
    model = build_model(config, RouterConfig(name=router), ExpertsConfig("reference"), **named)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        with torch.no_grad():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("config", [NANO, DENSE, replace(NANO, tie_embeddings=True)])
def test_the_counted_parameters_are_the_built_ones(config):
    model = build_model(config)
    assert sum(p.numel() for p in model.parameters()) == config.num_parameters()


@pytest.mark.parametrize("config", [NANO, DENSE])
def test_documents_of_one_window_do_not_see_each_other(config):
    model = randomised(config).eval()
    first, second = torch.randint(64, (1, 9)), torch.randint(64, (1, 7))
    packed = model(
        torch.cat([first, second], dim=1),
        position_BS=torch.tensor([[*range(9), *range(7)]]),
        document_BS=torch.tensor([[0] * 9 + [1] * 7]),
    ).logits
    alone = torch.cat([model(first).logits, model(second).logits], dim=1)
    assert torch.allclose(packed, alone, atol=1e-5)
    crossing = model(torch.cat([first, second], dim=1)).logits
    assert not torch.allclose(crossing, alone, atol=1e-2)


@pytest.mark.parametrize("config", [NANO, DENSE, replace(DENSE, sliding_window=5)])
@pytest.mark.parametrize("pieces", [[12], [7, 5], [5] + [1] * 7])
def test_cached_pieces_give_the_logits_of_one_pass(config, pieces):
    model = randomised(config).eval()
    tokens = torch.randint(64, (2, 12))
    whole = model(tokens).logits
    caches = KeyValueCache.empty(
        config, batch=2, length=12, device=torch.device("cpu"), dtype=torch.float32
    )
    parts, start = [], 0
    for size in pieces:
        parts.append(model(tokens[:, start : start + size], caches=caches, start=start).logits)
        start += size
    assert torch.allclose(torch.cat(parts, dim=1), whole, atol=2e-5)


@pytest.mark.parametrize("window", [1, 3, 16])
def test_a_window_counts_the_query_itself(window):
    model = randomised(replace(DENSE, sliding_window=window, num_layers=1)).eval()
    tokens = torch.randint(64, (1, 10))
    before = model(tokens).logits[0, -1]
    for place in range(10):
        changed = tokens.clone()
        changed[0, place] = (changed[0, place] + 1) % 64
        is_seen = not torch.equal(model(changed).logits[0, -1], before)
        assert is_seen == (place >= 10 - window)


@pytest.mark.parametrize("config", [NANO, DENSE])
def test_recomputed_activations_give_bitwise_the_same_gradients(config):
    gradients = []
    for recompute in (False, True):
        model = randomised(config, recompute_activations=recompute).train()
        tokens = torch.arange(24).view(2, 12)
        key_BS = token_keys(0, torch.arange(2), seq_len=12)
        output = model(tokens, key_BS=key_BS)
        output.logits.square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_training_draws_depend_on_the_sample_and_not_on_its_place_in_the_batch():
    model = randomised(NANO).train()
    tokens = torch.randint(64, (4, 12))
    key_BS = token_keys(0, torch.tensor([10, 11, 12, 13]), seq_len=12)
    together = model(tokens, key_BS=key_BS)
    alone = model(tokens[2:3], key_BS=token_keys(0, torch.tensor([12]), seq_len=12))
    assert torch.equal(together.routings[1].expert_TK[24:36], alone.routings[1].expert_TK)
    assert torch.allclose(together.logits[2:3], alone.logits, atol=1e-5)


def test_training_a_sparse_model_without_noise_is_refused():
    with pytest.raises(ValueError, match="key_BS"):
        build_model(NANO).train()(torch.zeros(1, 4, dtype=torch.long))


def test_every_expert_starts_differently_and_reproducibly():
    one, two, other = build_model(NANO), build_model(NANO), build_model(NANO, seed=1)
    down = one.get_submodule("blocks.0.feed_forward.experts").down
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(down, other.get_submodule("blocks.0.feed_forward.experts").down)
    assert len({tuple(expert.flatten().tolist()) for expert in down}) == 16
    assert down.std().item() == pytest.approx(0.02, rel=0.05)
    for name, parameter in one.named_parameters():
        if name.endswith(".bias"):
            assert parameter.abs().max() == 0
        if "norm.weight" in name:
            assert torch.equal(parameter, torch.ones_like(parameter))
