"""Entropy and information by hand, by loops, and at their ends."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis.information import divergence, entropy, explained, mutual_information

tables = st.integers(0, 10**6).map(
    lambda seed: np.random.default_rng(seed).integers(
        0, 6, size=tuple(np.random.default_rng(seed).integers(1, 6, size=2))
    )
)


def loop_information(table: np.ndarray) -> float:
    total = table.sum()
    value = 0.0
    for x in range(table.shape[0]):
        for e in range(table.shape[1]):
            if table[x, e]:
                p = table[x, e] / total
                value += p * math.log(p / (table[x].sum() / total * table[:, e].sum() / total))
    return value


def test_hand_worked_values() -> None:
    assert entropy([1, 1, 2]) == pytest.approx(1.5 * math.log(2))
    # 8 counts, rows 4 and 4, columns 4 and 4: I = 2 * (3/8 ln(3/2) + 1/8 ln(1/2))
    table = [[3, 1], [1, 3]]
    expected = 2 * (3 / 8 * math.log(3 / 2) + 1 / 8 * math.log(1 / 2))
    assert mutual_information(table, is_corrected=False) == pytest.approx(expected)
    # corrected by 1 * 1 / (2 * 8)
    assert mutual_information(table) == pytest.approx(expected - 1 / 16)
    assert explained(table, is_corrected=False) == pytest.approx(expected / math.log(2))
    assert divergence([1, 0], [1, 3]) == pytest.approx(math.log(4))


@settings(max_examples=80, deadline=None)
@given(table=tables)
def test_information_equals_its_definition_and_ignores_numbering(table: np.ndarray) -> None:
    value = mutual_information(table, is_corrected=False)
    if table.sum() == 0:
        assert np.isnan(value)
        return
    assert value == pytest.approx(loop_information(table), abs=1e-12)
    source = np.random.default_rng(0)
    shuffled = table[source.permutation(len(table))]
    shuffled = shuffled[:, source.permutation(table.shape[1])]
    assert mutual_information(shuffled, is_corrected=False) == pytest.approx(value, abs=1e-12)
    assert mutual_information(table.T) == pytest.approx(mutual_information(table), abs=1e-12)
    assert value <= min(entropy(table.sum(0)), entropy(table.sum(1))) + 1e-12


def test_what_decides_the_column_explains_all_and_what_is_independent_nothing() -> None:
    decides = np.array([[5, 0], [0, 5], [7, 0]])
    assert explained(decides, is_corrected=False) == pytest.approx(1.0)
    independent = np.outer([1, 2, 3], [4, 5])
    assert explained(independent, is_corrected=False) == pytest.approx(0.0, abs=1e-12)
    assert np.isnan(explained([[3, 0], [2, 0]])), "there is nothing to explain"


def test_the_correction_takes_away_what_chance_gives() -> None:
    source = np.random.default_rng(0)
    tables = source.multinomial(2000, np.full(64, 1 / 64), size=300).reshape(300, 8, 8)
    raw = mutual_information(tables, is_corrected=False).mean()
    assert raw == pytest.approx(49 / 4000, rel=0.05)
    # what remains is the half of the noise that is above 0
    assert mutual_information(tables).mean() < 0.15 * raw


def test_leading_axes_are_kept_and_empty_tables_are_not_a_number() -> None:
    tables = np.zeros((4, 2, 3, 5))
    tables[0] = 1
    assert entropy(tables).shape == (4, 2, 3)
    for function in (mutual_information, explained):
        value = function(tables)
        assert value.shape == (4, 2)
        assert np.isfinite(value[0]).all()
        assert np.isnan(value[1:]).all()
    assert np.isnan(divergence([0, 0], [1, 1]))
    assert divergence([1, 1], [1, 0]) == np.inf
