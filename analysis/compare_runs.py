"""What differs between kinds of runs, and how surely: means over seeds, paired differences.

Runs of one seed read the same text in the same order and start from the same random numbers where
their shapes allow it, so the difference of two arms is taken seed by seed and its spread is that of
the differences. Intervals are Student's t, for the mean over seeds: with 3 seeds the quantile is
4.30, the interval is the mean plus and minus 2.48 standard deviations. They say how much other
seeds would change the answer; they say nothing of other text, other sizes or other learning rates.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moe.errors import DataError

Row = dict[str, str]
LEVEL = 0.95
_NEEDED = {
    "runs.csv": ("arm", "seed", "validation_loss", "bits_per_byte", "total_flops", "parameters"),
    "curves.csv": ("arm", "seed", "step", "total_tokens", "total_flops", "validation_loss"),
}


@dataclass(frozen=True)
class Mean:
    """A mean over seeds with its interval; NaN bounds where there is one seed."""

    mean: float
    low: float
    high: float
    deviation: float  # sample standard deviation, NaN for one seed
    num_seeds: int

    @property
    def half_width(self) -> float:
        """Of the interval."""
        return (self.high - self.low) / 2

    @property
    def excludes_zero(self) -> bool:
        """False where there is no interval."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Difference:
    """One arm's numbers less another's, seed by seed."""

    arm: str
    against: str
    by_seed: dict[int, float]
    mean: Mean
    pairing: float  # deviation of the differences over what it would be without pairs

    def verdict(self, expects: str) -> str:
        """ "seen", "opposite" or "not resolved"; "lower" or "higher" where nothing is expected."""
        if not self.mean.excludes_zero:
            return "not resolved"
        found = "lower" if self.mean.mean < 0 else "higher"
        if expects == "unknown":
            return found
        return "seen" if found == expects else "opposite"


def read_rows(path: str | Path) -> list[Row]:
    """The rows of a runs.csv or curves.csv as text; DataError where it is not one."""
    path = Path(path)
    try:
        rows = list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"), newline="")))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(
            f"{path}: cannot be read ({error}). Make it with launch/compare.py comparison=NAME."
        ) from None
    needed = _NEEDED[path.name]
    missing = [name for name in needed if not rows or name not in rows[0]]
    if missing:
        raise DataError(
            f"{path}: has {'no rows' if not rows else 'no column ' + missing[0]}; needed are "
            f"{', '.join(needed)}. Make it again with launch/compare.py."
        )
    for number, row in enumerate(rows, start=2):
        for name in needed[1:]:
            if not _is_finite(row[name]):
                raise DataError(
                    f"{path}: line {number}, {name}: got {row[name]!r}; it must be a finite number."
                )
    return rows


def by_seed(rows: Sequence[Row], arm: str, column: str) -> dict[int, float]:
    """{seed: number} of an arm; seeds whose column is empty are left out."""
    return {int(r["seed"]): float(r[column]) for r in rows if r["arm"] == arm and r.get(column)}


def mean_over_seeds(values: Sequence[float], *, level: float = LEVEL) -> Mean:
    """The mean and its t-interval; ValueError without values."""
    if not len(values):
        raise ValueError("values: got none; there is no mean of nothing.")
    array = np.asarray(values, dtype=np.float64)
    mean, number = float(array.mean()), len(array)
    if number == 1:
        return Mean(mean, math.nan, math.nan, math.nan, 1)
    deviation = float(array.std(ddof=1))
    half = student_quantile(0.5 + level / 2, number - 1) * deviation / math.sqrt(number)
    return Mean(mean, mean - half, mean + half, deviation, number)


def difference(
    rows: Sequence[Row], arm: str, *, against: str, column: str = "validation_loss"
) -> Difference:
    """arm less against, over the seeds that both have; DataError where there is none."""
    ours, theirs = by_seed(rows, arm, column), by_seed(rows, against, column)
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        raise DataError(
            f"runs.csv: arms {arm} (seeds {sorted(ours)}) and {against} (seeds {sorted(theirs)}) "
            f"have no seed in common with a {column}. Run the comparison again."
        )
    differences = {seed: ours[seed] - theirs[seed] for seed in seeds}
    return Difference(
        arm,
        against,
        differences,
        mean_over_seeds(list(differences.values())),
        _pairing([ours[s] for s in seeds], [theirs[s] for s in seeds]),
    )


def _pairing(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """sd(a - b) / sqrt(sd(a)^2 + sd(b)^2): below 1 where seeds move both arms alike."""
    if len(ours) < 2:
        return math.nan
    a, b = np.asarray(ours), np.asarray(theirs)
    unpaired = math.sqrt(a.var(ddof=1) + b.var(ddof=1))
    return float((a - b).std(ddof=1)) / unpaired if unpaired > 0 else math.nan


def student_quantile(probability: float, degrees: int) -> float:
    """The t below which a Student variable of so many degrees of freedom falls that often.

    By halving the interval of the distribution function (Abramowitz and Stegun 26.7.3, 26.7.4,
    exact sums for whole degrees); ValueError outside 0 < probability < 1.
    """
    if not 0 < probability < 1 or degrees < 1:
        raise ValueError(f"probability {probability}, degrees {degrees}: (0, 1) and at least 1.")
    if probability < 0.5:
        return -student_quantile(1 - probability, degrees)
    low, high = 0.0, 1.0
    while _student_below(high, degrees) < probability:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        if _student_below(middle, degrees) < probability:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _student_below(t: float, degrees: int) -> float:
    """P(T < t) for t >= 0."""
    angle = math.atan(t / math.sqrt(degrees))
    cosine, sine = math.cos(angle), math.sin(angle)
    is_odd = degrees % 2 == 1
    term, total = (cosine if is_odd else 1.0), 0.0
    for power in range(is_odd, degrees - 1, 2):
        if power > 1:
            term *= cosine * cosine * (power - 1) / power
        total += term
    inside = 2 / math.pi * (angle + sine * total) if is_odd else sine * total
    return 0.5 + inside / 2


def curve(
    rows: Sequence[Row], arm: str, x: str
) -> tuple[list[float], list[float], list[float], list[float]]:
    """x, mean, least and largest validation loss over seeds, at each evaluation of an arm."""
    at: dict[float, list[float]] = {}
    for row in rows:
        if row["arm"] == arm:
            at.setdefault(float(row[x]), []).append(float(row["validation_loss"]))
    xs = sorted(at)
    return (
        xs,
        [float(np.mean(at[x])) for x in xs],
        [min(at[x]) for x in xs],
        [max(at[x]) for x in xs],
    )


def domains(rows: Sequence[Row]) -> list[str]:
    """The domains whose loss the rows have."""
    return [name.removeprefix("loss/") for name in rows[0] if name.startswith("loss/")]


def spread(rows: Sequence[Row], column: str) -> tuple[float, float]:
    """The least and the largest number of a column."""
    numbers = [float(row[column]) for row in rows if row.get(column)]
    return min(numbers), max(numbers)


def column_mean(rows: Sequence[Row], arm: str, column: str) -> float:
    """Mean over an arm's seeds; NaN where the column is empty."""
    values: Mapping[int, float] = by_seed(rows, arm, column)
    return float(np.mean(list(values.values()))) if values else math.nan


def _is_finite(text: str | None) -> bool:
    try:
        return math.isfinite(float(text or "nan"))
    except ValueError:
        return False
