"""The assignment is the best of all permutations."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis.assignment import best_assignment


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 10**6), size=st.integers(1, 6), is_tied=st.booleans())
def test_no_permutation_scores_more(seed: int, size: int, is_tied: bool) -> None:
    source = np.random.default_rng(seed)
    score = source.integers(-3, 4, (size, size)) if is_tied else source.normal(size=(size, size))
    found = best_assignment(score)
    assert sorted(found) == list(range(size))
    best = max(score[range(size), list(p)].sum() for p in permutations(range(size)))
    assert score[range(size), found].sum() == pytest.approx(best)


def test_a_hidden_permutation_of_many_experts_is_found() -> None:
    source = np.random.default_rng(0)
    hidden = source.permutation(128)
    score = source.random((128, 128))
    score[range(128), hidden] += 2.0
    np.testing.assert_array_equal(best_assignment(score), hidden)


def test_what_is_no_table_of_scores_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must be \(E, E\)"):
        best_assignment(np.zeros((2, 3)))
    with pytest.raises(ValueError, match="non-finite"):
        best_assignment([[np.nan]])
