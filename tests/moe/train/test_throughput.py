"""FLOPs against a counter and by hand; the peak, memory and the clock against what they claim."""

from __future__ import annotations

import dataclasses
import mmap
import time

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from moe.model_config import ModelConfig
from moe.train.throughput import (
    Clock,
    Speed,
    measure_peak_flops,
    memory_in_use_gib,
    mfu,
    model_flops_per_token,
)

SMALL_MOE = ModelConfig(
    vocab_size=96, hidden_size=24, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
    intermediate_size=20, num_experts=6, top_k=2,
)  # fmt: skip
SMALL_DENSE = dataclasses.replace(SMALL_MOE, num_experts=0)


def train_step_of_plain_products(config: ModelConfig, *, seq_len: int) -> None:
    """Forward and backward of a decoder's products on one sequence, unmasked; T = seq_len."""
    d, h, g, c = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim
    k = config.top_k if config.is_sparse else 1

    def weight(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, requires_grad=True)

    # the embedding is a look-up: no product, but its output needs a gradient
    x_TD = weight(seq_len, d) * 1.0
    for _ in range(config.num_layers):
        q = (x_TD @ weight(d, h * c)).view(seq_len, h, c).transpose(0, 1)
        key = (x_TD @ weight(d, g * c)).view(seq_len, g, c).transpose(0, 1)
        value = (x_TD @ weight(d, g * c)).view(seq_len, g, c).transpose(0, 1)
        key, value = (t.repeat_interleave(h // g, dim=0) for t in (key, value))
        mixed = torch.softmax(torch.bmm(q, key.transpose(1, 2)), dim=-1).bmm(value)
        x_TD = x_TD + mixed.transpose(0, 1).reshape(seq_len, h * c) @ weight(h * c, d)
        y_TD = x_TD
        if config.is_sparse:
            y_TD = y_TD * torch.softmax(x_TD @ weight(d, config.num_experts), dim=-1)[:, :1]
        for _ in range(k):  # every token passes k experts of this shape
            gate = x_TD @ weight(d, config.intermediate_size)
            up = x_TD @ weight(d, config.intermediate_size)
            y_TD = y_TD + (F.silu(gate) * up) @ weight(config.intermediate_size, d)
        x_TD = y_TD
    (x_TD @ weight(d, config.vocab_size)).sum().backward()


@pytest.mark.parametrize("config", [SMALL_MOE, SMALL_DENSE], ids=["sparse", "dense"])
def test_flops_of_a_token_equal_those_counted_in_a_decoder_of_plain_products(
    config: ModelConfig,
) -> None:
    seq_len = 16
    with FlopCounterMode(display=False) as counter:
        train_step_of_plain_products(config, seq_len=seq_len)
    # the plain products compute all S keys of a query, the formula counts the (S + 1) / 2 it sees
    hidden_keys = seq_len - (seq_len + 1) / 2
    masked = 12 * config.num_layers * config.num_heads * config.head_dim * hidden_keys
    expected = counter.get_total_flops() / seq_len - masked
    assert model_flops_per_token(config, seq_len) == expected


def test_flops_of_a_token_by_hand() -> None:
    config = ModelConfig(
        vocab_size=10, hidden_size=2, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=2,
        intermediate_size=3, num_experts=4, top_k=2,
    )  # fmt: skip
    # attention 4*2*2=16, router 2*4=8, 2 experts of 3*2*3=18, head 2*10=20: 80 parameters
    # scores and weighted sum: 12 * 1 layer * 1 head * width 2 * (1 + 2 + ... + 6) / 6 keys = 84
    assert model_flops_per_token(config, 6) == 6 * 80 + 84
    assert model_flops_per_token(dataclasses.replace(config, tie_embeddings=True), 6) == 564


def test_only_the_chosen_experts_count() -> None:
    more = dataclasses.replace(SMALL_MOE, num_experts=7)
    router_row = 6 * SMALL_MOE.num_layers * SMALL_MOE.hidden_size
    difference = model_flops_per_token(more, 16) - model_flops_per_token(SMALL_MOE, 16)
    assert difference == router_row


def test_flops_of_the_real_model_are_those_of_its_active_parameters() -> None:
    config = ModelConfig(
        vocab_size=32064, hidden_size=4096, num_layers=32, num_heads=32, num_kv_heads=8,
        head_dim=128, intermediate_size=6400, num_experts=16, top_k=2,
    )  # fmt: skip
    embedding = config.vocab_size * config.hidden_size
    six_active = 6 * (config.num_parameters(active=True) - embedding)
    attention = 12 * 32 * 4096 * 4097 / 2
    # biases and norms, below 0.1 % of the active parameters, are not products
    assert model_flops_per_token(config, 4096) == pytest.approx(six_active + attention, rel=1e-3)
    assert model_flops_per_token(config, 4096) < six_active + attention


def test_a_sliding_window_counts_the_keys_inside_it() -> None:
    seq_len, window = 64, 16
    narrow = dataclasses.replace(SMALL_MOE, sliding_window=window)
    per_key = 12 * SMALL_MOE.num_layers * SMALL_MOE.num_heads * SMALL_MOE.head_dim
    saved = model_flops_per_token(SMALL_MOE, seq_len) - model_flops_per_token(narrow, seq_len)
    seen = sum(min(i + 1, window) for i in range(seq_len)) / seq_len
    assert saved / per_key == pytest.approx((seq_len + 1) / 2 - seen, rel=1e-12)
    wide = dataclasses.replace(SMALL_MOE, sliding_window=1000)
    assert model_flops_per_token(wide, seq_len) == model_flops_per_token(SMALL_MOE, seq_len)


def test_mfu_is_useful_flops_over_the_peak() -> None:
    assert mfu(1000.0, 6e9, 12e12) == 0.5


def test_the_measured_peak_is_the_speed_of_a_large_product_and_keeps_to_its_time() -> None:
    began = time.perf_counter()
    peak = measure_peak_flops("cpu", torch.float32, seconds=0.3)
    took = time.perf_counter() - began
    left = torch.rand(1024, 1024)
    best = 0.0
    for _ in range(5):
        start = time.perf_counter()
        torch.mm(left, left)
        best = max(best, 2 * 1024**3 / (time.perf_counter() - start))
    # other work shares this machine, so only the order of magnitude is certain
    assert best / 4 < peak < best * 4
    assert took < 10


def test_a_slow_type_does_not_take_much_longer_than_allowed() -> None:
    began = time.perf_counter()
    assert measure_peak_flops("cpu", torch.bfloat16, seconds=0.2) > 0
    assert time.perf_counter() - began < 15


def test_memory_grows_by_what_is_held() -> None:
    before = memory_in_use_gib()
    # fresh pages of the system: the heap may have room left from what ran before
    with mmap.mmap(-1, 2**28) as held:
        for _ in range(2**8):
            held.write(b"x" * 2**20)  # in small pieces: a large one would count, too
        assert memory_in_use_gib() - before == pytest.approx(0.25, abs=0.05)
    assert 0.02 < before < 64


class FakeTime:
    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


def test_the_clock_leaves_out_pauses_and_starts_anew_after_each_reading() -> None:
    now = FakeTime()
    clock = Clock(now=now)
    for _ in range(4):
        now.seconds += 0.5
        clock.count(1000)
    with clock.paused():
        now.seconds += 60
    assert clock.read() == Speed(tokens_per_second=2000.0, step_seconds=0.5)
    now.seconds += 2
    clock.count(1000)
    assert clock.read() == Speed(tokens_per_second=500.0, step_seconds=2.0)


def test_a_pause_that_ends_by_an_error_is_left_out_too() -> None:
    now = FakeTime()
    clock = Clock(now=now)

    def save_to_a_full_disk() -> None:
        with clock.paused():
            now.seconds += 60
            raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        save_to_a_full_disk()
    now.seconds += 1
    clock.count(10)
    assert clock.read().tokens_per_second == 10.0


def test_a_clock_without_steps_reads_zero() -> None:
    assert Clock(now=FakeTime()).read() == Speed(0.0, 0.0)
