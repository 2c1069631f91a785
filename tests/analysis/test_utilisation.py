"""Utilisation numbers by hand, by brute force, and under permutation and scaling."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from analysis.utilisation import (
    coefficient_of_variation,
    dead_experts,
    diversity,
    gini,
    load_fraction,
    load_ratio,
)

SUMMARIES = (diversity, coefficient_of_variation, gini)


def random_counts(seed: int) -> np.ndarray:
    source = np.random.default_rng(seed)
    count_LE = source.integers(0, 50, size=(3, int(source.integers(1, 9))))
    count_LE[0, source.integers(count_LE.shape[1])] = 0
    count_LE[:, 0] += 1  # no layer is empty
    return count_LE


def test_a_worked_example() -> None:
    count_E = [4, 2, 2, 0]  # shares 1/2, 1/4, 1/4, 0; H = 1.5 ln 2
    assert load_fraction(count_E).tolist() == [0.5, 0.25, 0.25, 0.0]
    assert load_ratio(count_E).tolist() == [2.0, 1.0, 1.0, 0.0]
    assert dead_experts(count_E).tolist() == [False, False, False, True]
    assert diversity(count_E) == pytest.approx(2**1.5 / 4)
    assert coefficient_of_variation(count_E) == pytest.approx(math.sqrt(0.5))
    # |differences| of ordered pairs sum to 2 * (2+2+4+0+2+2) = 24, over 2 * 16 pairs * mean 2
    assert gini(count_E) == pytest.approx(24 / 64)


@pytest.mark.parametrize("seed", range(20))
def test_summaries_equal_their_definitions_by_brute_force(seed: int) -> None:
    count_LE = random_counts(seed)
    for layer, count_E in enumerate(count_LE.tolist()):
        total, size = sum(count_E), len(count_E)
        mean = total / size
        entropy = -sum(c / total * math.log(c / total) for c in count_E if c)
        deviation = math.sqrt(sum((c - mean) ** 2 for c in count_E) / size)
        differences = sum(abs(a - b) for a in count_E for b in count_E)
        assert diversity(count_LE)[layer] == pytest.approx(math.exp(entropy) / size)
        assert coefficient_of_variation(count_LE)[layer] == pytest.approx(deviation / mean)
        assert gini(count_LE)[layer] == pytest.approx(differences / (2 * size**2 * mean))


@pytest.mark.parametrize("summary", SUMMARIES)
@pytest.mark.parametrize("seed", range(10))
def test_summaries_depend_on_neither_the_order_of_experts_nor_the_number_of_rows(
    summary: Callable[..., np.ndarray], seed: int
) -> None:
    count_LE = random_counts(seed)
    order = np.random.default_rng(seed).permutation(count_LE.shape[1])
    np.testing.assert_allclose(summary(count_LE[:, order]), summary(count_LE), atol=1e-12)
    np.testing.assert_allclose(summary(count_LE * 7), summary(count_LE), atol=1e-12)
    np.testing.assert_allclose(summary(load_fraction(count_LE)), summary(count_LE), atol=1e-12)


@pytest.mark.parametrize("num_experts", [1, 2, 16])
def test_the_ends_of_each_scale(num_experts: int) -> None:
    balanced = np.full(num_experts, 3)
    crowded = np.eye(num_experts)[0] * 5
    assert diversity(balanced) == pytest.approx(1.0)
    assert diversity(crowded) == pytest.approx(1 / num_experts)
    assert coefficient_of_variation(balanced) == pytest.approx(0.0, abs=1e-12)
    assert coefficient_of_variation(crowded) == pytest.approx(math.sqrt(num_experts - 1))
    assert gini(balanced) == pytest.approx(0.0, abs=1e-12)
    assert gini(crowded) == pytest.approx((num_experts - 1) / num_experts)
    assert load_ratio(crowded).max() == num_experts
    assert dead_experts(crowded).sum() == num_experts - 1


def test_leading_axes_are_kept() -> None:
    count = np.ones((2, 3, 4))
    assert load_ratio(count).shape == dead_experts(count).shape == (2, 3, 4)
    for summary in SUMMARIES:
        assert summary(count).shape == (2, 3)


def test_a_threshold_counts_nearly_dead_experts() -> None:
    assert dead_experts([97, 1, 0, 102], threshold=0.05).tolist() == [False, True, True, False]


def test_a_layer_without_rows_is_not_a_number_and_all_dead() -> None:
    count_LE = [[0, 0], [1, 1]]
    assert np.isnan(load_fraction(count_LE)[0]).all()
    assert dead_experts(count_LE).tolist() == [[True, True], [False, False]]
    for summary in SUMMARIES:
        value = summary(count_LE)
        assert np.isnan(value[0])
        assert np.isfinite(value[1])


@pytest.mark.parametrize("count", [[-1, 2], [math.nan, 1], [math.inf, 1], [], 3, [[], []]])
def test_counts_that_are_none_are_refused(count: object) -> None:
    with pytest.raises(ValueError, match="count: "):
        load_fraction(count)  # type: ignore[arg-type]
