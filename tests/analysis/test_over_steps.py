"""What is said over a run's steps equals loops over its log and its traces."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from analysis.count_trace import count_steps
from analysis.open_run import open_run, recorded_routing, traces_to_compare
from analysis.over_steps import (
    count_blocks,
    domain_dependence,
    log_series,
    overlap_of,
    saturation_over,
)
from analysis.routing_counts import RoutingCounts
from analysis.specialisation import share_explained
from moe.errors import DataError
from moe.trace.batch import join_rows


def record(step: int, load: list[list[float]], **values: float) -> dict[str, Any]:
    return {
        "step": step, "tokens_seen": 100 * step, "router/load_LE": load, "loss": 4.0 - step,
        "router/entropy_L": [1.0 * step] * len(load), "loss/balance": 2.0 + step, **values,
    }  # fmt: skip


def counts_of(choice_LDGE: np.ndarray) -> RoutingCounts:
    num_layers, _, _, num_experts = choice_LDGE.shape
    return RoutingCounts(
        choice_LDGE=choice_LDGE,
        token_DG=choice_LDGE[0].sum(axis=-1),
        choice_LKE=choice_LDGE.sum(axis=(1, 2))[:, None],
        weight_LE=np.zeros((num_layers, num_experts)),
        num_choices=1,
    )


def test_a_block_is_the_mean_of_its_records_worked_by_hand() -> None:
    metrics = [
        record(1, [[0.5, 0.5, 0.0, 0.0]]),
        {"step": 1, "validation/loss": 3.0},
        record(2, [[1.0, 0.0, 0.0, 0.0]]),
        record(3, [[0.25, 0.25, 0.25, 0.25]]),
    ]
    series = log_series(metrics, top_k=1, num_blocks=2)
    assert series.step_B.tolist() == [1.5, 3.0]
    assert series.load_BLE.tolist() == [[[0.75, 0.25, 0.0, 0.0]], [[0.25] * 4]]
    assert series.dead_B.tolist() == [2, 0]
    assert series.entropy_BL.tolist() == [[1.5], [3.0]]
    assert series.loss_B.tolist() == [2.5, 1.0]
    assert series.balance_B.tolist() == [3.5, 5.0]
    # loads 3, 1, 0, 0 of 4: the deviation is sqrt((4 + 0 + 1 + 1) / 4) at a mean of 1
    np.testing.assert_allclose(series.variation_BL[:, 0], [np.sqrt(1.5), 0.0])
    np.testing.assert_allclose(series.chance_B, np.sqrt(3 / np.array([200.0, 100.0])))


def test_the_noise_of_even_routing_is_what_random_choices_show() -> None:
    source = np.random.default_rng(0)
    variation = []
    for _ in range(300):
        order = source.random((200, 16)).argsort(axis=1)[:, :2]
        load = np.bincount(order.ravel(), minlength=16)
        variation.append((load.std() / load.mean()) ** 2)
    metrics = [record(2, [[1 / 16] * 16])]
    chance = log_series(metrics, top_k=2).chance_B[0]  # one record: 100 tokens a step
    np.testing.assert_allclose(chance * np.sqrt(0.5), np.sqrt(np.mean(variation)), rtol=0.05)


def test_a_log_of_every_tenth_step_counts_a_steps_own_tokens() -> None:
    metrics = [record(step, [[0.5, 0.5]]) for step in (10, 20, 30)]
    series = log_series(metrics, top_k=1, num_blocks=3)
    np.testing.assert_allclose(series.chance_B, np.sqrt(1 / 100))


def test_a_dense_log_is_refused() -> None:
    with pytest.raises(DataError, match="no record has router/load_LE"):
        log_series([{"step": 1, "loss": 3.0}], top_k=2)


def test_blocks_of_recorded_steps_are_the_sums_of_their_steps(runs: Any) -> None:
    trace = recorded_routing(open_run(runs.sparse))
    by_step = count_steps(trace, num_groups=8)
    steps, counted = count_blocks(trace, num_blocks=3, num_groups=8)
    assert steps.tolist() == [15.0, 35.0, 55.0]
    for block, pair in zip(counted, ((10, 20), (30, 40), (50, 60)), strict=True):
        one, two = (by_step[step].choice_LDGE for step in pair)
        np.testing.assert_array_equal(block.choice_LDGE, one + two)


def test_blocks_need_steps(runs: Any) -> None:
    _, trace = traces_to_compare(open_run(runs.sparse))[0]
    with pytest.raises(DataError, match="its rows have no steps"):
        count_blocks(trace)


def test_domain_dependence_is_what_the_domain_explains_and_sees_none_in_noise() -> None:
    source = np.random.default_rng(1)
    even = source.multinomial(40, [0.25] * 4, size=(2, 3, 50)).astype(np.int64)
    found = domain_dependence(counts_of(even))
    direct = share_explained(even.sum(axis=2), is_corrected=False)
    np.testing.assert_allclose(found.estimate, direct)
    assert (found.low < 1e-3).all()
    assert (found.low <= found.high).all()
    leaning = even.copy()
    leaning[:, 1] = source.multinomial(40, [0.7, 0.1, 0.1, 0.1], size=(2, 50))
    clear = domain_dependence(counts_of(leaning))
    assert (clear.low > 0.05).all()
    assert (clear.low < clear.estimate).all()


def test_the_interval_of_domain_dependence_covers_the_truth() -> None:
    source = np.random.default_rng(2)
    share_DE = np.array([[0.4, 0.3, 0.2, 0.1], [0.25] * 4])
    both = share_DE.mean(axis=0)
    entropy = -(both * np.log(both)).sum()
    truth = (share_DE * np.log(share_DE / both)).sum() / 2 / entropy
    covered = 0
    for seed in range(60):
        table = np.stack([source.multinomial(20, share, size=60) for share in share_DE])[None]
        found = domain_dependence(counts_of(table.astype(np.int64)), num_samples=300, seed=seed)
        covered += bool(found.low[0] <= truth <= found.high[0])
    assert covered >= 52, "of 60; 95 % are 57"


def test_saturation_over_checkpoints_is_a_loop_over_tokens(runs: Any) -> None:
    traces = traces_to_compare(open_run(runs.sparse))
    found = saturation_over(traces)
    assert (found.steps, found.last_step) == ((20,), 60)
    one, two = (join_rows(list(trace.batches(("expert",)))) for _, trace in traces)
    for layer in range(2):
        shared = [
            len(set(a[layer]) & set(b[layer])) / 2
            for a, b in zip(one.expert_TLK.tolist(), two.expert_TLK.tolist(), strict=True)
        ]
        assert found.overlap[0].estimate[layer] == pytest.approx(np.mean(shared))
    with_itself = overlap_of(traces[0][1], traces[0][1])
    assert with_itself.shared_CLH[..., :2].sum() == 0, "every token shares both with itself"
    assert with_itself.shared_CLH.sum() == 2 * traces[0][1].info.num_tokens


def test_saturation_needs_two_checkpoints(runs: Any) -> None:
    with pytest.raises(DataError, match="traces: got 1"):
        saturation_over(traces_to_compare(open_run(runs.sparse))[:1])
