"""Margins against loops, and their sums, histograms and intervals."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_trace import random_batch, rows

from analysis.adding import total
from analysis.margins import (
    MARGIN_EDGES,
    MarginCounts,
    alone_fraction,
    count_margins,
    margins,
    mean_margin,
    mean_masked_fraction,
    quantile_of_margins,
)
from analysis.routing_counts import group_of_document
from analysis.sparsemixer_mask import masked_fraction, num_survivors
from moe.errors import DataError
from moe.trace.batch import TraceBatch, slice_rows


def count(batch: TraceBatch, threshold: float | None = 0.05) -> MarginCounts:
    return count_margins(batch, num_experts=8, num_domains=3, num_groups=5, threshold=threshold)


def assert_same(one: MarginCounts, two: MarginCounts) -> None:
    for name in ("histogram_LKH", "token_C", "survivor_CLK", "alone_CLK"):
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name))
    np.testing.assert_allclose(one.sum_CLK, two.sum_CLK, rtol=1e-9)


def test_margins_by_hand() -> None:
    logit = np.array([1.0, 4.0, 2.5, -3.0], np.float32)
    assert margins(logit, top_k=1).tolist() == [1.5]
    assert margins(logit, top_k=3).tolist() == [1.5, 1.5, 4.0]
    assert margins(np.array([2.0, 2.0, 2.0]), top_k=2).tolist() == [0.0, 0.0]


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6), top_k=st.integers(1, 5))
def test_margins_equal_sorting_and_are_the_log_odds_of_a_softmax(seed: int, top_k: int) -> None:
    logit = np.random.default_rng(seed).normal(size=(4, 3, 6)).astype(np.float32)
    found = margins(logit, top_k=top_k)
    assert found.shape == (4, 3, top_k)
    descending = -np.sort(-logit.astype(np.float64), axis=-1)
    np.testing.assert_allclose(found, (descending[..., :-1] - descending[..., 1:])[..., :top_k])
    probability = np.exp(descending) / np.exp(descending).sum(axis=-1, keepdims=True)
    odds = probability[..., :top_k] / probability[..., 1 : top_k + 1]
    np.testing.assert_allclose(np.exp(found), odds)
    order = np.random.default_rng(seed).permutation(6)
    np.testing.assert_array_equal(margins(logit[..., order], top_k=top_k), found)


def test_counts_equal_a_loop_over_tokens() -> None:
    batch = random_batch(0)
    counts = count(batch)
    sums, survivors, alone = np.zeros((3, 15, 3, 2))
    token_C = np.zeros(15, int)
    histogram = np.zeros((3, 2, len(MARGIN_EDGES) - 1), int)
    for t in range(200):
        group = group_of_document(batch.document_T[t : t + 1], num_groups=5)[0]
        cluster = batch.domain_T[t] * 5 + group
        margin = margins(batch.logit_TLE[t], top_k=2)
        left = num_survivors(batch.logit_TLE[t], batch.expert_TLK[t], threshold=0.05)
        token_C[cluster] += 1
        sums[cluster] += margin
        survivors[cluster] += left
        alone[cluster] += left == 1
        for layer in range(3):
            for k in range(2):
                (place,) = np.flatnonzero(
                    (MARGIN_EDGES[:-1] <= margin[layer, k]) & (margin[layer, k] < MARGIN_EDGES[1:])
                )
                histogram[layer, k, place] += 1
    np.testing.assert_array_equal(counts.token_C, token_C)
    np.testing.assert_allclose(counts.sum_CLK, sums)
    np.testing.assert_array_equal(counts.survivor_CLK, survivors)
    np.testing.assert_array_equal(counts.alone_CLK, alone)
    np.testing.assert_array_equal(counts.histogram_LKH, histogram)


def test_parts_add_and_order_does_not_matter_over_pieces_too() -> None:
    batch = random_batch(1, tokens=20_000)
    whole = count(batch)
    cuts = [0, 1, 8191, 8193, 20_000]
    parts = [count(slice_rows(batch, *pair)) for pair in itertools.pairwise(cuts)]
    assert_same(total(parts), whole)
    assert_same(count(rows(batch, np.random.default_rng(0).permutation(20_000))), whole)
    assert count(slice_rows(batch, 0, 0)).token_C.sum() == 0


def test_means_are_those_of_the_tokens_and_intervals_hold_them() -> None:
    batch = random_batch(2, tokens=3000)
    counts = count(batch)
    exact = margins(batch.logit_TLE, top_k=2).mean(axis=0)
    interval = mean_margin(counts)
    np.testing.assert_allclose(interval.estimate, exact)
    assert (interval.low < exact).all()
    assert (exact < interval.high).all()
    fraction = masked_fraction(batch.logit_TLE, batch.expert_TLK, threshold=0.05)
    np.testing.assert_allclose(mean_masked_fraction(counts).estimate, fraction.mean(axis=0))
    left = num_survivors(batch.logit_TLE, batch.expert_TLK, threshold=0.05)
    np.testing.assert_allclose(alone_fraction(counts).estimate, (left == 1).mean(axis=0))


def test_quantiles_come_from_the_histogram_to_a_bins_width() -> None:
    batch = random_batch(0, tokens=5000)
    counts = count(batch, threshold=None)
    exact = margins(batch.logit_TLE, top_k=2)
    for quantile in (0.05, 0.5, 0.9):
        found = quantile_of_margins(counts.histogram_LKH, quantile)
        expected = np.quantile(exact, quantile, axis=0)
        assert (np.abs(found - expected) <= 0.14 * expected + 0.01).all()
    assert quantile_of_margins(counts.histogram_LKH, 0.0).max() == 0.0
    assert np.isnan(quantile_of_margins(np.zeros(len(MARGIN_EDGES) - 1, int), 0.5))
    with pytest.raises(ValueError, match=r"quantile: got 1\.5"):
        quantile_of_margins(counts.histogram_LKH, 1.5)


def test_huge_margins_are_counted_in_the_last_bin() -> None:
    batch = random_batch(0, tokens=4)
    logit = np.zeros((4, 3, 8), np.float32)
    logit[..., 0] = 1e30
    counts = count(batch._replace(logit_TLE=logit), threshold=None)
    assert counts.histogram_LKH[:, 0, -1].tolist() == [4, 4, 4]
    assert counts.histogram_LKH[:, 1, 0].tolist() == [4, 4, 4]
    assert quantile_of_margins(counts.histogram_LKH, 0.5)[0, 0] == 20.0


def test_what_has_no_margin_is_refused() -> None:
    batch = random_batch(0, with_logits=False)
    with pytest.raises(DataError, match="record it again with logits=true"):
        count(batch)
    with pytest.raises(ValueError, match="needs an expert left out"):
        margins(np.zeros((2, 3)), top_k=3)
    with pytest.raises(ValueError, match=r"pass threshold="):
        alone_fraction(count(random_batch(0), threshold=None))
