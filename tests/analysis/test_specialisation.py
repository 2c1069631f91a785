"""Specialisation by loops over tokens, by hand, and at its ends."""

from __future__ import annotations

import math

import numpy as np
import pytest
from synthetic_trace import random_batch

from analysis.information import entropy, mutual_information
from analysis.key_counts import KeyCounts, count_by_key
from analysis.specialisation import focus, lift, share_explained, share_of_key, top_keys

# 10 tokens of key 0, 5 of key 1, none of key 2; experts 0, 1 and a dead one, top 1
CHOICE_XE = np.array([[8, 2, 0], [1, 4, 0], [0, 0, 0]])
TOKEN_X = np.array([10, 5, 0])


def by_domain(seed: int, choices: int = 2) -> tuple[KeyCounts, np.ndarray, np.ndarray]:
    batch = random_batch(seed)
    counts = count_by_key(
        batch.domain_T, batch.expert_TLK, num_keys=3, num_experts=8, num_choices=choices
    )
    return counts, batch.domain_T, batch.expert_TLK[:, :, :choices]


def test_hand_worked_shares_lift_and_focus() -> None:
    share = share_of_key(CHOICE_XE, TOKEN_X)
    np.testing.assert_allclose(share[:2], [[0.8, 0.2, 0.0], [0.2, 0.8, 0.0]])
    assert np.isnan(share[2]).all(), "a key without tokens has no share"
    # expert 0 has 9 of 15: 0.8 / 0.6; expert 1 has 6 of 15: 0.2 / 0.4
    np.testing.assert_allclose(lift(CHOICE_XE)[:2, :2], [[4 / 3, 0.5], [1 / 3, 2.0]])
    assert np.isnan(lift(CHOICE_XE)[:, 2]).all(), "a dead expert has no lift"
    assert np.isnan(lift(CHOICE_XE)[2]).all()
    focus_E = focus(CHOICE_XE)
    assert focus_E[0] == pytest.approx(8 / 9 * math.log(4 / 3) + 1 / 9 * math.log(1 / 3))
    assert focus_E[1] == pytest.approx(2 / 6 * math.log(1 / 2) + 4 / 6 * math.log(2))
    assert np.isnan(focus_E[2])


@pytest.mark.parametrize("seed", range(5))
def test_shares_and_lift_equal_loops_over_tokens(seed: int) -> None:
    counts, domain_T, expert_TLK = by_domain(seed)
    share = share_of_key(counts.choice_LXE, counts.token_X)
    ratio = lift(counts.choice_LXE)
    for layer in range(3):
        for domain in range(3):
            tokens = np.flatnonzero(domain_T == domain)
            for expert in range(8):
                hits = sum(expert in expert_TLK[t, layer] for t in tokens)
                everywhere = sum(expert in expert_TLK[t, layer] for t in range(200))
                assert share[layer, domain, expert] == pytest.approx(hits / len(tokens))
                expected = hits / len(tokens) / (everywhere / 200)
                assert ratio[layer, domain, expert] == pytest.approx(expected)
    np.testing.assert_allclose(share.sum(axis=-1), 2.0)


@pytest.mark.parametrize("seed", range(5))
def test_focus_weighted_by_load_is_the_mutual_information(seed: int) -> None:
    counts, _, _ = by_domain(seed)
    load_LE = counts.choice_LXE.sum(axis=1)
    mean_L = (focus(counts.choice_LXE) * load_LE).sum(-1) / load_LE.sum(-1)
    np.testing.assert_allclose(mean_L, mutual_information(counts.choice_LXE, is_corrected=False))


def test_explained_is_one_where_the_key_decides_and_zero_where_it_says_nothing() -> None:
    decides = np.array([[50, 0], [0, 50]])
    assert share_explained(decides, is_corrected=False) == pytest.approx(1.0)
    assert share_explained([[30, 60], [10, 20]], is_corrected=False) == pytest.approx(0, abs=1e-12)


def test_rare_keys_explain_nothing() -> None:
    source = np.random.default_rng(0)
    # a thousand token ids seen once, their expert by chance: each explains its expert perfectly
    once = np.eye(4)[source.integers(4, size=1000)]
    common = np.tile([25, 25, 25, 25], (3, 1))
    table = np.concatenate([common, once])
    assert share_explained(table, is_corrected=False) > 0.7
    enough = share_explained(table, min_count=50, is_corrected=False)
    assert enough == pytest.approx(0, abs=1e-12)


def test_renumbering_experts_renumbers_and_scaling_leaves_alone() -> None:
    counts, _, _ = by_domain(0)
    table = counts.choice_LXE
    order = np.random.default_rng(0).permutation(8)
    np.testing.assert_allclose(lift(table[..., order]), lift(table)[..., order])
    np.testing.assert_allclose(focus(table[..., order]), focus(table)[..., order])
    np.testing.assert_allclose(
        share_explained(table[..., order], is_corrected=False),
        share_explained(table * 3, is_corrected=False),
    )


def test_with_every_expert_chosen_there_is_no_specialisation() -> None:
    batch = random_batch(0, choices=8)
    counts = count_by_key(
        batch.domain_T, batch.expert_TLK, num_keys=3, num_experts=8, num_choices=8
    )
    np.testing.assert_allclose(share_of_key(counts.choice_LXE, counts.token_X), 1.0)
    np.testing.assert_allclose(lift(counts.choice_LXE), 1.0)
    np.testing.assert_allclose(focus(counts.choice_LXE), 0.0, atol=1e-12)


def test_the_top_keys_are_in_order_with_ties_by_tokens_then_number() -> None:
    #                 share of expert 0: 1.0 (2), 0.5 (4), 0.5 (8), 0.5 (8), 0 (9), 1.0 (1)
    choice_XE = [[2, 0], [2, 2], [4, 4], [4, 4], [0, 9], [1, 0]]
    token_X = [2, 4, 8, 8, 9, 1]
    top = top_keys(choice_XE, token_X, expert=0, num_keys=4)
    assert top.key_N.tolist() == [0, 5, 2, 3]
    assert top.share_N.tolist() == [1.0, 1.0, 0.5, 0.5]
    np.testing.assert_allclose(top.lift_N, np.array([1, 1, 0.5, 0.5]) / (13 / 32))
    assert top.token_N.tolist() == [2, 1, 8, 8]
    assert top_keys(choice_XE, token_X, expert=0, min_count=3).key_N.tolist() == [2, 3, 1]
    assert len(top_keys([[0, 3]], [3], expert=0).key_N) == 0
    with pytest.raises(ValueError, match="expert: got 2"):
        top_keys(choice_XE, token_X, expert=2)


def test_tables_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="token_X: got 2 keys; the table has 3"):
        share_of_key(CHOICE_XE, [1, 2])


def test_information_of_real_structure_is_found() -> None:
    batch = random_batch(3, tokens=20_000, vocab=20)
    counts = count_by_key(batch.token_T, batch.expert_TLK, num_keys=20, num_experts=8)
    value = share_explained(counts.choice_LXE, min_count=50)
    assert (value > 0.05).all()
    shuffled = np.random.default_rng(0).permutation(batch.token_T)
    chance = count_by_key(shuffled, batch.expert_TLK, num_keys=20, num_experts=8)
    assert (share_explained(chance.choice_LXE, min_count=50) < 0.005).all()
    assert (entropy(counts.choice_LXE.sum(axis=1)) <= math.log(8)).all()
