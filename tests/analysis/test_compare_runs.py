"""Differences between kinds of runs: against printed tables, brute force, and cases by hand."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from analysis.compare_runs import (
    Row,
    by_seed,
    column_mean,
    curve,
    difference,
    mean_over_seeds,
    read_rows,
    student_quantile,
)
from moe.errors import DataError

# Student's t, upper 2.5 % and 5 % points, as printed in statistical tables
PRINTED = {
    (0.975, 1): 12.706, (0.975, 2): 4.303, (0.975, 3): 3.182, (0.975, 4): 2.776, (0.975, 5): 2.571,
    (0.975, 9): 2.262, (0.975, 10): 2.228, (0.975, 29): 2.045, (0.975, 30): 2.042,
    (0.95, 1): 6.314, (0.95, 2): 2.920, (0.95, 7): 1.895, (0.95, 20): 1.725,
}  # fmt: skip


def rows_of(**losses: list[float]) -> list[Row]:
    """Rows with one loss a seed, seeds from 0."""
    return [
        {"arm": arm, "seed": str(seed), "validation_loss": str(loss)}
        for arm, of_arm in losses.items()
        for seed, loss in enumerate(of_arm)
    ]


@pytest.mark.parametrize(("probability", "degrees"), PRINTED)
def test_quantiles_are_those_of_printed_tables(probability: float, degrees: int) -> None:
    expected = PRINTED[probability, degrees]
    assert student_quantile(probability, degrees) == pytest.approx(expected, abs=5.1e-4)
    assert student_quantile(1 - probability, degrees) == pytest.approx(-expected, abs=5.1e-4)


@pytest.mark.parametrize("degrees", [1, 2, 3, 6, 11])
def test_the_density_up_to_a_quantile_sums_to_its_probability(degrees: int) -> None:
    top = student_quantile(0.9, degrees)
    t = np.linspace(0.0, top, 200_001)
    scale = math.gamma((degrees + 1) / 2) / math.gamma(degrees / 2) / math.sqrt(degrees * math.pi)
    density = scale * (1 + t * t / degrees) ** (-(degrees + 1) / 2)
    assert 0.5 + np.trapezoid(density, t) == pytest.approx(0.9, abs=1e-9)


@pytest.mark.parametrize(("probability", "degrees"), [(0.0, 2), (1.0, 2), (0.9, 0)])
def test_a_quantile_that_does_not_exist_is_refused(probability: float, degrees: int) -> None:
    with pytest.raises(ValueError, match="probability"):
        student_quantile(probability, degrees)


def test_an_interval_worked_by_hand() -> None:
    found = mean_over_seeds([1.0, 2.0, 3.0])
    assert (found.mean, found.deviation, found.num_seeds) == (2.0, 1.0, 3)
    assert found.half_width == pytest.approx(4.30265 / math.sqrt(3), abs=1e-5)
    assert found.excludes_zero is False
    assert mean_over_seeds([3.0, 3.1, 3.2]).excludes_zero
    assert mean_over_seeds([-3.0, -3.1, -3.2]).excludes_zero


def test_intervals_of_three_seeds_hold_the_truth_in_95_of_100_cases() -> None:
    draws = np.random.default_rng(0).normal(0.3, 2.0, size=(4000, 3))
    held = [found.low <= 0.3 <= found.high for found in map(mean_over_seeds, draws.tolist())]
    assert np.mean(held) == pytest.approx(0.95, abs=0.011)  # three standard errors


def test_one_seed_has_no_interval_and_shows_nothing() -> None:
    found = difference(rows_of(a=[3.0], b=[9.0]), "a", against="b")
    assert math.isnan(found.mean.low)
    assert found.verdict("lower") == "not resolved"
    assert math.isnan(found.pairing)


def test_no_seed_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match="none"):
        mean_over_seeds([])


def test_differences_are_taken_within_a_seed() -> None:
    # seeds move both arms by far more than the arms differ: only pairs show the difference
    rows = rows_of(a=[4.00, 4.50, 5.00], b=[4.11, 4.60, 5.09])
    found = difference(rows, "a", against="b")
    assert list(found.by_seed) == [0, 1, 2]
    assert list(found.by_seed.values()) == pytest.approx([-0.11, -0.10, -0.09])
    assert found.mean.mean == pytest.approx(-0.10)
    assert found.mean.half_width == pytest.approx(4.30265 * 0.01 / math.sqrt(3), rel=1e-4)
    assert found.verdict("lower") == "seen"
    assert found.pairing == pytest.approx(0.01 / math.hypot(0.5, 0.49))
    unpaired = difference(rows_of(a=[4.00, 4.50, 5.00], b=[5.09, 4.11, 4.60]), "a", against="b")
    assert unpaired.verdict("lower") == "not resolved"
    assert unpaired.pairing > 1


@pytest.mark.parametrize(
    ("shift", "expects", "verdict"),
    [
        (-0.1, "lower", "seen"), (-0.1, "higher", "opposite"), (-0.1, "unknown", "lower"),
        (0.1, "lower", "opposite"), (0.1, "higher", "seen"), (0.1, "unknown", "higher"),
        (0.01, "lower", "not resolved"), (0.01, "unknown", "not resolved"),
    ],
)  # fmt: skip
def test_a_verdict_says_no_more_than_the_interval(shift: float, expects: str, verdict: str) -> None:
    noise = [-0.01, 0.0, 0.01]
    rows = rows_of(a=[4.0 + shift + n for n in noise], b=[4.0, 4.0, 4.0])
    assert difference(rows, "a", against="b").verdict(expects) == verdict


def test_exchanging_the_arms_turns_the_difference_round() -> None:
    rows = rows_of(a=[4.0, 4.2, 4.1], b=[4.3, 4.25, 4.5])
    one, other = difference(rows, "a", against="b"), difference(rows, "b", against="a")
    assert (one.mean.mean, one.mean.low) == pytest.approx((-other.mean.mean, -other.mean.high))
    assert one.pairing == pytest.approx(other.pairing)


def test_the_order_of_rows_changes_nothing() -> None:
    rows = rows_of(a=[4.0, 4.2, 4.1], b=[4.3, 4.25, 4.5])
    assert difference(rows[::-1], "a", against="b") == difference(rows, "a", against="b")


def test_only_seeds_of_both_arms_are_paired_and_none_is_refused() -> None:
    found = difference(rows_of(a=[4.0, 4.2, 4.1], b=[4.3, 4.3]), "a", against="b")
    assert found.mean.num_seeds == 2
    with pytest.raises(DataError, match=r"arms a \(seeds \[0\]\) and c \(seeds \[\]\)"):
        difference(rows_of(a=[4.0]), "a", against="c")


def test_an_empty_column_is_not_a_number() -> None:
    rows = rows_of(a=[4.0, 5.0])
    rows[0]["load_cv"], rows[1]["load_cv"] = "", "0.5"
    assert by_seed(rows, "a", "load_cv") == {1: 0.5}
    assert math.isnan(column_mean(rows, "a", "dead_experts"))


def test_a_curve_is_the_mean_and_the_range_of_the_seeds_at_each_place() -> None:
    losses = {("0", 10): 5.0, ("1", 10): 6.0, ("0", 20): 4.0, ("1", 20): 4.5}
    rows = [
        {"arm": "a", "seed": seed, "total_tokens": str(tokens), "validation_loss": str(loss)}
        for (seed, tokens), loss in losses.items()
    ]
    assert curve(rows[::-1], "a", "total_tokens") == ([10, 20], [5.5, 4.25], [5.0, 4.0], [6.0, 4.5])


HEADER = "arm,seed,validation_loss,bits_per_byte,total_flops,parameters"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "cannot be read"),
        ("", "no rows"),
        (f"{HEADER}\n", "no rows"),
        ("arm,seed\na,0\n", "no column validation_loss"),
        (f"{HEADER}\na,0,4.0,2.0,1e12,5\na,1,nan,2.0,1e12,5\n", "line 3, validation_loss: got 'na"),
        (f"{HEADER}\na,zero,4.0,2.0,1e12,5\n", "line 2, seed: got 'zero'"),
        (f"{HEADER}\na,0,4.0\n", "line 2, bits_per_byte: got None"),
    ],
)
def test_a_file_that_is_no_table_of_runs_is_refused(
    text: str | None, said: str, tmp_path: Path
) -> None:
    path = tmp_path / "runs.csv"
    if text is not None:
        path.write_text(text)
    with pytest.raises(DataError) as caught:
        read_rows(path)
    assert said in str(caught.value)
    assert "launch/compare.py" in str(caught.value) or "finite number" in str(caught.value)
