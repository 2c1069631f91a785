"""Sampling: the logits of transformers' processors, and draws that follow them."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from moe.errors import UserError
from moe.inference_config import Sampling
from moe.sampling import draw, keep_top_k, keep_top_p, processed_logits, uniform_numbers

INF = float("inf")
SETTINGS = [
    Sampling(repetition_penalty=penalty, temperature=temperature, top_k=top_k, top_p=top_p)
    for penalty, temperature, top_k, top_p in itertools.product(
        (1.0, 1.3, 0.5), (1.0, 0.7, 1.9, 1e-6), (0, 1, 5, 1000), (1.0, 0.95, 0.5, 1e-9)
    )
]


def logits_of_kind(kind: str, seed: int) -> torch.Tensor:
    """(4, 67) logits: a kind of edge each."""
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(4, 67, generator=generator)
    if kind == "ties":
        return logits.round()
    if kind == "all_equal":
        return torch.zeros(4, 67)
    if kind == "impossible":  # as phi-3-small's dummy tokens, or a mask of the caller
        logits[torch.rand(4, 67, generator=generator) < 0.7] = -INF
        logits[:, 3] = 0.5
        return logits
    if kind == "masked_by_the_least_number":
        logits[:, 20:] = torch.finfo(torch.float32).min
        return logits
    if kind == "one_certain":
        logits[:, 5] = 3e4
        return logits
    assert kind == "random"
    return logits


@pytest.fixture(scope="module")
def expected_logits():
    """Call it for the logits of transformers' own list of processors, put together by it."""
    transformers = pytest.importorskip("transformers")
    model = transformers.PhimoeForCausalLM(
        transformers.PhimoeConfig(
            vocab_size=67, hidden_size=8, intermediate_size=8, num_hidden_layers=0,
            num_attention_heads=1, num_key_value_heads=1, pad_token_id=0,
        )
    )  # fmt: skip

    def process(logits: torch.Tensor, sampling: Sampling, ids: torch.Tensor, *, padding: int):
        config = transformers.GenerationConfig(
            do_sample=True, temperature=sampling.temperature, top_k=sampling.top_k,
            top_p=sampling.top_p, repetition_penalty=sampling.repetition_penalty,
        )  # fmt: skip
        mask = torch.ones_like(ids)
        mask[:, :padding] = 0
        processors = model._get_logits_processor(
            config, input_ids_seq_length=ids.shape[1], model_kwargs={"attention_mask": mask}
        )
        return processors(ids, logits.clone())

    return process


@pytest.mark.parametrize("kind", [
    "random", "ties", "all_equal", "impossible", "masked_by_the_least_number", "one_certain",
])  # fmt: skip
def test_the_logits_are_exactly_those_of_transformers_for_every_combination_of_settings(
    kind, expected_logits
):
    for number, sampling in enumerate(SETTINGS):
        logits = logits_of_kind(kind, seed=number)
        ids = torch.randint(67, (4, 12), generator=torch.Generator().manual_seed(number))
        ids[:, :3] = 5  # padding: never penalised where it is not in the text
        expected = expected_logits(logits, sampling, ids, padding=3)
        seen = torch.zeros(4, 67, dtype=torch.bool).scatter(1, ids[:, 3:], True)
        before = logits.clone()
        got = processed_logits(logits, sampling, seen_BV=seen)
        assert torch.equal(got, expected), sampling
        assert torch.equal(got.softmax(-1), expected.softmax(-1)), sampling
        assert torch.equal(logits, before)
        assert not got.isneginf().all(-1).any()


def test_a_row_is_processed_as_if_it_were_alone():
    logits = logits_of_kind("random", seed=0)
    sampling = Sampling(temperature=0.8, top_k=9, top_p=0.7, repetition_penalty=1.4)
    seen = torch.rand(4, 67, generator=torch.Generator().manual_seed(1)) < 0.5
    together = processed_logits(logits, sampling, seen_BV=seen)
    for row in range(4):
        one = slice(row, row + 1)
        alone = processed_logits(logits[one], sampling, seen_BV=seen[one])
        assert torch.equal(together[one], alone)


def test_tokens_tied_with_the_last_of_top_k_stay():
    logits = torch.tensor([[3.0, 2.0, 2.0, 2.0, 1.0]])
    assert keep_top_k(logits, k=2).tolist() == [[3.0, 2.0, 2.0, 2.0, -INF]]


def test_top_p_at_its_exact_edge_leaves_the_token_out_and_the_likeliest_always_in():
    halves = torch.tensor([[0.25, 0.5, 0.25]]).log()
    assert keep_top_p(halves, share=0.5).isneginf().tolist() == [[True, False, True]]
    assert keep_top_p(halves, share=0.51).isneginf().sum() == 1
    assert keep_top_p(halves, share=1e-9).isneginf().tolist() == [[True, False, True]]


def test_temperature_0_takes_the_penalised_maximum_and_no_filter():
    logits = torch.tensor([[4.0, 3.5, -1.0]])
    seen = torch.tensor([[True, False, True]])
    sampling = Sampling(temperature=0, top_k=1, top_p=0.1, repetition_penalty=2.0)
    assert processed_logits(logits, sampling, seen_BV=seen).tolist() == [[2.0, 3.5, -2.0]]


@pytest.mark.parametrize("sampling", [
    Sampling(temperature=0.7), Sampling(temperature=1.3, top_k=5), Sampling(top_p=0.6),
    Sampling(temperature=0.9, top_k=20, top_p=0.8, repetition_penalty=1.5), Sampling(top_p=1e-6),
])  # fmt: skip
def test_draws_follow_the_distribution(sampling):
    logits = 2 * torch.randn(1, 50, generator=torch.Generator().manual_seed(0))
    seen = torch.arange(50)[None] % 2 == 0
    processed = processed_logits(logits, sampling, seen_BV=seen)
    num = 20_000
    uniform = torch.rand(num, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    share = torch.bincount(draw(processed.expand(num, -1), uniform), minlength=50) / num
    probability = processed.softmax(-1)[0]
    assert share[probability == 0].sum() == 0
    assert (share - probability).abs().max() < 4 * (0.25 / num) ** 0.5


def test_the_smallest_and_the_largest_number_draw_a_possible_token():
    logits = torch.tensor([[-INF, 0.0, 1.0, -INF, -200.0, -INF]]).expand(2, -1)
    ends = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert draw(logits, ends).tolist() == [1, 2]  # exp(-200) is below the last bit of the sum
    rare = torch.tensor([[0.0, -18.0]]).expand(3, -1)  # 1.5e-8, below the last bit of float32
    edge = torch.tensor([0.0, 1 - 2e-8, 1 - 1e-8], dtype=torch.float64)
    assert draw(rare, edge).tolist() == [0, 0, 1]
    many = torch.full((2, 32_064), 0.25)
    assert draw(many, ends).tolist() == [0, 32_063]


def test_a_row_s_numbers_are_its_own_and_the_first_do_not_depend_on_how_many():
    numbers = uniform_numbers(7, [0, 1, 5], num=100, device="cpu")
    assert numbers.dtype == torch.float64
    assert torch.equal(uniform_numbers(7, [5], num=40, device="cpu")[0], numbers[2, :40])
    others = [numbers[0], numbers[1], numbers[2], uniform_numbers(8, [0], num=100, device="cpu")[0]]
    for one, other in itertools.combinations(others, 2):
        assert not torch.isin(one, other).any()
    assert 0 <= float(numbers.min()) < 0.05 < 0.95 < float(numbers.max()) < 1


@pytest.mark.parametrize(("key", "value", "allowed"), [
    ("temperature", -1.0, "1e-06"), ("temperature", float("nan"), "1e-06"),
    ("temperature", 1e-30, "1e-06"), ("temperature", INF, "1e[+]06"), ("top_p", 0.0, "above 0"),
    ("top_p", 1.5, "at most 1"), ("top_p", float("nan"), "above 0"), ("top_k", -1, "at least 0"),
    ("max_new_tokens", 0, "at least 1"), ("repetition_penalty", 0.0, "0.01 to 100"),
    ("repetition_penalty", -1.2, "0.01 to 100"), ("repetition_penalty", float("nan"), "0.01"),
    ("seed", -1, "at least 0"),
])  # fmt: skip
def test_impossible_settings_are_refused_by_name_with_what_is_allowed(key, value, allowed):
    with pytest.raises(UserError, match=rf"sampling\.{key}: got .*{allowed}"):
        replace(Sampling(), **{key: value})
