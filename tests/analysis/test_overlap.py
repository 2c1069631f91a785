"""Overlap of two checkpoints against loops over tokens, and at its ends."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from synthetic_trace import random_batch, rows

from analysis.adding import total
from analysis.overlap import (
    OverlapCounts,
    best_renumbering,
    chance_saturation,
    count_overlap,
    jaccard,
    overlap_interval,
    saturation,
)
from moe.errors import DataError
from moe.trace.batch import TraceBatch, slice_rows


def count(one: TraceBatch, two: TraceBatch, **how: object) -> OverlapCounts:
    given = {"num_experts": 8, "num_domains": 3, "num_groups": 5} | how
    return count_overlap(one, two, **given)  # type: ignore[arg-type]


def other_choice(batch: TraceBatch, seed: int, noise: float = 1.0) -> TraceBatch:
    """The same tokens by a checkpoint whose logits differ."""
    top_k = batch.expert_TLK.shape[2]
    change = np.random.default_rng(seed).normal(size=batch.logit_TLE.shape, scale=noise)
    order = np.argsort(-(batch.logit_TLE + change), axis=-1)
    return batch._replace(expert_TLK=order[:, :, :top_k].astype(np.int16))


@pytest.mark.parametrize("choices", [1, 2, 3, 8])
def test_counts_and_metrics_equal_sets_token_by_token(choices: int) -> None:
    one = random_batch(0, choices=choices)
    two = other_choice(one, 1)
    counts = count(one, two)
    shared, union, first = np.zeros((3, 3))
    joint = np.zeros((3, 8, 8), int)
    for t in range(200):
        for layer in range(3):
            a, b = set(one.expert_TLK[t, layer]), set(two.expert_TLK[t, layer])
            shared[layer] += len(a & b) / choices
            union[layer] += len(a & b) / len(a | b)
            first[layer] += one.expert_TLK[t, layer, 0] == two.expert_TLK[t, layer, 0]
            for i in a:
                for j in b:
                    joint[layer, i, j] += 1
    shared_LH = counts.shared_CLH.sum(axis=0)
    np.testing.assert_allclose(saturation(shared_LH), shared / 200)
    np.testing.assert_allclose(jaccard(shared_LH), union / 200)
    np.testing.assert_array_equal(counts.same_first_CL.sum(axis=0), first)
    np.testing.assert_array_equal(counts.joint_LEE, joint)
    assert counts.token_C.sum() == 200
    assert (counts.shared_CLH.sum(axis=2) == counts.token_C[:, None]).all()


def test_hand_worked_overlap() -> None:
    # of four tokens with two choices one shares none, two share one, one shares both
    assert saturation([1, 2, 1]) == pytest.approx((0 + 0.5 + 0.5 + 1) / 4)
    assert jaccard([1, 2, 1]) == pytest.approx((0 + 1 / 3 + 1 / 3 + 1) / 4)
    # both choose expert 0 for half and 1 for half of their choices: 2 * (1/4 + 1/4)
    assert chance_saturation(np.full((2, 2), 5), top_k=2) == pytest.approx(1.0)
    assert np.isnan(saturation([0, 0, 0]))


def test_the_same_checkpoint_is_saturated_and_unrelated_ones_are_at_chance() -> None:
    one = random_batch(0, tokens=20_000, layers=2)
    same = count(one, one)
    np.testing.assert_array_equal(saturation(same.shared_CLH.sum(0)), 1.0)
    np.testing.assert_array_equal(jaccard(same.shared_CLH.sum(0)), 1.0)
    mixed = one._replace(expert_TLK=np.random.default_rng(0).permutation(one.expert_TLK))
    unrelated = count(one, mixed)
    chance = chance_saturation(unrelated.joint_LEE, top_k=2)
    np.testing.assert_allclose(saturation(unrelated.shared_CLH.sum(0)), chance, atol=0.01)
    assert (chance >= 2 / 8).all()


def test_everything_is_shared_where_every_expert_is_chosen() -> None:
    one = random_batch(0, choices=8)
    counts = count(one, other_choice(one, 1))
    np.testing.assert_array_equal(jaccard(counts.shared_CLH.sum(0)), 1.0)
    assert (counts.same_first_CL.sum(0) < 200).all()


def test_parts_add_order_does_not_matter_and_renumbering_both_changes_nothing() -> None:
    one = random_batch(0)
    two = other_choice(one, 1)
    whole = count(one, two)
    parts = [count(slice_rows(one, a, a + 40), slice_rows(two, a, a + 40))
             for a in range(0, 200, 40)]  # fmt: skip
    order = np.random.default_rng(0).permutation(200)
    number = np.random.default_rng(1).permutation(8)
    both = [b._replace(expert_TLK=number[b.expert_TLK]) for b in (one, two)]
    for other in (total(parts), count(rows(one, order), rows(two, order)), count(*both)):
        np.testing.assert_array_equal(other.shared_CLH, whole.shared_CLH)
        np.testing.assert_array_equal(other.same_first_CL, whole.same_first_CL)


def test_a_renumbered_checkpoint_is_recognised() -> None:
    one = random_batch(0, tokens=2000)
    source = np.random.default_rng(0)
    hidden_LE = np.stack([source.permutation(8) for _ in range(3)])
    expert = np.stack([hidden_LE[layer][one.expert_TLK[:, layer]] for layer in range(3)], axis=1)
    two = one._replace(expert_TLK=expert)
    counts = count(one, two)
    assert (saturation(counts.shared_CLH.sum(0)) < 0.6).all()
    back_LE = best_renumbering(counts.joint_LEE)
    for layer in range(3):
        np.testing.assert_array_equal(back_LE[layer][hidden_LE[layer]], np.arange(8))
    matched = count(one, two, new_number_LE=back_LE)
    np.testing.assert_array_equal(saturation(matched.shared_CLH.sum(0)), 1.0)
    assert (matched.same_first_CL.sum(0) == 2000).all()


def test_no_renumbering_overlaps_more_than_the_best() -> None:
    one = random_batch(0, experts=5)
    two = other_choice(one, 1, noise=3.0)
    joint = count(one, two, num_experts=5).joint_LEE
    best_LE = best_renumbering(joint)
    for layer in range(3):

        def overlap(numbers, layer=layer):
            return sum(joint[layer, numbers[j], j] for j in range(5))

        assert overlap(best_LE[layer]) == max(map(overlap, permutations(range(5))))
    matched = count(one, two, num_experts=5, new_number_LE=best_LE)
    assert (
        saturation(matched.shared_CLH.sum(0)) >= saturation(count(one, two).shared_CLH.sum(0))
    ).all()


def test_intervals_are_about_the_estimate_and_narrow_with_documents() -> None:
    widths = []
    for tokens in (1000, 16_000):
        one = random_batch(0, tokens=tokens)
        counts = count(one, other_choice(one, 1), num_groups=200)
        interval = overlap_interval(counts, jaccard)
        assert ((interval.low < interval.estimate) & (interval.estimate < interval.high)).all()
        np.testing.assert_allclose(interval.estimate, jaccard(counts.shared_CLH.sum(0)))
        widths.append((interval.high - interval.low).mean())
    assert widths[1] == pytest.approx(widths[0] / 4, rel=0.35)


def test_what_cannot_be_compared_is_refused() -> None:
    one = random_batch(0)
    with pytest.raises(DataError, match="row 0 has token"):
        count(one, one._replace(token_T=one.token_T + 1))
    with pytest.raises(DataError, match="a batch of 200 tokens was given with one of 10"):
        count(one, slice_rows(one, 0, 10))
    with pytest.raises(ValueError, match="as many sparse layers and choices"):
        count(one, one._replace(expert_TLK=one.expert_TLK[:, :, :1]))
    with pytest.raises(ValueError, match=r"joint: got shape \(8, 8\)"):
        best_renumbering(np.zeros((8, 8)))
