"""What experts specialise in: domains, token ids, positions; from counts by such a key.

Tables are (..., X, E): choices of expert E by tokens of key X, as RoutingCounts.load_LDE or
KeyCounts.choice_LXE hold them. The share is the domain and vocabulary specialisation of OLMoE
(arXiv 2409.02060, section 5); lift, explained share and focus put it against chance, because a
share alone is large for a popular expert.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from analysis.information import divergence, explained

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class TopKeys:
    """The keys an expert is chosen for most, best first; n of them or fewer."""

    key_N: Integers
    share_N: Floats  # of the key's tokens, the part that chose the expert
    lift_N: Floats  # share over the expert's share of all tokens
    token_N: Integers  # how many tokens have the key


def share_of_key(choice: ArrayLike, token_X: ArrayLike) -> Floats:
    """(..., X, E), (X,) -> (..., X, E): of the key's tokens, the part that chose each expert.

    OLMoE's N(expert, key) / N(key): 0 to 1, summing to the number of choices counted (1 or K) over
    experts; chance is that number over E when load is balanced. NaN for keys without a token.
    """
    table = np.asarray(choice, dtype=np.float64)
    token_X1 = np.asarray(token_X, dtype=np.float64)[:, None]
    if table.shape[-2] != len(token_X1):
        raise ValueError(f"token_X: got {len(token_X1)} keys; the table has {table.shape[-2]}.")
    return np.divide(table, token_X1, out=np.full_like(table, np.nan), where=token_X1 > 0)


def lift(choice: ArrayLike) -> Floats:
    """(..., X, E) -> (..., X, E): the expert's share of the key's choices over its share of all.

    1 where the key makes no difference, 0 where it never chooses the expert; at most N / N(key).
    The same number read the other way: the key's part of the expert's choices over its part of
    all. NaN for keys without a token and for dead experts.
    """
    table = np.asarray(choice, dtype=np.float64)
    row = table.sum(axis=-1, keepdims=True)
    column = table.sum(axis=-2, keepdims=True)
    expected = row * column
    observed = table * row.sum(axis=-2, keepdims=True)
    return np.divide(observed, expected, out=np.full_like(table, np.nan), where=expected > 0)


def share_explained(choice: ArrayLike, *, min_count: int = 1, is_corrected: bool = True) -> Floats:
    """(..., X, E) -> (...): part of the uncertainty about the expert that knowing the key removes.

    0: routing ignores the key; 1: the key alone decides. Keys with fewer than min_count choices are
    left out, since a token id seen once explains its expert perfectly and says nothing: 50 or more
    is sensible for token ids. Best counted with num_choices=1: with K choices counted, one drawn
    at random is what is explained, and the correction (analysis.information) is a little too large.
    """
    table = np.asarray(choice, dtype=np.float64)
    enough = table.sum(axis=-1, keepdims=True) >= min_count
    return explained(np.where(enough, table, 0.0), is_corrected=is_corrected)


def focus(choice: ArrayLike) -> Floats:
    """(..., X, E) -> (..., E): how far the keys of an expert's choices are from those of all, nats.

    Kullback-Leibler divergence of P(key | expert) from P(key): 0 for an expert that sees every
    key as often as the others do; log(1 / P(key)) for one that sees a single key. NaN for dead
    experts. Weighted by load, the mean over experts is the (uncorrected) mutual information.
    """
    table = np.asarray(choice, dtype=np.float64)
    return divergence(np.swapaxes(table, -1, -2), table.sum(axis=-1)[..., None, :])


def top_keys(
    choice_XE: ArrayLike,
    token_X: ArrayLike,
    *,
    expert: int,
    num_keys: int = 10,
    min_count: int = 1,
) -> TopKeys:
    """The keys with the highest share for one expert of a layer, of those seen min_count times.

    Of equal shares the key with more tokens comes first, then the lower key. Keys that never chose
    the expert are not listed.
    """
    table_XE = np.asarray(choice_XE, dtype=np.float64)
    count_X = np.asarray(token_X, dtype=np.int64)
    if not 0 <= expert < table_XE.shape[1]:
        raise ValueError(f"expert: got {expert}; it must be 0 to {table_XE.shape[1] - 1}.")
    share_X = share_of_key(table_XE, count_X)[:, expert]
    listed_N = np.flatnonzero((count_X >= max(min_count, 1)) & (table_XE[:, expert] > 0))
    order_N = np.lexsort((listed_N, -count_X[listed_N], -share_X[listed_N]))
    key_N = listed_N[order_N[:num_keys]]
    return TopKeys(key_N, share_X[key_N], lift(table_XE)[key_N, expert], count_X[key_N])
