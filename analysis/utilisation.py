"""How evenly experts are used: shares, ratios to the ideal, and one-number summaries.

Pure numpy. `count` is how many rows each expert received, or any numbers in proportion to it (the
shares of metrics.jsonl); its last axis is experts, the axes before it (layers, steps) are kept.
A layer without any row has no shares: its values are NaN, except that all its experts are dead.
Sources: load ratio, diversity and coefficient of variation are the expert-utilisation metrics of
NVIDIA NeMo Automodel, with its definitions, so that numbers compare.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


def load_fraction(count: ArrayLike) -> Floats:
    """(..., E) -> (..., E): each expert's share of its layer's rows; sums to 1."""
    count_E = _checked(count)
    total = count_E.sum(axis=-1, keepdims=True)
    return np.divide(count_E, total, out=np.full(count_E.shape, np.nan), where=total > 0)


def load_ratio(count: ArrayLike) -> Floats:
    """(..., E) -> (..., E): share over the ideal share 1/E; 1 is balanced, 0 dead, at most E."""
    fraction_E = load_fraction(count)
    return fraction_E * fraction_E.shape[-1]


def dead_experts(count: ArrayLike, *, threshold: float = 0.0) -> NDArray[np.bool_]:
    """(..., E) -> (..., E) bool: experts with a load ratio of at most threshold, 0 for no row."""
    return ~(load_ratio(count) > threshold)


def diversity(count: ArrayLike) -> Floats:
    """(..., E) -> (...): exp(H) / E with H the entropy of the shares in nats.

    The share of experts that are effectively in use: 1 when balanced, 1/E when one gets all.
    exp(H) is the effective number of Hill (1973), Ecology 54(2), of order 1.
    """
    fraction_E = load_fraction(count)
    logarithm = np.log(np.where(fraction_E > 0, fraction_E, 1.0))  # p log p is 0 at 0
    return np.exp(-(fraction_E * logarithm).sum(axis=-1)) / fraction_E.shape[-1]


def coefficient_of_variation(count: ArrayLike) -> Floats:
    """(..., E) -> (...): standard deviation over mean of the load, 0 balanced, sqrt(E-1) at most.

    Population deviation (division by E). Its square is the importance loss of Shazeer et al.
    (2017), arXiv 1701.06538, equation 7.
    """
    return load_ratio(count).std(axis=-1)


def max_violation(count: ArrayLike) -> Floats:
    """(..., E) -> (...): largest load over the ideal, less 1: 0 balanced, E - 1 at most.

    MaxVio of Wang et al. (2024), arXiv 2408.15664: how much longer the busiest expert works than
    it would at equal load, which is what a step waits for under expert parallelism.
    """
    return load_ratio(count).max(axis=-1) - 1.0


def gini(count: ArrayLike) -> Floats:
    """(..., E) -> (...): mean absolute difference of two experts over twice the mean.

    0 balanced, (E-1)/E when one expert gets all (no small-sample correction). Computed from sorted
    loads as sum_i (2 i - E - 1) x_i / (E sum x), i from 1.
    """
    fraction_E = np.sort(load_fraction(count), axis=-1)
    num_experts = fraction_E.shape[-1]
    rank_E = 2 * np.arange(1, num_experts + 1) - num_experts - 1
    return (rank_E * fraction_E).sum(axis=-1) / num_experts


def _checked(count: ArrayLike) -> Floats:
    count_E = np.asarray(count, dtype=np.float64)
    if count_E.ndim == 0 or count_E.shape[-1] == 0:
        raise ValueError(f"count: got shape {count_E.shape}; its last axis must be the experts.")
    if not (np.isfinite(count_E).all() and (count_E >= 0).all()):
        raise ValueError("count: holds negative or non-finite numbers; it must be rows per expert.")
    return count_E
