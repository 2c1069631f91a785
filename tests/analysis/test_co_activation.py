"""Pairs of experts against loops, and chance against simulations of it."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_trace import random_batch, rows

from analysis.adding import total
from analysis.co_activation import (
    chance_pairs,
    co_activation,
    count_pairs,
    normalised_co_activation,
    partner_preference,
)
from moe.errors import DataError
from moe.trace.batch import slice_rows


@pytest.mark.parametrize("choices", [1, 2, 3, 8])
def test_pairs_equal_a_loop_over_tokens(choices: int) -> None:
    batch = random_batch(0, choices=choices)
    counts = count_pairs(batch, num_experts=8)
    pair_LEE = np.zeros((3, 8, 8), int)
    for token_LK in batch.expert_TLK:
        for layer, chosen in enumerate(token_LK):
            for i in chosen:
                for j in chosen:
                    pair_LEE[layer, i, j] += i != j
    np.testing.assert_array_equal(counts.pair_LEE, pair_LEE)
    np.testing.assert_array_equal(counts.choice_LE.sum(axis=1), 200 * choices)
    share = co_activation(counts.pair_LEE, counts.choice_LE)
    for layer in range(3):
        for i in range(8):
            tokens = [set(t[layer]) for t in batch.expert_TLK if i in t[layer]]
            for j in set(range(8)) - {i}:
                expected = sum(j in t for t in tokens) / len(tokens)
                assert share[layer, i, j] == pytest.approx(expected)
    np.testing.assert_allclose(np.nansum(share, axis=-1), choices - 1)
    assert np.isnan(share[:, range(8), range(8)]).all()


def test_parts_add_and_the_order_of_tokens_does_not_matter() -> None:
    batch = random_batch(1)
    whole = count_pairs(batch, num_experts=8)
    parts = [count_pairs(slice_rows(batch, a, a + 50), num_experts=8) for a in range(0, 200, 50)]
    np.testing.assert_array_equal(total(parts).pair_LEE, whole.pair_LEE)
    mixed = rows(batch, np.random.default_rng(0).permutation(200))
    np.testing.assert_array_equal(count_pairs(mixed, num_experts=8).pair_LEE, whole.pair_LEE)


def test_a_table_worked_by_hand() -> None:
    # margins 30, 20, 20, 10 of an even draw of two of weights: here from w = (3, 2, 2, 1)
    weight = np.array([3.0, 2.0, 2.0, 1.0])
    even = np.outer(weight, weight) * (1 - np.eye(4))
    np.testing.assert_allclose(chance_pairs(even), even, rtol=1e-8)
    np.testing.assert_allclose(partner_preference(even), 0.0, atol=1e-9)
    observed = even + 2 * np.array(
        [[0, 1, -1, 0], [1, 0, 0, -1], [-1, 0, 0, 1], [0, -1, 1, 0]]
    )  # the same margins
    ratio = normalised_co_activation(observed)
    assert ratio[0, 1] == pytest.approx(8 / 6)
    assert ratio[1, 3] == pytest.approx(0 / 2)
    assert ratio[1, 2] == pytest.approx(1.0)
    # unordered pairs 8, 4, 3, 4, 0, 4 against 6, 6, 3, 4, 2, 2 of 23
    expected = 8 * math.log(8 / 6) + 4 * math.log(4 / 6) + 4 * math.log(4 / 2)
    assert partner_preference(observed) == pytest.approx(expected / 23)


def test_at_balanced_load_chance_is_even_over_all_pairs() -> None:
    # three perfect partnerships of six experts: 1 in 5 by chance, so 5 times chance
    pair = np.kron(np.eye(3), [[0, 1], [1, 0]]) * 40
    np.testing.assert_allclose(chance_pairs(pair), 8.0 * (1 - np.eye(6)), rtol=1e-8)
    assert normalised_co_activation(pair)[0, 1] == pytest.approx(5.0)
    assert normalised_co_activation(pair)[0, 2] == 0.0
    assert partner_preference(pair) == pytest.approx(math.log(5))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_chance_keeps_the_margins_and_follows_the_experts(seed: int) -> None:
    source = np.random.default_rng(seed)
    size = int(source.integers(2, 9))
    pair = np.triu(source.integers(0, 9, size=(size, size)) ** 2, 1)
    pair = pair + pair.T
    chance = chance_pairs(pair)
    np.testing.assert_allclose(chance.sum(axis=1), pair.sum(axis=1), rtol=1e-7)
    assert (np.diagonal(chance) == 0).all()
    np.testing.assert_allclose(chance, chance.T)
    order = source.permutation(size)
    np.testing.assert_allclose(chance_pairs(pair[order][:, order]), chance[order][:, order])
    value = partner_preference(pair)
    assert np.isnan(value) if pair.sum() == 0 else value >= -1e-9


def test_experts_drawn_by_load_alone_are_at_chance() -> None:
    # the Gumbel trick draws two experts without replacement by their weights
    source = np.random.default_rng(0)
    weight = np.log([0.4, 0.2, 0.15, 0.1, 0.1, 0.05])
    drawn = np.argsort(-(weight + source.gumbel(size=(100_000, 6))), axis=1)[:, :2]
    batch = random_batch(0, tokens=100_000, layers=1, experts=6)
    batch = batch._replace(expert_TLK=drawn[:, None, :])
    ratio = normalised_co_activation(count_pairs(batch, num_experts=6).pair_LEE)[0]
    off = ~np.eye(6, dtype=bool)
    # drawing one after the other is near, and not exactly, quasi-independent
    np.testing.assert_allclose(ratio[off], 1.0, atol=0.12)
    load = batch.expert_TLK.reshape(-1)
    share = np.bincount(load, minlength=6) / len(load)
    naive = count_pairs(batch, num_experts=6).pair_LEE[0] / (2e5 * np.outer(share, share))
    assert np.abs(naive[off] - 1).max() > 0.4, "products of loads are no chance level"


def test_an_expert_that_every_token_has_is_at_chance_with_all() -> None:
    pair = np.zeros((4, 4))
    pair[0, 1:] = pair[1:, 0] = [5, 3, 2]
    ratio = normalised_co_activation(pair)
    np.testing.assert_allclose(ratio[0, 1:], 1.0)
    assert np.isnan(ratio[1, 2]), "the other pairs cannot occur"
    assert partner_preference(pair) == pytest.approx(0.0)


def test_dead_experts_all_experts_and_single_choices() -> None:
    pair = np.zeros((3, 3))
    pair[0, 2] = pair[2, 0] = 7
    ratio = normalised_co_activation(pair)
    assert ratio[0, 2] == 1.0
    assert np.isnan(ratio[1]).all()
    whole = count_pairs(random_batch(0, choices=8), num_experts=8)
    np.testing.assert_allclose(normalised_co_activation(whole.pair_LEE)[0][0, 1:], 1.0)
    single = count_pairs(random_batch(0, choices=1), num_experts=8)
    assert np.isnan(partner_preference(single.pair_LEE)).all()
    assert np.isnan(normalised_co_activation(single.pair_LEE)).all()
    one = count_pairs(random_batch(0, choices=1, experts=1), num_experts=1)
    assert np.isnan(normalised_co_activation(one.pair_LEE)).all()


def test_what_is_no_table_of_pairs_is_refused() -> None:
    for bad in (np.ones((2, 2)), [[0, 1], [2, 0]], np.zeros(4), np.zeros((2, 3))):
        with pytest.raises(ValueError, match="pair: "):
            chance_pairs(bad)
    with pytest.raises(DataError, match="expert"):
        count_pairs(random_batch(0), num_experts=4)
