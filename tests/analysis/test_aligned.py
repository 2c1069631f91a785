"""Two traces side by side: the same rows, however they were cut."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_trace import random_batch

from analysis.aligned import aligned
from moe.errors import DataError
from moe.trace.batch import TraceBatch, join_rows, slice_rows


def pieces(batch: TraceBatch, cuts: list[int]) -> list[TraceBatch]:
    edges = sorted([0, batch.num_rows, *cuts])
    return [slice_rows(batch, *pair) for pair in itertools.pairwise(edges)]


@settings(max_examples=40, deadline=None)
@given(one=st.lists(st.integers(0, 60), max_size=5), two=st.lists(st.integers(0, 60), max_size=5))
def test_any_two_splits_give_all_rows_once_and_in_order(one: list[int], two: list[int]) -> None:
    batch = random_batch(0, tokens=60)
    other = batch._replace(expert_TLK=(batch.expert_TLK + 1) % 8)
    pairs = list(aligned(pieces(batch, one), pieces(other, two)))
    for first, second in pairs:
        assert first.num_rows == second.num_rows > 0
        np.testing.assert_array_equal((first.expert_TLK + 1) % 8, second.expert_TLK)
    whole = join_rows([first for first, _ in pairs])
    np.testing.assert_array_equal(whole.expert_TLK, batch.expert_TLK)
    np.testing.assert_array_equal(whole.weight_TLK, batch.weight_TLK)


@pytest.mark.parametrize("column", ["token", "document", "position"])
def test_another_row_is_named(column: str) -> None:
    batch = random_batch(0, tokens=60)
    values = getattr(batch, f"{column}_T").copy()
    values[41] += 1
    other = batch._replace(**{f"{column}_T": values})
    message = f"row 41 has {column} {values[41] - 1} in the first trace and {values[41]} in the"
    with pytest.raises(DataError, match=message):
        list(aligned(pieces(batch, [10]), pieces(other, [33])))


def test_a_shorter_trace_is_named() -> None:
    batch = random_batch(0, tokens=60)
    short = [slice_rows(batch, 0, 50)]
    with pytest.raises(DataError, match="the second trace ends after 50 tokens and the first one"):
        list(aligned([batch], short))
    with pytest.raises(DataError, match="the first trace ends after 50 tokens"):
        list(aligned(short, [batch]))
    assert list(aligned([], [])) == []
