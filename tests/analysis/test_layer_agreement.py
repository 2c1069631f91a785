"""First choices of two layers: counted as a loop does, and compared whatever their numbering."""

from __future__ import annotations

import numpy as np
import pytest
from synthetic_trace import random_batch, rows

from analysis.adding import total
from analysis.layer_agreement import count_layer_pairs, layer_agreement
from moe.trace.batch import TraceBatch, slice_rows


def with_layers(first_TL: np.ndarray) -> TraceBatch:
    batch = random_batch(0, tokens=len(first_TL))
    return batch._replace(expert_TLK=first_TL[:, :, None])


def test_counts_equal_a_loop_over_tokens_and_pairs_of_layers() -> None:
    batch = random_batch(0)
    counts = count_layer_pairs(batch, num_experts=8)
    expected = np.zeros((3, 3, 8, 8), int)
    for token_LK in batch.expert_TLK:
        for a in range(3):
            for b in range(3):
                expected[a, b, token_LK[a, 0], token_LK[b, 0]] += 1
    np.testing.assert_array_equal(counts.joint_LLEE, expected)
    assert counts.num_tokens == 200


def test_many_rows_are_counted_exactly() -> None:
    batch = random_batch(0, tokens=20_000, layers=2, with_logits=False)
    counts = count_layer_pairs(batch, num_experts=8)
    first, second = batch.expert_TLK[:, :, 0].T.astype(int)
    expected = np.bincount(first * 8 + second, minlength=64).reshape(8, 8)
    np.testing.assert_array_equal(counts.joint_LLEE[0, 1], expected)


@pytest.mark.parametrize("stride", [1, 3])
def test_parts_and_order_do_not_matter_with_a_stride_either(stride: int) -> None:
    batch = random_batch(0, tokens=300)
    whole = count_layer_pairs(batch, num_experts=8, stride=stride)
    parts = [
        count_layer_pairs(slice_rows(batch, a, a + 60), num_experts=8, stride=stride)
        for a in range(0, 300, 60)
    ]
    mixed = rows(batch, np.random.default_rng(0).permutation(300))
    for other in (total(parts), count_layer_pairs(mixed, num_experts=8, stride=stride)):
        np.testing.assert_array_equal(other.joint_LLEE, whole.joint_LLEE)
        assert other.num_tokens == whole.num_tokens


@pytest.mark.parametrize("stride", [2, 7, 50])
def test_a_stride_picks_its_part_evenly(stride: int) -> None:
    batch = random_batch(0, tokens=20_000, layers=1, mean_document=30, with_logits=False)
    num = int(count_layer_pairs(batch, num_experts=8, stride=stride).num_tokens)
    assert num == pytest.approx(20_000 / stride, abs=5 * (20_000 / stride) ** 0.5)
    long = batch._replace(document_T=np.zeros(20_000, int), position_T=np.arange(20_000))
    num = int(count_layer_pairs(long, num_experts=8, stride=stride).num_tokens)
    assert num == pytest.approx(20_000 / stride, abs=5 * (20_000 / stride) ** 0.5)


def test_renumbered_experts_agree_entirely_and_independent_ones_not_at_all() -> None:
    source = np.random.default_rng(0)
    first_T = source.integers(8, size=5000)
    renumbered_T = source.permutation(8)[first_T]
    unrelated_T = source.integers(8, size=5000)
    split_T = first_T // 2  # two experts of one layer are one of the other
    joint = count_layer_pairs(
        with_layers(np.stack([first_T, renumbered_T, unrelated_T, split_T], axis=1)), num_experts=8
    ).joint_LLEE
    agreement = layer_agreement(joint)
    np.testing.assert_allclose(np.diagonal(agreement), 1.0)
    assert agreement[0, 1] == 1.0
    assert agreement[0, 2] < 0.002
    assert agreement[0, 3] == pytest.approx(1.0, abs=0.01)
    np.testing.assert_allclose(agreement, agreement.T)
    order = source.permutation(8)
    np.testing.assert_allclose(
        layer_agreement(joint[:, :, order]), layer_agreement(joint), atol=1e-12
    )


def test_half_of_the_tokens_copied_by_hand() -> None:
    # two experts, balanced; 3/4 of the tokens keep theirs: I / ln 2 = 1 - H(1/4) / ln 2
    joint = np.array([[30, 10], [10, 30]])
    entropy = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25)) / np.log(2)
    assert layer_agreement(joint, is_corrected=False) == pytest.approx(1 - entropy)
    corrected = 1 - entropy - 1 / 160 / np.log(2)
    assert layer_agreement(joint) == pytest.approx(corrected)


def test_one_expert_and_no_token_have_no_agreement() -> None:
    assert np.isnan(layer_agreement([[5]]))
    assert np.isnan(layer_agreement(np.zeros((3, 3))))
    assert np.isnan(layer_agreement([[3, 4], [0, 0]])), "one layer always chooses the same"
    with pytest.raises(ValueError, match="stride: got 0"):
        count_layer_pairs(random_batch(0), num_experts=8, stride=0)
