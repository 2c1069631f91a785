"""How much knowing one thing says about another, from a table of counts; in nats.

Tables are (..., X, E): rows are what is known, columns what is asked for; leading axes are kept.
A table without any count gives NaN.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


def entropy(count: ArrayLike) -> Floats:
    """(..., E) -> (...): -sum p log p of the shares, 0 to log E."""
    count_E = np.asarray(count, dtype=np.float64)
    total = count_E.sum(axis=-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        # log N - sum n log n / N: one division fewer than shares, and exact for one full cell
        value = np.log(total) - _n_log_n(count_E).sum(axis=-1) / total
    return np.where(total > 0, np.maximum(value, 0.0), np.nan)


def mutual_information(count: ArrayLike, *, is_corrected: bool = True) -> Floats:
    """(..., X, E) -> (...): H(row) + H(column) - H(both), 0 (independent) to the lower entropy.

    Counts of a sample always look dependent: their information is too large by about
    (R - 1)(C - 1) / 2N with R and C the rows and columns that occur and N the counts (Miller 1955;
    Roulston 1999, Physica D 125). is_corrected subtracts that, and returns 0 where nothing is left.
    Counts that depend on each other (tokens of a document) carry less than N says, so the
    correction is a lower bound: compare values at equal N, and give rows few counts no say.
    """
    table = np.asarray(count, dtype=np.float64)
    row, column = table.sum(axis=-1), table.sum(axis=-2)
    total = row.sum(axis=-1)
    both = entropy(table.reshape(*table.shape[:-2], -1))
    value = entropy(row) + entropy(column) - both
    if is_corrected:
        cells = ((row > 0).sum(axis=-1) - 1) * ((column > 0).sum(axis=-1) - 1)
        value = value - np.divide(cells, 2 * total, out=np.zeros_like(total), where=total > 0)
    return np.maximum(value, 0.0)


def explained(count: ArrayLike, *, is_corrected: bool = True) -> Floats:
    """(..., X, E) -> (...): mutual information over the columns' entropy, 0 to 1.

    The share of the uncertainty about the column that knowing the row removes: Theil's
    uncertainty coefficient U(column | row). NaN where the column is always the same, since there
    is nothing to explain.
    """
    table = np.asarray(count, dtype=np.float64)
    unknown = entropy(table.sum(axis=-2))
    known = mutual_information(table, is_corrected=is_corrected)
    return np.divide(known, unknown, out=np.full_like(unknown, np.nan), where=unknown > 0)


def divergence(count: ArrayLike, reference: ArrayLike) -> Floats:
    """(..., X), (..., X) -> (...): Kullback-Leibler divergence of the shares from the reference's.

    0 where they are equal; infinite where something counted has no share in the reference; NaN
    where either is empty.
    """
    count_X = np.asarray(count, dtype=np.float64)
    reference_X = np.asarray(reference, dtype=np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        p_X = count_X / count_X.sum(axis=-1, keepdims=True)
        q_X = reference_X / reference_X.sum(axis=-1, keepdims=True)
        term_X = p_X * np.log(p_X / q_X)
    return np.where(p_X == 0, 0.0, term_X).sum(axis=-1)


def _n_log_n(count: Floats) -> Floats:
    return count * np.log(np.where(count > 0, count, 1.0))
