"""Many prompts in batches: the same texts whatever the batches, in the order of the prompts."""

from __future__ import annotations

import pytest
import torch

from moe.errors import UserError
from moe.generate import generate_batch
from moe.inference_config import Sampling
from moe.model.transformer import Transformer, build_model
from moe.model_config import ModelConfig, RopeConfig
from moe.write_texts import WrittenText, write_texts

CONFIG = ModelConfig(
    vocab_size=64, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
    intermediate_size=24, num_experts=0, max_position=40, norm="rmsnorm", attention_bias=False,
    head_bias=False, rope=RopeConfig(original_max_position=40),
)  # fmt: skip
PROMPTS = [[1, 2, 3], [4], [5] * 9, [6, 7], [8, 9, 10, 11]]
SAMPLING = Sampling(max_new_tokens=10, temperature=1.2, seed=5)


@pytest.fixture(scope="module")
def model() -> Transformer:
    built = build_model(CONFIG).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return built


def write(model: Transformer, *, batch_size: int, num_samples: int = 3, stop_ids=(7, 20, 41)):
    return list(
        write_texts(
            model, PROMPTS, SAMPLING, names=[f"line {n}" for n in range(5)], stop_ids=stop_ids,
            num_samples=num_samples, batch_size=batch_size,
        )
    )  # fmt: skip


def flat(batches: list[list[WrittenText]]) -> list[WrittenText]:
    return [text for batch in batches for text in batch]


def test_the_texts_do_not_depend_on_the_batches(model):
    one_by_one = write(model, batch_size=1)
    assert [len(batch) for batch in one_by_one] == [1] * 15
    for batch_size in (2, 4, 15, 100):
        batches = write(model, batch_size=batch_size)
        assert [len(b) for b in batches[:-1]] == [batch_size] * (len(batches) - 1)
        assert flat(batches) == flat(one_by_one)


def test_texts_come_prompt_by_prompt_and_samples_of_a_prompt_differ(model):
    texts = flat(write(model, batch_size=4, stop_ids=()))
    assert [(text.prompt, text.sample) for text in texts] == [
        (prompt, sample) for prompt in range(5) for sample in range(3)
    ]
    assert all(len(text.ids) == 10 and not text.is_stopped for text in texts)
    assert len({tuple(text.ids) for text in texts}) == 15


def test_a_text_is_stopped_where_a_stop_token_ended_it(model):
    free, cut = flat(write(model, batch_size=4, stop_ids=())), flat(write(model, batch_size=4))
    for whole, text in zip(free, cut, strict=True):
        end = next((place for place, t in enumerate(whole.ids) if t in (7, 20, 41)), 10)
        assert text.ids == whole.ids[:end]
        assert text.is_stopped == (end < 10)
    assert {text.is_stopped for text in cut} == {True, False}


def test_the_numbers_of_one_prompt_are_those_of_a_plain_batch(model):
    texts = flat(write(model, batch_size=15, num_samples=1, stop_ids=()))
    made: list[list[int]] = [[] for _ in PROMPTS]
    for new in generate_batch(model, PROMPTS, SAMPLING, stop_ids=()):
        for number, token in new.items():
            made[number].append(token)
    assert [text.ids for text in texts] == made


def test_a_prompt_that_the_model_cannot_take_is_named_before_anything_is_computed(model):
    handle = model.register_forward_pre_hook(lambda module, inputs: pytest.fail("computed"))
    batches = write_texts(
        model, [[1], [2], [3] * 31], SAMPLING, names=["a", "b", "c"], stop_ids=(), num_samples=1,
        batch_size=1,
    )  # fmt: skip
    with pytest.raises(UserError, match="c of 31 tokens"):
        next(batches)
    handle.remove()
