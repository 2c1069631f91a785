"""Dense Phi3 against transformers: logits and the gradients of every parameter."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from closeness import FLOAT32_LIMIT, assert_all_close, distance
from transformers_pairs import (
    gradients,
    greedy,
    in_our_names,
    next_token_loss,
    phi3_pair,
    random_tokens,
)

from moe.model.attention import KeyValueCache
from moe.model_config import ModelConfig, RopeConfig

DENSE = ModelConfig(
    vocab_size=96, hidden_size=32, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8,
    intermediate_size=24, num_experts=0, norm="rmsnorm", attention_bias=False, head_bias=False,
    max_position=512, rope=RopeConfig(original_max_position=512),
)  # fmt: skip
ORIGINAL = 16  # LongRoPE's original length
BY_FORMULA = math.sqrt(1 + math.log(512 / ORIGINAL) / math.log(ORIGINAL))
LONG_ROPE = RopeConfig(
    original_max_position=ORIGINAL, short_factor=(1.0, 1.1, 1.3, 1.7),
    long_factor=(1.5, 2.0, 3.0, 4.0), short_mscale=BY_FORMULA, long_mscale=BY_FORMULA,
)  # fmt: skip
LONG = replace(DENSE, rope=LONG_ROPE)
EXPLICIT = replace(LONG, rope=replace(LONG_ROPE, short_mscale=1.3, long_mscale=1.3))
HALF_LONG = replace(
    DENSE, rope=replace(LONG_ROPE, rotary_fraction=0.5, short_factor=(1.0, 1.3),
                        long_factor=(1.5, 4.0)),
)  # fmt: skip

# name -> (configuration, length of the texts, attention_factor given to transformers)
CASES = {
    "mha": (replace(DENSE, num_kv_heads=4), 40, None),
    "gqa": (DENSE, 40, None),
    "one-key-head": (replace(DENSE, num_kv_heads=1), 40, None),
    "window-smaller-than-the-text": (replace(DENSE, sliding_window=7), 40, None),
    "window-of-the-text": (replace(DENSE, sliding_window=40), 40, None),
    "partial-rotary": (replace(DENSE, rope=replace(DENSE.rope, rotary_fraction=0.5)), 40, None),
    "tied-head": (replace(DENSE, tie_embeddings=True), 40, None),
    "longrope-at-the-original-length": (LONG, ORIGINAL, None),
    "longrope-one-beyond": (LONG, ORIGINAL + 1, None),
    "longrope-far-beyond": (LONG, 3 * ORIGINAL, None),
    "longrope-explicit-mscale": (EXPLICIT, ORIGINAL, 1.3),
    "longrope-explicit-mscale-beyond": (EXPLICIT, ORIGINAL + 1, 1.3),
    "longrope-partial-rotary-beyond": (HALF_LONG, ORIGINAL + 1, None),
    "longrope-window": (replace(LONG, sliding_window=7), ORIGINAL + 1, None),
}


@pytest.mark.parametrize("name", CASES)
def test_logits_agree(name):
    config, length, attention_factor = CASES[name]
    pair = phi3_pair(config, attention_factor=attention_factor)
    tokens = random_tokens(config, batch=2, length=length)
    with torch.no_grad():
        expected, got = pair.theirs(tokens).logits, pair.ours(tokens).logits
    assert expected.std() > 0.5  # a model that says something
    assert distance(got, expected) < FLOAT32_LIMIT


@pytest.mark.parametrize("name", CASES)
def test_training_gradients_of_every_parameter_agree(name):
    config, length, attention_factor = CASES[name]
    pair = phi3_pair(config, attention_factor=attention_factor)
    tokens = random_tokens(config, batch=2, length=length, seed=4)
    for model in (pair.ours.train(), pair.theirs.train()):
        next_token_loss(model(tokens).logits, tokens).backward()
    assert_all_close(gradients(pair.ours), in_our_names(gradients(pair.theirs), config))


def test_each_setting_of_the_family_changes_the_logits():
    # or a comparison above would hold although one side ignores the setting
    tokens = random_tokens(DENSE, batch=1, length=ORIGINAL)
    longer = random_tokens(DENSE, batch=1, length=ORIGINAL + 1)

    def logits(config, texts, **named):
        with torch.no_grad():
            return phi3_pair(config, **named).ours(texts).logits

    plain = logits(DENSE, tokens)
    for name in ("window-smaller-than-the-text", "partial-rotary", "longrope-explicit-mscale"):
        config, _, attention_factor = CASES[name]
        assert distance(logits(config, tokens, attention_factor=attention_factor), plain) > 1e-2
    beyond = logits(LONG, longer)
    all_short = replace(LONG, rope=replace(LONG_ROPE, long_factor=LONG_ROPE.short_factor))
    assert distance(logits(all_short, longer), beyond) > 1e-2
    assert distance(logits(EXPLICIT, longer, attention_factor=1.3), beyond) > 1e-2


@pytest.mark.parametrize("name", ["gqa", "window-smaller-than-the-text", "longrope-far-beyond"])
def test_64_greedy_tokens_are_those_of_generate(name):
    # with longrope the text crosses the original length on its way
    pair = phi3_pair(CASES[name][0])
    got, expected = greedy(pair, random_tokens(pair.config, batch=4, length=8), num_new=64)
    assert torch.equal(got, expected)
    assert got[:, 8:].unique().numel() > 10


@pytest.mark.parametrize(
    "config", [DENSE, replace(DENSE, sliding_window=7)], ids=["full", "window"]
)
def test_a_decode_step_agrees_with_a_cache_on_both_sides(config):
    pair = phi3_pair(config)
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


def test_left_padding_agrees_at_the_places_of_the_text():
    pair = phi3_pair(DENSE)
    tokens = random_tokens(DENSE, batch=3, length=20)
    padding_B = torch.tensor([0, 5, 19])
    is_text = torch.arange(20)[None] >= padding_B[:, None]
    position = (torch.arange(20)[None] - padding_B[:, None]).clamp(min=0)
    with torch.no_grad():
        expected = pair.theirs(tokens, attention_mask=is_text.long(), position_ids=position).logits
        got = pair.ours(tokens, padding_B=padding_B).logits
    assert distance(got[is_text], expected[is_text]) < FLOAT32_LIMIT
