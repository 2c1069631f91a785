"""Counts of routing against loops, and what must not change them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_trace import random_batch, rows

from analysis.adding import total
from analysis.routing_counts import RoutingCounts, count_routing, group_of_document
from moe.errors import DataError
from moe.trace.batch import TraceBatch, slice_rows


def count(batch: TraceBatch, **how: int) -> RoutingCounts:
    return count_routing(batch, **{"num_experts": 8, "num_domains": 3, "num_groups": 5} | how)


def assert_same(one: RoutingCounts, two: RoutingCounts) -> None:
    np.testing.assert_array_equal(one.choice_LDGE, two.choice_LDGE)
    np.testing.assert_array_equal(one.token_DG, two.token_DG)
    np.testing.assert_array_equal(one.choice_LKE, two.choice_LKE)
    np.testing.assert_allclose(one.weight_LE, two.weight_LE, rtol=1e-12)


@pytest.mark.parametrize("num_choices", [1, 2, 3])
def test_counts_equal_a_loop_over_tokens_layers_and_choices(num_choices: int) -> None:
    batch = random_batch(0, choices=3)
    counts = count(batch, num_choices=num_choices)
    choice_LDGE = np.zeros((3, 3, 5, 8), int)
    token_DG = np.zeros((3, 5), int)
    choice_LKE = np.zeros((3, 3, 8), int)
    weight_LE = np.zeros((3, 8))
    for t in range(200):
        group = group_of_document(batch.document_T[t : t + 1], num_groups=5)[0]
        token_DG[batch.domain_T[t], group] += 1
        for layer in range(3):
            for k in range(3):
                expert = batch.expert_TLK[t, layer, k]
                choice_LKE[layer, k, expert] += 1
                weight_LE[layer, expert] += batch.weight_TLK[t, layer, k]
                if k < num_choices:
                    choice_LDGE[layer, batch.domain_T[t], group, expert] += 1
    np.testing.assert_array_equal(counts.choice_LDGE, choice_LDGE)
    np.testing.assert_array_equal(counts.token_DG, token_DG)
    np.testing.assert_array_equal(counts.choice_LKE, choice_LKE)
    np.testing.assert_allclose(counts.weight_LE, weight_LE)
    np.testing.assert_array_equal(counts.load_LE, choice_LDGE.sum((1, 2)))
    np.testing.assert_array_equal(counts.load_LDE, choice_LDGE.sum(2))
    np.testing.assert_array_equal(counts.token_D, np.bincount(batch.domain_T, minlength=3))
    assert counts.num_tokens == 200


def test_a_small_case_by_hand() -> None:
    batch = TraceBatch(
        token_T=np.array([7, 8, 9], np.int32),
        position_T=np.array([0, 1, 0], np.int32),
        document_T=np.array([4, 4, 5]),
        domain_T=np.array([1, 1, 0], np.int16),
        expert_TLK=np.array([[[0, 2]], [[2, 1]], [[2, 0]]], np.int16),
        weight_TLK=np.array([[[0.75, 0.25]], [[0.5, 0.5]], [[1.0, 1.0]]], np.float32),
    )
    counts = count_routing(batch, num_experts=4, num_domains=2, num_groups=1)
    assert counts.load_LE.tolist() == [[2, 1, 3, 0]]
    assert counts.load_LDE.tolist() == [[[1, 0, 1, 0], [1, 1, 2, 0]]]
    assert counts.choice_LKE.tolist() == [[[1, 0, 2, 0], [1, 1, 1, 0]]]
    assert counts.weight_LE.tolist() == [[1.75, 0.5, 1.75, 0.0]]
    assert counts.token_DG.tolist() == [[1], [2]]


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 99),
    tokens=st.integers(1, 80),
    cuts=st.lists(st.integers(0, 80), max_size=4),
)
def test_any_split_into_batches_adds_to_the_whole(seed: int, tokens: int, cuts: list[int]) -> None:
    batch = random_batch(seed, tokens=tokens)
    edges = sorted({0, tokens, *(min(c, tokens) for c in cuts)})
    parts = [count(slice_rows(batch, *pair)) for pair in itertools.pairwise(edges)]
    assert_same(total(parts), count(batch))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 99))
def test_the_order_of_tokens_does_not_matter_and_renumbering_experts_renumbers_counts(
    seed: int,
) -> None:
    batch = random_batch(seed, tokens=60)
    source = np.random.default_rng(seed)
    assert_same(count(rows(batch, source.permutation(60))), count(batch))
    new_number = source.permutation(8)
    renumbered = count(batch._replace(expert_TLK=new_number[batch.expert_TLK]))
    np.testing.assert_array_equal(renumbered.load_LE[:, new_number], count(batch).load_LE)


@pytest.mark.parametrize("tokens", [0, 1])
def test_none_and_one_token(tokens: int) -> None:
    counts = count(slice_rows(random_batch(0), 0, tokens))
    assert counts.num_tokens == tokens
    assert counts.load_LE.sum(axis=1).tolist() == [2 * tokens] * 3


def test_one_expert_and_all_experts() -> None:
    counts = count(random_batch(0, experts=1, choices=1), num_experts=1)
    assert counts.load_LE.tolist() == [[200]] * 3
    counts = count(random_batch(0, experts=8, choices=8))
    assert (counts.load_LE == 200).all()


def test_a_document_is_in_one_group_and_groups_are_even() -> None:
    for stride in (1, 7, 8, 64, 512, 4096):  # every document, or every eighth, ... of a domain
        group = group_of_document(np.arange(5000) * stride, num_groups=500)
        assert group.min() >= 0
        assert group.max() < 500
        assert np.bincount(group, minlength=500).max() <= 2 * 10
    few = group_of_document(np.arange(100), num_groups=512)
    assert len(np.unique(few)) >= 95, "few documents nearly all have a group of their own"


def test_numbers_that_would_be_counted_as_something_else_are_refused() -> None:
    batch = random_batch(0)
    with pytest.raises(DataError, match="expert: the trace holds 7; it must be 0 to 6"):
        count(batch, num_experts=7)
    with pytest.raises(DataError, match="domain: the trace holds 2; it must be 0 to 1"):
        count(batch, num_domains=2)
    negative = batch.expert_TLK.copy()
    negative[3, 1, 0] = -1
    with pytest.raises(DataError, match="expert: the trace holds -1"):
        count(batch._replace(expert_TLK=negative))
    with pytest.raises(ValueError, match="num_choices: got 3"):
        count(batch, num_choices=3)
    with pytest.raises(ValueError, match="must be 1 to 1, the number of experts"):
        count(batch, num_experts=1)
