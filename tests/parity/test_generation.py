"""Texts that generate_batch writes against those of transformers' generate, token for token."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers_pairs import Pair, phi3_pair, phimoe_pair

from moe.config import RouterConfig
from moe.generate import generate, generate_batch
from moe.inference_config import Sampling
from moe.model_config import ModelConfig, RopeConfig

NUM_NEW = 64
GREEDY = Sampling(max_new_tokens=NUM_NEW, temperature=0)
LONGROPE = RopeConfig(
    original_max_position=48, short_factor=(1.0, 1.1, 1.3, 1.7), long_factor=(1.5, 2.0, 3.0, 4.0),
    short_mscale=1.19, long_mscale=1.19,
)  # fmt: skip
MHA = ModelConfig(
    vocab_size=96, hidden_size=32, num_layers=3, num_heads=4, num_kv_heads=4, head_dim=8,
    intermediate_size=24, num_experts=0, max_position=256, norm="rmsnorm", attention_bias=False,
    head_bias=False, rope=RopeConfig(original_max_position=256),
)  # fmt: skip
GQA = replace(MHA, num_kv_heads=2)
WINDOW = replace(GQA, sliding_window=9)
CROSSING = replace(GQA, rope=LONGROPE)
MOE = replace(
    GQA, num_experts=16, norm="layernorm", attention_bias=True, head_bias=True, max_position=128,
    rope=replace(
        LONGROPE, original_max_position=128, short_mscale=1.243163121016122,
        long_mscale=1.243163121016122,
    ),
)  # fmt: skip
LENGTHS = (5, 1, 23, 12, 23)


def make_pair(config: ModelConfig) -> Pair:
    if config.is_sparse:
        return phimoe_pair(config, RouterConfig())
    return phi3_pair(config, attention_factor=config.rope.short_mscale)


def make_prompts(lengths: tuple[int, ...]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(1, 96, (length,), generator=generator).tolist() for length in lengths]


def their_texts(pair: Pair, prompts: list[list[int]], **options) -> list[list[int]]:
    """What transformers writes after left-padded prompts, with its cache."""
    longest = max(map(len, prompts))
    tokens = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for row, prompt in enumerate(prompts):
        tokens[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    made = pair.theirs.generate(
        tokens, attention_mask=mask, max_new_tokens=NUM_NEW, do_sample=False, use_cache=True,
        pad_token_id=0, **options,
    )  # fmt: skip
    return made[:, longest:].tolist()


def our_texts(
    pair: Pair, prompts: list[list[int]], sampling: Sampling = GREEDY, *, stop_ids=()
) -> list[list[int]]:
    texts: list[list[int]] = [[] for _ in prompts]
    for new in generate_batch(pair.ours, prompts, sampling, stop_ids=stop_ids):
        for number, token in new.items():
            texts[number].append(token)
    return texts


def require_variety(texts: list[list[int]]) -> None:
    """A model that repeats itself would agree about too little."""
    assert all(len(text) == NUM_NEW for text in texts)
    assert len({token for text in texts for token in text}) > 12


@pytest.mark.parametrize(
    "config", [MHA, GQA, WINDOW, MOE], ids=["mha", "gqa", "window", "phimoe"]
)  # fmt: skip
def test_a_left_padded_batch_writes_the_same_64_tokens(config):
    pair, prompts = make_pair(config), make_prompts(LENGTHS)
    texts = our_texts(pair, prompts)
    require_variety(texts)
    assert texts == their_texts(pair, prompts)


@pytest.mark.parametrize("length", [1, 20, 47, 48, 49])
def test_a_text_that_crosses_the_original_length_of_longrope_is_the_same(length):
    pair, prompts = make_pair(CROSSING), make_prompts((length,))
    text = list(generate(pair.ours, prompts[0], GREEDY, stop_ids=()))
    assert [text] == their_texts(pair, prompts)
    # the crossing matters: a model that stays short writes something else
    stays = replace(LONGROPE, original_max_position=256)
    short = phi3_pair(replace(CROSSING, rope=stays), attention_factor=stays.short_mscale)
    if length <= 48:
        assert their_texts(short, prompts)[0][: 49 - length] == text[: 49 - length]
    assert their_texts(short, prompts) != [text]


def test_a_batch_of_one_length_that_crosses_is_the_same():
    pair, prompts = make_pair(CROSSING), make_prompts((30, 30, 30))
    texts = our_texts(pair, prompts)
    require_variety(texts)
    assert texts == their_texts(pair, prompts)


def test_rows_of_unequal_length_that_cross_are_what_transformers_writes_for_each_alone():
    # in one batch transformers switches all rows when the padded length crosses
    pair, prompts = make_pair(CROSSING), make_prompts((40, 12, 48, 31))
    texts = our_texts(pair, prompts)
    assert texts == [their_texts(pair, [prompt])[0] for prompt in prompts]


@pytest.mark.parametrize("config", [GQA, MOE], ids=["gqa", "phimoe"])
def test_rows_end_at_the_same_stop_tokens(config):
    pair, prompts = make_pair(config), make_prompts(LENGTHS)
    free = our_texts(pair, prompts)
    stop_ids = sorted({free[0][4], free[2][9], free[3][30]})
    got = our_texts(pair, prompts, stop_ids=stop_ids)
    expected = [
        text[: next((place for place, t in enumerate(text) if t in stop_ids), NUM_NEW)]
        for text in their_texts(pair, prompts, eos_token_id=stop_ids)
    ]
    assert got == expected
    assert len({len(text) for text in got}) > 2


@pytest.mark.parametrize("config", [GQA, MOE], ids=["gqa", "phimoe"])
def test_the_repetition_penalty_changes_greedy_text_as_it_does_there(config):
    pair, prompts = make_pair(config), make_prompts(LENGTHS)
    texts = our_texts(pair, prompts, replace(GREEDY, repetition_penalty=1.3))
    assert texts == their_texts(pair, prompts, repetition_penalty=1.3)
    assert texts != our_texts(pair, prompts)
