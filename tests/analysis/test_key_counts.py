"""Choices by token id and position against loops."""

from __future__ import annotations

import numpy as np
import pytest
from synthetic_trace import random_batch

from analysis.key_counts import (
    NUM_POSITION_BUCKETS,
    count_by_key,
    first_position,
    position_bucket,
)
from moe.errors import DataError
from moe.trace.batch import slice_rows


@pytest.mark.parametrize("num_choices", [1, 2])
def test_counts_equal_a_loop(num_choices: int) -> None:
    batch = random_batch(0)
    counts = count_by_key(
        batch.token_T, batch.expert_TLK, num_keys=50, num_experts=8, num_choices=num_choices
    )
    expected = np.zeros((3, 50, 8), int)
    for t in range(200):
        for layer in range(3):
            for k in range(num_choices):
                expected[layer, batch.token_T[t], batch.expert_TLK[t, layer, k]] += 1
    np.testing.assert_array_equal(counts.choice_LXE, expected)
    np.testing.assert_array_equal(counts.token_X, np.bincount(batch.token_T, minlength=50))


def test_parts_add_to_the_whole() -> None:
    batch = random_batch(1)
    whole, one, two = (
        count_by_key(part.token_T, part.expert_TLK, num_keys=50, num_experts=8)
        for part in (batch, slice_rows(batch, 0, 77), slice_rows(batch, 77, 200))
    )
    np.testing.assert_array_equal((one + two).choice_LXE, whole.choice_LXE)
    np.testing.assert_array_equal((one + two).token_X, whole.token_X)


def test_position_buckets_double_in_width() -> None:
    positions = np.array([0, 1, 2, 3, 6, 7, 14, 15, 131_070, 131_071, 10**9], np.int32)
    buckets = position_bucket(positions)
    assert buckets.tolist() == [0, 1, 1, 2, 2, 3, 3, 4, 16, 17, 17]
    assert buckets.max() == NUM_POSITION_BUCKETS - 1
    for bucket in range(NUM_POSITION_BUCKETS):
        start = first_position(bucket)
        assert position_bucket(np.array([start])).tolist() == [bucket]
        if bucket:
            assert position_bucket(np.array([start - 1])).tolist() == [bucket - 1]


def test_bad_numbers_are_refused() -> None:
    batch = random_batch(0)
    with pytest.raises(DataError, match="key: the trace holds 49; it must be 0 to 39"):
        count_by_key(batch.token_T, batch.expert_TLK, num_keys=40, num_experts=8)
    with pytest.raises(ValueError, match="num_choices: got 0"):
        count_by_key(batch.token_T, batch.expert_TLK, num_keys=50, num_experts=8, num_choices=0)
    with pytest.raises(ValueError, match="must not be negative"):
        position_bucket(np.array([-1]))
