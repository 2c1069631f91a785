"""Confidence intervals of any number computed from sums over documents.

Tokens of a document are alike, so intervals from tokens are far too narrow: whole documents (or
fixed groups of them) are drawn again, within each stratum (domain), because how many documents of
a domain there are was decided and not measured. Two kinds of numbers need two kinds of intervals:

- shares, means and differences: BCa (Efron 1987, JASA 82), percentiles of the resampled numbers
  moved for bias and skew; they stay within the range of the number.
- deviations, which are 0 when all is even and cannot be negative (coefficient of variation, Gini):
  sampling noise makes them too large, resampling adds the same noise again, and percentiles then
  lie above the truth. Noise adds to their square, so that is reflected about the estimate:
  [2 d^2 - upper, 2 d^2 - lower], cut at 0, square root. The interval is for the deviation without
  noise and may lie below the estimate.

Coverage of 95 % intervals in a simulation with 100 documents (tests/analysis/test_bootstrap.py),
coefficient of variation of a nearly even load: percentile 61 %, BCa 87 %, reflected squares 96 %;
of a share: 93, 92 and 91 %. Each interval is for its own number: of 512, 26 miss by chance alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
# sums over clusters, each with a leading axis R of samples -> the numbers, with the same axis
Statistic = Callable[..., Floats]

_SAMPLES_AT_ONCE = 128  # bounds memory: this many sums and statistics exist at a time
_NORMAL = NormalDist()


@dataclass(frozen=True, eq=False)
class Interval:
    """A number, or an array of them, with its interval; NaN bounds where there is none."""

    estimate: Floats
    low: Floats
    high: Floats
    level: float
    num_clusters: int  # below about 20 an interval is a rough guess

    @property
    def excludes_zero(self) -> NDArray[np.bool_]:
        """Where zero (no difference) lies outside the interval; False where there is none."""
        return (self.low > 0) | (self.high < 0)


def bootstrap(
    sums: Sequence[ArrayLike],
    statistic: Statistic,
    *,
    stratum_C: ArrayLike | None = None,
    num_samples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    method: Literal["bca", "reflected"] = "bca",
) -> Interval:
    """Interval of statistic(*totals), from arrays (C, ...) of sums over each of C clusters.

    The statistic gets each array summed over its clusters, with a leading axis of samples (R, ...),
    and returns (R, ...): write it with negative axes. Two runs over the same documents are compared
    by giving both runs' sums, so that a sample draws the same documents of both:
    bootstrap((one_CX, two_CX), lambda one, two: f(two) - f(one)). Clusters without anything in any
    array are left out. method "reflected" is for differences of deviations: [2 e - upper,
    2 e - lower] about the estimate e. Same seed, same intervals. Bounds are NaN with fewer than two
    clusters, and for numbers that are not finite.
    """
    arrays, stratum = _checked(sums, stratum_C)
    if not 0 < level < 1 or num_samples < 2:
        raise ValueError(f"level {level}, num_samples {num_samples}: must be in (0, 1) and >= 2.")
    num_clusters = len(stratum)
    estimate = _of_weights(arrays, statistic, np.ones((1, num_clusters)))[0]
    if num_clusters < 2:
        nothing = np.full_like(estimate, np.nan)
        return Interval(estimate, nothing, nothing.copy(), level, num_clusters)
    drawn = _of_weights(arrays, statistic, _draw(stratum, num_samples=num_samples, seed=seed))
    if method == "bca":
        acceleration = _acceleration(arrays, statistic, stratum)
        low, high = _bca(drawn, estimate, acceleration, level=level)
    else:
        low, high = _reflected(drawn, estimate, level=level)
    return Interval(estimate, low, high, level, num_clusters)


def bootstrap_deviation(
    sums: Sequence[ArrayLike],
    statistic: Statistic,
    *,
    stratum_C: ArrayLike | None = None,
    num_samples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """bootstrap for a deviation: never negative, 0 when all is even, of the size of the noise.

    The estimate is statistic's; the bounds are from its square, reflected and cut at 0.
    """
    square = bootstrap(
        sums,
        lambda *totals: statistic(*totals) ** 2,
        stratum_C=stratum_C,
        num_samples=num_samples,
        level=level,
        seed=seed,
        method="reflected",
    )
    estimate, low, high = (
        np.sqrt(np.maximum(value, 0.0)) for value in (square.estimate, square.low, square.high)
    )
    return Interval(estimate, low, high, level, square.num_clusters)


def side_by_side(one: Sequence[ArrayLike], two: Sequence[ArrayLike]) -> list[Floats]:
    """Sums of two runs over different documents, as one set of clusters for bootstrap.

    Returns each array of `one` padded with zeros for the clusters of `two`, then those of `two`
    padded the same way: the statistic gets all of one's totals, then all of two's. Use
    stratum_C = [0] * C1 + [1] * C2 (or domains apart), so that each run is drawn again by itself.
    """
    size_one, size_two = len(np.asarray(one[0])), len(np.asarray(two[0]))
    padded = []
    for array in map(np.asarray, one):
        padded.append(np.concatenate([array, np.zeros((size_two, *array.shape[1:]))]))
    for array in map(np.asarray, two):
        padded.append(np.concatenate([np.zeros((size_one, *array.shape[1:])), array]))
    return padded


def _checked(
    sums: Sequence[ArrayLike], stratum_C: ArrayLike | None
) -> tuple[list[Floats], NDArray[np.int64]]:
    arrays = [np.asarray(array, dtype=np.float64) for array in sums]
    if not arrays or any(array.ndim == 0 for array in arrays):
        raise ValueError("sums: give at least one array (C, ...) of sums over clusters.")
    lengths = {len(array) for array in arrays}
    size = len(arrays[0])
    stratum = np.zeros(size, np.int64) if stratum_C is None else np.asarray(stratum_C)
    if lengths != {size} or stratum.shape != (size,):
        raise ValueError(
            f"sums: arrays of {sorted(lengths)} clusters with stratum_C {stratum.shape}; "
            "all must have one row for each cluster."
        )
    is_used = np.zeros(size, dtype=bool)
    for array in arrays:
        is_used |= (array != 0).any(axis=tuple(range(1, array.ndim)))
    arrays = [array[is_used] for array in arrays]
    return arrays, np.unique(stratum[is_used], return_inverse=True)[1].astype(np.int64)


def _draw(stratum: NDArray[np.int64], *, num_samples: int, seed: int) -> Floats:
    # (R, C): how often each cluster is in each sample; a stratum keeps its number of clusters
    source = np.random.default_rng(seed)
    weight_RC = np.empty((num_samples, len(stratum)))
    for number in range(int(stratum.max()) + 1):
        member = np.flatnonzero(stratum == number)
        even = np.full(len(member), 1 / len(member))
        weight_RC[:, member] = source.multinomial(len(member), even, size=num_samples)
    return weight_RC


def _of_weights(arrays: list[Floats], statistic: Statistic, weight_RC: Floats) -> Floats:
    flat = [array.reshape(len(array), math.prod(array.shape[1:])) for array in arrays]
    parts = []
    for start in range(0, len(weight_RC), _SAMPLES_AT_ONCE):
        weight = weight_RC[start : start + _SAMPLES_AT_ONCE]
        totals = [
            (weight @ table).reshape(len(weight), *array.shape[1:])
            for table, array in zip(flat, arrays, strict=True)
        ]
        parts.append(np.asarray(statistic(*totals), dtype=np.float64))
        if parts[-1].shape[:1] != (len(weight),):
            raise ValueError(
                f"statistic: returned shape {parts[-1].shape} for {len(weight)} samples; its first "
                "axis must be that of its arguments."
            )
    return np.concatenate(parts)


def _acceleration(arrays: list[Floats], statistic: Statistic, stratum: NDArray[np.int64]) -> Floats:
    # skewness of the influence of each cluster, from leaving it out of its stratum, whose other
    # clusters make up for it (Davison and Hinkley 1997, sections 2.7.3, 3.2 and 5.3.2)
    of_stratum = [_sum_by(array, stratum) for array in arrays]
    size_C = np.bincount(stratum)[stratum]
    whole = _of_weights(arrays, statistic, np.ones((1, len(stratum))))
    cubes = squares = np.zeros(())
    for start in range(0, len(stratum), _SAMPLES_AT_ONCE):
        part = slice(start, start + _SAMPLES_AT_ONCE)
        size = size_C[part]
        grown = np.divide(size, size - 1, out=np.ones(len(size)), where=size > 1)
        totals = []
        for array, sums in zip(arrays, of_stratum, strict=True):
            mine = sums[stratum[part]]
            rest = mine - np.where(_along(size, array) > 1, array[part], 0.0)
            totals.append(array.sum(axis=0) - mine + _along(grown, array) * rest)
        value = np.asarray(statistic(*totals), dtype=np.float64)
        with np.errstate(invalid="ignore"):
            influence = _along((size - 1) / size, value) * (whole - value)
            cubes = cubes + (influence**3).sum(axis=0)
            squares = squares + (influence**2).sum(axis=0)
    squares = np.asarray(squares)
    # not a number where leaving a cluster out leaves nothing to divide by: then no skew is known
    is_known = np.isfinite(squares) & (squares > 0)
    return np.divide(cubes, 6 * squares**1.5, out=np.zeros_like(squares), where=is_known)


def _sum_by(array: Floats, stratum: NDArray[np.int64]) -> Floats:
    sums = np.zeros((int(stratum.max()) + 1, *array.shape[1:]))
    np.add.at(sums, stratum, array)
    return sums


def _along(value_R: NDArray, array: Floats) -> NDArray:
    return value_R.reshape(-1, *(1,) * (array.ndim - 1))


def _bca(
    drawn: Floats, estimate: Floats, acceleration: Floats, *, level: float
) -> tuple[Floats, Floats]:
    num_samples = len(drawn)
    # half of the equal ones, so that discrete numbers are not biased; never beyond the samples
    below = (drawn < estimate).sum(axis=0) + 0.5 * (drawn == estimate).sum(axis=0)
    share = np.clip(below / num_samples, 1 / (num_samples + 1), num_samples / (num_samples + 1))
    bias = _normal_quantile(share)
    bounds = []
    ordered = np.sort(drawn, axis=0)  # NaN sorts last and is refused below
    for tail in (_NORMAL.inv_cdf((1 - level) / 2), _NORMAL.inv_cdf((1 + level) / 2)):
        shift = bias + tail
        # |acceleration| is at most 1/6, so that this is cut at levels beyond 99 % only
        scale = np.maximum(1 - acceleration * shift, 1e-3)
        adjusted = _normal_share(bias + shift / scale)
        bounds.append(_sorted_quantile(ordered, adjusted))
    is_known = np.isfinite(estimate) & np.isfinite(drawn).all(axis=0)
    low, high = (np.where(is_known, bound, np.nan) for bound in bounds)
    return low, high


def _reflected(drawn: Floats, estimate: Floats, *, level: float) -> tuple[Floats, Floats]:
    tails = np.full((2, *np.shape(estimate)), 0.5)
    tails[0], tails[1] = (1 - level) / 2, (1 + level) / 2
    ordered = np.sort(drawn, axis=0)
    lower, upper = (_sorted_quantile(ordered, tail) for tail in tails)
    is_known = np.isfinite(estimate) & np.isfinite(drawn).all(axis=0)
    low, high = (np.where(is_known, 2 * estimate - bound, np.nan) for bound in (upper, lower))
    return low, high


def _sorted_quantile(ordered: Floats, share: Floats) -> Floats:
    # linear between order statistics, element by element: np.quantile takes one share for all
    place = share * (len(ordered) - 1)
    before = np.floor(place).astype(np.int64)
    after = np.minimum(before + 1, len(ordered) - 1)
    low = np.take_along_axis(ordered, before[None], axis=0)[0]
    high = np.take_along_axis(ordered, after[None], axis=0)[0]
    with np.errstate(invalid="ignore"):
        return low + (place - before) * (high - low)


def _normal_quantile(share: Floats) -> Floats:
    # few different shares occur: as many as there are samples
    unique, inverse = np.unique(share, return_inverse=True)
    return np.array([_NORMAL.inv_cdf(s) for s in unique])[inverse].reshape(np.shape(share))


def _normal_share(value: Floats) -> Floats:
    flat = np.ravel(value)
    return np.array([_NORMAL.cdf(v) for v in flat]).reshape(np.shape(value))
