"""Generation: the cache changes nothing, and sampling keeps what it should."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moe.config import ExpertsConfig, RouterConfig
from moe.errors import UserError
from moe.generate import Sampling, generate, next_token
from moe.model.transformer import build_model
from moe.model_config import ModelConfig, RopeConfig

ROPE = RopeConfig(
    original_max_position=8, short_factor=(1.0, 1.1, 1.2, 1.3), long_factor=(1.5, 2.5, 4.0, 7.0),
    short_mscale=1.1, long_mscale=1.3,
)  # fmt: skip
NANO = ModelConfig(
    vocab_size=64, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
    intermediate_size=16, num_experts=16, max_position=32, rope=ROPE,
)  # fmt: skip


@pytest.fixture
def model():
    built = build_model(NANO, RouterConfig(), ExpertsConfig("reference")).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in built.parameters():
        with torch.no_grad():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return built


@pytest.mark.parametrize("prompt_length", [1, 5, 8, 9, 12])
def test_greedy_text_is_that_of_full_passes_on_both_sides_of_the_long_rope_boundary(
    model, prompt_length
):
    prompt = torch.randint(64, (prompt_length,)).tolist()
    made = list(generate(model, prompt, Sampling(max_new_tokens=8, temperature=0), stop_ids=()))
    text = list(prompt)
    for token in made:
        with torch.no_grad():
            assert token == int(model(torch.tensor([text])).logits[0, -1].argmax())
        text.append(token)
    assert len(made) == 8


def test_a_stop_token_ends_the_text_and_is_not_part_of_it(model):
    free = list(generate(model, [3, 4], Sampling(max_new_tokens=8, temperature=0), stop_ids=()))
    stop = free[3]
    cut = list(generate(model, [3, 4], Sampling(max_new_tokens=8, temperature=0), stop_ids=(stop,)))
    assert cut == free[: free.index(stop)]


def test_the_same_seed_writes_the_same_text(model):
    texts = [
        list(
            generate(
                model, [1], Sampling(max_new_tokens=10, temperature=1.0, seed=seed), stop_ids=()
            )
        )
        for seed in (0, 0, 1)
    ]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("sampling", [
    Sampling(temperature=0.7), Sampling(temperature=1.3, top_k=5), Sampling(top_p=0.6),
    Sampling(temperature=0.9, top_k=20, top_p=0.8), Sampling(top_p=1e-6),
])  # fmt: skip
def test_draws_follow_the_distribution_of_transformers_processors(sampling):
    transformers = pytest.importorskip("transformers")
    logits = 2 * torch.randn(1, 50, generator=torch.Generator().manual_seed(0))
    steps = [transformers.TemperatureLogitsWarper(sampling.temperature)]
    if sampling.top_k:
        steps.append(transformers.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        steps.append(transformers.TopPLogitsWarper(sampling.top_p))
    expected = logits
    for step in steps:
        expected = step(None, expected)
    probability = expected.softmax(-1)[0]
    generator, num = torch.Generator().manual_seed(1), 4000
    draws = torch.stack([next_token(logits[0], sampling, generator) for _ in range(num)])
    share = torch.bincount(draws, minlength=50) / num
    assert share[probability == 0].sum() == 0
    assert (share - probability).abs().max() < 4 * (0.25 / num) ** 0.5


@pytest.mark.parametrize(
    ("prompt", "change", "word"),
    [
        ([], {}, "no tokens"),
        ([1] * 30, {}, "the model takes 32"),
        ([64], {}, "vocabulary of 64"),
    ],
)
def test_impossible_requests_are_refused(model, prompt, change, word):
    sampling = replace(Sampling(max_new_tokens=8), **change)
    with pytest.raises(UserError, match=word):
        next(generate(model, prompt, sampling, stop_ids=()))


@pytest.mark.parametrize("change", [
    {"temperature": -1}, {"temperature": float("nan")}, {"top_p": 0.0}, {"top_p": 1.5},
    {"top_k": -1}, {"max_new_tokens": 0},
])  # fmt: skip
def test_impossible_sampling_is_refused(change):
    with pytest.raises(UserError, match=next(iter(change))):
        replace(Sampling(), **change)
