"""Balance of a trace's counts: the numbers of analysis.utilisation, with intervals that hold."""

from __future__ import annotations

import numpy as np
import pytest
from synthetic_trace import random_batch

from analysis.balance import (
    DEVIATIONS,
    balance,
    clusters_of,
    compare_balance,
    domain_lift,
    domain_share,
    of_domain,
)
from analysis.routing_counts import RoutingCounts, count_routing
from analysis.specialisation import lift
from analysis.utilisation import diversity, load_ratio, max_violation
from moe.trace.batch import TraceBatch


def count(batch: TraceBatch, experts: int = 8, domains: int = 3) -> RoutingCounts:
    return count_routing(batch, num_experts=experts, num_domains=domains, num_groups=64)


def test_max_violation_by_hand() -> None:
    assert max_violation([4, 2, 2, 0]) == 1.0
    assert max_violation([3, 3]) == 0.0
    assert max_violation([0, 0, 9]) == 2.0
    assert np.isnan(max_violation([0, 0]))


def test_numbers_are_those_of_all_tokens_and_lie_in_their_intervals() -> None:
    counts = count(random_batch(0, tokens=4000))
    found = balance(counts, num_samples=300)
    np.testing.assert_allclose(found.ratio.estimate, load_ratio(counts.load_LE))
    assert (found.ratio.low < found.ratio.estimate).all()
    assert (found.ratio.estimate < found.ratio.high).all()
    np.testing.assert_allclose(found.diversity.estimate, diversity(counts.load_LE))
    assert (found.diversity.low <= found.diversity.high).all()
    assert (found.diversity.high <= 1.0).all()
    for name, function in DEVIATIONS.items():
        interval = found.deviation[name]
        np.testing.assert_allclose(interval.estimate, function(counts.load_LE))
        assert (interval.low >= 0).all()
        assert (interval.low < interval.high).all()
    assert not found.dead_LE.any()


def test_even_load_is_not_called_uneven() -> None:
    source = np.random.default_rng(0)
    batch = random_batch(0, tokens=3000)
    drawn = np.argsort(source.random((3000, 3, 8)), axis=-1)[:, :, :2]
    found = balance(count(batch._replace(expert_TLK=drawn)), num_samples=300)
    for interval in found.deviation.values():
        assert (interval.estimate > 0).all(), "noise alone deviates"
        assert (interval.low < 0.3 * interval.estimate).all()
    assert (found.diversity.high > 0.9999).all()


def test_clusters_are_the_groups_of_each_domain() -> None:
    counts = count(random_batch(0))
    choice_CLE, stratum_C = clusters_of(counts)
    assert choice_CLE.shape == (3 * 64, 3, 8)
    for domain in range(3):
        np.testing.assert_array_equal(
            choice_CLE[stratum_C == domain].sum(axis=0), counts.load_LDE[:, domain]
        )
        only = of_domain(counts, domain)
        np.testing.assert_array_equal(only.load_LE, counts.load_LDE[:, domain])
        assert only.num_tokens == counts.token_D[domain]
    with pytest.raises(ValueError, match="domain: got 3"):
        of_domain(counts, 3)


def test_a_more_even_router_is_told_from_the_same_one() -> None:
    one = random_batch(0, tokens=4000)
    drawn = np.argsort(np.random.default_rng(1).random((4000, 3, 8)), axis=-1)[:, :, :2]
    even = one._replace(expert_TLK=drawn)
    for is_paired in (True, False):
        change = compare_balance(count(one), count(even), is_paired=is_paired, num_samples=300)
        for name, interval in change.items():
            expected = DEVIATIONS[name](count(even).load_LE) - DEVIATIONS[name](count(one).load_LE)
            np.testing.assert_allclose(interval.estimate, expected)
            assert (interval.high < 0).all()
    same = compare_balance(count(one), count(one), is_paired=True, num_samples=300)
    for interval in same.values():
        assert (interval.low == 0).all()
        assert (interval.high == 0).all()
    elsewhere = random_batch(7, tokens=4000)
    with pytest.raises(ValueError, match="is_paired=False"):
        compare_balance(count(one), count(elsewhere), is_paired=True)
    with pytest.raises(ValueError, match="3 and 2 layers"):
        compare_balance(count(one), count(random_batch(0, layers=2)), is_paired=False)


def test_shares_of_a_domain_are_those_of_its_tokens() -> None:
    batch = random_batch(0, tokens=3000)
    counts = count(batch, domains=4)
    found = domain_share(counts, num_samples=300)
    assert found.estimate.shape == (4, 3, 8)
    for domain in range(3):
        chosen = batch.expert_TLK[batch.domain_T == domain]
        for expert in range(8):
            share = (chosen == expert).any(axis=2).mean(axis=0)
            np.testing.assert_allclose(found.estimate[domain, :, expert], share)
    assert ((found.low[:3] <= found.estimate[:3]) & (found.estimate[:3] <= found.high[:3])).all()
    assert np.isnan(found.estimate[3]).all(), "a domain without tokens has no shares"
    assert np.isnan(found.low[3]).all()


def test_lift_of_a_domain_is_told_from_none() -> None:
    batch = random_batch(0, tokens=4000)
    counts = count(batch, experts=9, domains=4)
    found = domain_lift(counts, num_samples=300)
    np.testing.assert_allclose(found.estimate, lift(counts.load_LDE))
    assert np.isnan(found.estimate[:, 3]).all()
    assert np.isnan(found.low[:, :, 8]).all(), "a dead expert has none"
    is_clear = (found.low > 1) | (found.high < 1)
    assert is_clear[:, :3, :8].mean() > 0.5, "the synthetic domains have tastes of their own"
    # the same tokens with their documents' domains drawn anew: nothing to find
    drawn = np.random.default_rng(0).integers(3, size=batch.document_T.max() + 1)
    by_chance = count(batch._replace(domain_T=drawn[batch.document_T]))
    found = domain_lift(by_chance, num_samples=300)
    assert ((found.low > 1) | (found.high < 1)).mean() < 0.15


def test_dead_experts_one_expert_and_one_token() -> None:
    batch = random_batch(0)
    found = balance(count(batch, experts=10), num_samples=50)
    assert found.dead_LE[:, 8:].all()
    assert (found.ratio.high[:, 8:] == 0).all(), "no sample of these tokens knows of them"
    one = balance(count(random_batch(0, experts=1, choices=1), experts=1), num_samples=50)
    assert (one.ratio.estimate == 1).all()
    assert (one.diversity.low == 1).all()
    single = balance(count(random_batch(0, tokens=1)), num_samples=50)
    assert np.isnan(single.ratio.low).all(), "one document has no interval"
    assert single.ratio.num_clusters == 1
