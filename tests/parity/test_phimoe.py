"""Phimoe against transformers: logits, training with the same router samples, LongRoPE."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from closeness import FLOAT32_LIMIT, assert_all_close, distance
from same_draws import same_draws
from transformers_pairs import (
    Pair,
    gradients,
    greedy,
    in_our_names,
    next_token_loss,
    phimoe_pair,
    random_tokens,
)

from moe.config import RouterConfig
from moe.model.attention import KeyValueCache
from moe.model_config import ModelConfig, RopeConfig
from moe.sparse.experts import EXPERT_BACKENDS
from moe.sparse.losses import load_balance_pooled
from moe.sparse.noise import token_keys
from moe.sparse.router import Routing

ORIGINAL = 40
LONG_ROPE = RopeConfig(
    original_max_position=ORIGINAL, short_factor=(1.0, 1.1, 1.3, 1.7),
    long_factor=(1.5, 2.0, 3.0, 4.0), short_mscale=1.243163121016122,
    long_mscale=1.35,
)  # fmt: skip
MOE = ModelConfig(
    vocab_size=96, hidden_size=32, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8,
    intermediate_size=24, num_experts=16, max_position=128, rope=LONG_ROPE,
)  # fmt: skip
PLAIN_ROPE = RopeConfig(original_max_position=128)
RELEASED = RouterConfig(mask_threshold=0.01, input_jitter=0.0)
# experts within 40 % of the best survive, so that many tokens really sample
SAMPLING = RouterConfig(mask_threshold=0.2, input_jitter=0.0)

CASES = {
    "released": MOE,
    "no-head-bias": replace(MOE, head_bias=False),
    "no-biases": replace(MOE, head_bias=False, attention_bias=False),
    "mha": replace(MOE, num_kv_heads=4),
    "one-key-head": replace(MOE, num_kv_heads=1),
    "without-scaling": replace(MOE, rope=PLAIN_ROPE),
    "window": replace(MOE, rope=PLAIN_ROPE, sliding_window=7),
    "four-experts": replace(MOE, num_experts=4),
    "tied-head": replace(MOE, tie_embeddings=True, head_bias=False),
}


@pytest.mark.parametrize("router", [RELEASED, SAMPLING], ids=["released", "wide"])
@pytest.mark.parametrize("name", CASES)
def test_logits_agree(name, router):
    config = CASES[name]
    pair = phimoe_pair(config, router)
    tokens = random_tokens(config, batch=2, length=ORIGINAL)
    with torch.no_grad():
        expected, got = pair.theirs(tokens).logits, pair.ours(tokens).logits
    assert expected.std() > 0.5  # a model that says something
    assert distance(got, expected) < FLOAT32_LIMIT


@pytest.mark.parametrize("name", ["without-scaling", "window"])
def test_64_greedy_tokens_are_those_of_generate(name):
    pair = phimoe_pair(CASES[name], RELEASED)
    got, expected = greedy(pair, random_tokens(pair.config, batch=4, length=8), num_new=64)
    assert torch.equal(got, expected)
    assert got[:, 8:].unique().numel() > 10


@pytest.mark.parametrize("name", ["released", "window"])
def test_a_decode_step_agrees_with_a_cache_on_both_sides(name):
    config = CASES[name]
    pair = phimoe_pair(config, RELEASED)
    tokens = random_tokens(config, batch=2, length=30)
    caches = KeyValueCache.empty(
        config, batch=2, length=30, device=torch.device("cpu"), dtype=torch.float32
    )
    with torch.no_grad():
        past = pair.theirs(tokens[:, :20], use_cache=True).past_key_values
        pair.ours(tokens[:, :20], caches=caches)
        for place in range(20, 30):
            step = tokens[:, place : place + 1]
            theirs = pair.theirs(step, past_key_values=past, use_cache=True)
            past = theirs.past_key_values
            got = pair.ours(step, caches=caches, start=place).logits
            assert distance(got, theirs.logits) < FLOAT32_LIMIT


@pytest.mark.parametrize("name", CASES)
def test_evaluation_gradients_of_every_parameter_agree(name):
    config = CASES[name]
    pair = phimoe_pair(config, SAMPLING)
    tokens = random_tokens(config, batch=2, length=24)
    for model in (pair.ours, pair.theirs):
        next_token_loss(model(tokens).logits, tokens).backward()
    assert_all_close(gradients(pair.ours), in_our_names(gradients(pair.theirs), config))


def train_both(pair: Pair, router: RouterConfig) -> tuple[list[Routing], list[torch.Tensor]]:
    """One backward pass of each with the same samples; our routings and their experts."""
    config = pair.config
    tokens = random_tokens(config, batch=3, length=ORIGINAL, seed=5)
    key_BS = token_keys(7, torch.tensor([11, 12, 13]), seq_len=ORIGINAL)
    output = pair.ours.train()(tokens, key_BS=key_BS)
    next_token_loss(output.logits, tokens).backward()
    with same_draws(
        key_BS, router, num_layers=config.num_layers, num_experts=config.num_experts,
        width=config.hidden_size,
    ) as chosen:  # fmt: skip
        logits = pair.theirs.train()(tokens).logits
    next_token_loss(logits, tokens).backward()
    assert distance(output.logits, logits) < FLOAT32_LIMIT
    return list(output.routings), chosen


@pytest.mark.parametrize("input_jitter", [0.0, 0.01], ids=["no-jitter", "jitter"])
@pytest.mark.parametrize("name", CASES)
def test_training_gradients_of_every_parameter_agree_for_the_same_samples(name, input_jitter):
    config, router = CASES[name], replace(SAMPLING, input_jitter=input_jitter)
    pair = phimoe_pair(config, router)
    routings, chosen = train_both(pair, router)
    num_sampled = [0, 0]  # tokens whose first, second expert is not the likeliest
    for routing, expert_TK in zip(routings, chosen, strict=True):
        assert torch.equal(routing.expert_TK, expert_TK)
        first_T = routing.logit_TE.argmax(dim=-1)
        num_sampled[0] += int((routing.expert_TK[:, 0] != first_T).sum())
        rest_TE = routing.logit_TE.scatter(1, routing.expert_TK[:, :1], float("-inf"))
        num_sampled[1] += int((routing.expert_TK[:, 1] != rest_TE.argmax(dim=-1)).sum())
        # Heun's scale was 1/3 for some and 1 for others, or it proves nothing about it
        assert routing.weight_TK.min() < 1 / 3 < 0.99 < routing.weight_TK.max()
    num_choices = config.num_layers * 3 * ORIGINAL
    assert min(num_sampled) > 0.05 * num_choices
    assert_all_close(gradients(pair.ours), in_our_names(gradients(pair.theirs), config))


@pytest.mark.parametrize("backend", sorted(EXPERT_BACKENDS))
def test_training_gradients_agree_at_the_released_threshold_with_every_back_end(backend):
    if backend in ("megablocks", "triton"):
        pytest.skip(f"{backend} takes no CPU tensors")
    pair = phimoe_pair(MOE, RELEASED, backend=backend)
    routings, chosen = train_both(pair, RELEASED)
    for routing, expert_TK in zip(routings, chosen, strict=True):
        assert torch.equal(routing.expert_TK, expert_TK)
    assert_all_close(gradients(pair.ours), in_our_names(gradients(pair.theirs), MOE))


def test_other_samples_give_other_gradients():
    pair, router = phimoe_pair(MOE, SAMPLING), SAMPLING
    tokens = random_tokens(MOE, batch=3, length=ORIGINAL, seed=5)
    results = []
    for sample in (0, 0, 1):
        pair.ours.zero_grad()
        key_BS = token_keys(7, sample + torch.arange(3), seq_len=ORIGINAL)
        next_token_loss(pair.ours.train()(tokens, key_BS=key_BS).logits, tokens).backward()
        results.append({name: g.clone() for name, g in gradients(pair.ours).items()})
    assert router.input_jitter == 0.0  # so only experts and Heun's scale can differ
    first, same, other = results
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert all(distance(other[name], first[name]) > 1e-3 for name in first)


@pytest.mark.parametrize("length", [ORIGINAL - 1, ORIGINAL, ORIGINAL + 1, 2 * ORIGINAL])
def test_logits_agree_on_both_sides_of_the_original_length(length):
    # transformers 5.23 never uses the long factors of Phimoe, so beyond the original length it
    # gets the frequencies of the formula, written here with Python's numbers
    pair = phimoe_pair(MOE, RELEASED)
    factors = LONG_ROPE.long_factor if length > ORIGINAL else LONG_ROPE.short_factor
    frequency = [
        1.0 / (factor * LONG_ROPE.theta ** (2 * i / MOE.head_dim))
        for i, factor in enumerate(factors or ())
    ]
    pair.theirs.model.rotary_emb.rope_init_fn = lambda config: (torch.tensor(frequency), 1.0)
    tokens = random_tokens(MOE, batch=2, length=length)
    with torch.no_grad():
        expected, got = pair.theirs(tokens).logits, pair.ours(tokens).logits
    assert distance(got, expected) < FLOAT32_LIMIT


def test_the_long_regime_has_its_own_factors_and_mscale():
    tokens = random_tokens(MOE, batch=1, length=ORIGINAL + 1)

    def logits(rope):
        with torch.no_grad():
            return phimoe_pair(replace(MOE, rope=rope), RELEASED).ours(tokens).logits

    expected = logits(LONG_ROPE)
    for rope in (
        replace(LONG_ROPE, long_factor=LONG_ROPE.short_factor),
        replace(LONG_ROPE, long_mscale=LONG_ROPE.short_mscale),
    ):
        assert distance(logits(rope), expected) > 1e-3


def test_the_pooled_balance_loss_is_that_of_transformers_with_padding():
    from transformers.models.phimoe.modeling_phimoe import load_balancing_loss_func

    generator = torch.Generator().manual_seed(0)
    layers = [torch.randn(2 * 10, 16, generator=generator) for _ in range(3)]
    mask = torch.ones(2, 10, dtype=torch.long)
    mask[1, 6:] = 0
    # its annotation is a tuple of one
    expected = load_balancing_loss_func(tuple(layers), 16, top_k=2, attention_mask=mask)  # pyright: ignore[reportArgumentType]
    chosen = [logit.topk(2).indices for logit in layers]
    routings = [
        Routing(torch.ones(20, 2), expert, logit, torch.bincount(expert.flatten(), minlength=16))
        for expert, logit in zip(chosen, layers, strict=True)
    ]
    got = load_balance_pooled(routings, mask.flatten().bool())
    assert got.item() == pytest.approx(float(expected), rel=1e-5)
