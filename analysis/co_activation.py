"""Which experts of a layer are chosen together, and how often chance alone would do it.

Tables are (..., E, E), symmetric with an empty diagonal: tokens that chose both experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from analysis.adding import Counts
from analysis.batch_checks import check_experts
from moe.trace.batch import TraceBatch

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

_TOLERANCE = 1e-10  # relative error of the fitted margins at which the fit stops
_MAX_ROUNDS = 2000


@dataclass(frozen=True, eq=False)
class PairCounts(Counts):
    """Tokens that chose two experts of a layer together, and that chose one at all."""

    pair_LEE: Integers
    choice_LE: Integers
    top_k: int


def count_pairs(batch: TraceBatch, *, num_experts: int) -> PairCounts:
    """Count one batch; sum over batches with analysis.adding.total or `+`."""
    check_experts(batch.expert_TLK, num_experts=num_experts)
    _, num_layers, top_k = batch.expert_TLK.shape
    pair_LEE = np.zeros((num_layers, num_experts, num_experts), np.int64)
    choice_LE = np.zeros((num_layers, num_experts), np.int64)
    for layer in range(num_layers):
        expert_KT = [batch.expert_TLK[:, layer, k].astype(np.int64) for k in range(top_k)]
        for expert_T in expert_KT:
            choice_LE[layer] += np.bincount(expert_T, minlength=num_experts)
        for one_T, two_T in combinations(expert_KT, 2):
            table = np.bincount(one_T * num_experts + two_T, minlength=num_experts**2)
            table_EE = table.reshape(num_experts, num_experts)
            pair_LEE[layer] += table_EE + table_EE.T
    return PairCounts(pair_LEE, choice_LE, top_k)


def co_activation(pair: ArrayLike, choice: ArrayLike) -> Floats:
    """(..., E, E), (..., E) -> (..., E, E): of row's tokens, the part that chose column too.

    OLMoE's N(i, j) / N(i) (arXiv 2409.02060, section 5): 0 to 1, not symmetric, rows sum to K - 1.
    The diagonal is NaN, as are the rows of dead experts.
    """
    pair_EE = _checked(pair)
    choice_E1 = np.asarray(choice, dtype=np.float64)[..., None]
    share_EE = np.divide(pair_EE, choice_E1, out=np.full_like(pair_EE, np.nan), where=choice_E1 > 0)
    return _without_diagonal(share_EE)


def chance_pairs(pair: ArrayLike) -> Floats:
    """(..., E, E) -> (..., E, E): pair counts of the same margins without preference for a partner.

    Expected_ij = w_i w_j off the diagonal, w fitted so that the rows sum as observed: quasi-
    independence (Goodman 1968, JASA 63). A product of loads would be wrong twice over: a token
    never chooses an expert twice, and popular experts leave less room for the others. At balanced
    load it is K (K - 1) / (E (E - 1)) of the tokens. Fitted by damped alternation to a relative
    1e-10 of the margins.
    """
    pair_EE = _checked(pair)
    flat = pair_EE.reshape(-1, *pair_EE.shape[-2:])
    expected = np.zeros_like(flat)
    for table_EE, fit_EE in zip(flat, expected, strict=True):
        alive = np.flatnonzero(table_EE.sum(axis=1))
        if len(alive):
            fit_EE[np.ix_(alive, alive)] = _quasi_independent(table_EE.sum(axis=1)[alive])
    return expected.reshape(pair_EE.shape)


def normalised_co_activation(pair: ArrayLike) -> Floats:
    """(..., E, E) -> (..., E, E): observed pairs over chance_pairs; 1 is chance, symmetric.

    0: never together; 2: twice as often as chance. The diagonal and dead experts are NaN. With
    K = E or with two experts every value is 1: there is no choice of partner.
    """
    pair_EE = _checked(pair)
    expected = chance_pairs(pair_EE)
    ratio = np.divide(pair_EE, expected, out=np.full_like(pair_EE, np.nan), where=expected > 0)
    return _without_diagonal(ratio)


def partner_preference(pair: ArrayLike) -> Floats:
    """(..., E, E) -> (...): divergence of the pair shares from chance_pairs', in nats.

    One number a layer: 0 when partners are chosen by load alone, log(E - 1) when every expert has
    one partner and load is balanced. NaN for a layer without pairs (K = 1).
    """
    pair_EE = _checked(pair)
    expected = chance_pairs(pair_EE)
    total = pair_EE.sum(axis=(-1, -2))
    is_pair = (pair_EE > 0) & (expected > 0)
    ratio = np.divide(pair_EE, expected, out=np.ones_like(pair_EE), where=is_pair)
    value = (pair_EE * np.log(ratio)).sum(axis=(-1, -2))
    return np.divide(value, total, out=np.full_like(total, np.nan), where=total > 0)


def _quasi_independent(margin_E: Floats) -> Floats:
    # off-diagonal w_i w_j with these row sums, for margins that a real table had
    largest = int(margin_E.argmax())
    if 2 * margin_E[largest] >= margin_E.sum():
        # every pair holds this expert: the only table with these margins, the limit of the fit
        fit_EE = np.zeros((len(margin_E), len(margin_E)))
        fit_EE[largest] = fit_EE[:, largest] = margin_E
        fit_EE[largest, largest] = 0.0
        return fit_EE
    weight_E = np.sqrt(margin_E / margin_E.mean())
    for _ in range(_MAX_ROUNDS):
        row_E = weight_E * (weight_E.sum() - weight_E)
        if np.abs(row_E / margin_E - 1).max() < _TOLERANCE:
            break
        # the square root damps the symmetric update, which oscillates without it
        weight_E = weight_E * np.sqrt(margin_E / row_E)
    fit_EE = np.outer(weight_E, weight_E)
    np.fill_diagonal(fit_EE, 0.0)
    return fit_EE


def _checked(pair: ArrayLike) -> Floats:
    pair_EE = np.asarray(pair, dtype=np.float64)
    if pair_EE.ndim < 2 or pair_EE.shape[-1] != pair_EE.shape[-2]:
        raise ValueError(f"pair: got shape {pair_EE.shape}; it must be (..., E, E).")
    is_symmetric = np.array_equal(pair_EE, np.swapaxes(pair_EE, -1, -2))
    if not is_symmetric or np.diagonal(pair_EE, axis1=-2, axis2=-1).any():
        raise ValueError("pair: it must be symmetric with a diagonal of zeros.")
    return pair_EE


def _without_diagonal(values: Floats) -> Floats:
    return np.where(np.eye(values.shape[-1], dtype=bool), np.nan, values)
