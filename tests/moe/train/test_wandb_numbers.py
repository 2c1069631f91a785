"""Which numbers W&B shows: names, definitions, and no more panels than can be looked at."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from analysis.utilisation import coefficient_of_variation, diversity, load_ratio
from moe.train.wandb_numbers import curves, load_ratios, shown_layers, summary


def train_record(num_layers: int, num_experts: int, *, seed: int = 0) -> dict[str, Any]:
    """Every key that moe/train/loop.py writes for a step."""
    draw = np.random.default_rng(seed)
    count_LE = draw.integers(0, 6, (num_layers, num_experts)) + np.eye(1, num_experts, dtype=int)
    return {
        "step": 3, "kind": "train", "loss": 5.0, "loss/total": 5.1, "loss/balance": 1.0,
        "loss/z": 0.1, "lr": 1e-3, "grad_norm": 0.5, "tokens_seen": 512, "skipped": False,
        "data_hash": "00c0ffee", "tokens_per_second": 1e4, "step_seconds": 0.1, "memory_gib": 0.5,
        "mfu": 0.3, "trace/seconds": 0.01, "router/dead_experts": 2,
        "router/load_LE": (count_LE / count_LE.sum(axis=1, keepdims=True)).tolist(),
        "router/entropy_L": draw.uniform(0.5, 2.0, num_layers).tolist(),
    }  # fmt: skip


def validation_record(num_domains: int) -> dict[str, Any]:
    names = ("loss", "perplexity", "bits_per_byte", "unigram_entropy", "unigram_bits_per_byte",
             "tokens")  # fmt: skip
    record: dict[str, Any] = {f"validation/{name}": 2.0 for name in names}
    for domain in range(num_domains):
        record[f"validation/loss/d{domain}"] = 3.0 + domain
        record[f"validation/bits_per_byte/d{domain}"] = 1.0
    return {"step": 3, "kind": "validation", **record}


def test_every_number_of_a_step_has_a_section_and_a_name() -> None:
    shown = curves(train_record(2, 4))
    assert sorted(shown) == [
        "layers/entropy/00", "layers/entropy/01", "loss/balance", "loss/total", "loss/train",
        "loss/z", "optim/grad_norm", "optim/lr", "optim/skipped", "router/dead_experts",
        "router/diversity", "router/entropy", "router/entropy_min", "router/load_cv",
        "router/max_load", "router/min_load", "throughput/memory_gib", "throughput/mfu",
        "throughput/step_seconds", "throughput/tokens_per_second", "throughput/trace_seconds",
        "tokens",
    ]  # fmt: skip
    assert shown["loss/train"] == 5.0
    assert shown["tokens"] == 512


@pytest.mark.parametrize("seed", range(5))
def test_numbers_of_load_are_those_of_the_analysis(seed: int) -> None:
    record = train_record(3, 8, seed=seed)
    load_LE, shown = record["router/load_LE"], curves(record)
    assert shown["router/load_cv"] == pytest.approx(coefficient_of_variation(load_LE).mean())
    assert shown["router/diversity"] == pytest.approx(diversity(load_LE).mean())
    assert shown["router/max_load"] == pytest.approx(load_ratio(load_LE).max())
    assert shown["router/min_load"] == pytest.approx(load_ratio(load_LE).min())
    assert shown["router/entropy"] == pytest.approx(np.mean(record["router/entropy_L"]))
    assert shown["router/entropy_min"] == min(record["router/entropy_L"])


def test_load_by_hand() -> None:
    record = train_record(2, 4) | {"router/load_LE": [[0.5, 0.5, 0.0, 0.0], [0.25] * 4]}
    shown = curves(record)
    assert (shown["router/max_load"], shown["router/min_load"]) == (2.0, 0.0)
    assert shown["router/diversity"] == pytest.approx((2 / 4 + 1) / 2)
    assert shown["router/load_cv"] == pytest.approx((1 + 0) / 2)


def test_a_model_of_32_layers_and_data_of_50_domains_has_no_more_panels_than_fit() -> None:
    shown = {**curves(train_record(32, 16)), **curves(validation_record(50))}
    sections: dict[str, int] = {}
    for name in shown:
        sections[name.partition("/")[0]] = sections.get(name.partition("/")[0], 0) + 1
    assert sections == {
        "loss": 4, "tokens": 1, "optim": 3, "router": 7, "layers": 8, "throughput": 5,
        "validation": 3, "domains": 24,
    }  # fmt: skip
    entropy_L = train_record(32, 16)["router/entropy_L"]
    assert shown["layers/entropy/31"] == entropy_L[31]
    assert shown["layers/entropy/00"] == entropy_L[0]


def test_layers_shown_are_all_of_few_and_both_ends_of_many() -> None:
    assert shown_layers(3) == [0, 1, 2]
    assert shown_layers(8) == list(range(8))
    assert shown_layers(32) == [0, 4, 9, 13, 18, 22, 27, 31]
    assert len(set(shown_layers(9))) == 8


def test_a_dense_model_has_one_loss_and_nothing_of_routers() -> None:
    record = train_record(2, 4)
    for key in ("router/load_LE", "router/entropy_L", "router/dead_experts", "trace/seconds"):
        del record[key]
    assert {name.partition("/")[0] for name in curves(record)} == {
        "loss", "optim", "throughput", "tokens",
    }  # fmt: skip
    assert [name for name in curves(record) if name.startswith("loss/")] == ["loss/train"]


def test_what_is_the_same_all_along_is_summed_up_and_no_curve() -> None:
    record = validation_record(1)
    assert summary(record) == {
        "data/unigram_entropy": 2.0, "data/unigram_bits_per_byte": 2.0, "data/tokens": 2.0,
    }  # fmt: skip
    assert sorted(curves(record)) == [
        "domains/bits_per_byte/d0", "domains/loss/d0", "validation/bits_per_byte",
        "validation/loss", "validation/perplexity",
    ]  # fmt: skip


def test_numbers_that_somebody_adds_are_shown_and_other_values_are_not() -> None:
    shown = curves(
        {"kind": "train", "step": 1, "mine/new": 2, "new": 3.0, "text": "x", "list": [1]}
    )
    assert shown == {"mine/new": 2, "other/new": 3.0}


def test_a_loss_that_is_no_number_stays_one() -> None:
    assert math.isnan(curves(train_record(1, 2) | {"loss": math.nan})["loss/train"])


def test_a_record_without_load_has_no_ratios() -> None:
    assert load_ratios({}) is None
    assert load_ratios({"router/load_LE": []}) is None
    assert load_ratios({"router/load_LE": [[], []]}) is None
