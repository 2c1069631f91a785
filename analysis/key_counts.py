"""How often tokens with a given key (token id, position) chose each expert of each layer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from analysis.adding import Counts
from analysis.batch_checks import check_experts, check_range

Integers = NDArray[np.int64]

NUM_POSITION_BUCKETS = 18  # up to 131071, the longest context of the family


@dataclass(frozen=True, eq=False)
class KeyCounts(Counts):
    """Choices by key; X keys (rows of a vocabulary, buckets of positions, domains)."""

    choice_LXE: Integers  # of the first num_choices of each token
    token_X: Integers
    num_choices: int


def count_by_key(
    key_T: NDArray[np.integer],
    expert_TLK: NDArray[np.integer],
    *,
    num_keys: int,
    num_experts: int,
    num_choices: int = 1,
) -> KeyCounts:
    """Count the first num_choices of each token by its key, e.g. count_by_key(batch.token_T, ...).

    Takes L * X * E * 8 bytes: 131 MB for 32 layers, 32,000 token ids and 16 experts. Raises
    DataError for keys or experts outside their range.
    """
    check_experts(expert_TLK, num_experts=num_experts)
    check_range("key", key_T, below=num_keys)
    num_layers, top_k = expert_TLK.shape[1:]
    if not 1 <= num_choices <= top_k:
        raise ValueError(f"num_choices: got {num_choices}; it must be 1 to {top_k}.")
    row_T = key_T.astype(np.int64) * num_experts
    choice_LXE = np.zeros((num_layers, num_keys, num_experts), np.int64)
    for layer in range(num_layers):
        for k in range(num_choices):
            table = np.bincount(row_T + expert_TLK[:, layer, k], minlength=num_keys * num_experts)
            choice_LXE[layer] += table.reshape(num_keys, num_experts)
    return KeyCounts(choice_LXE, np.bincount(key_T, minlength=num_keys), num_choices)


def position_bucket(position_T: NDArray[np.integer]) -> Integers:
    """(T,) positions in a document -> (T,) buckets: 0, 1-2, 3-6, 7-14, ... (doubling widths).

    Bucket b holds positions 2**b - 1 to 2**(b + 1) - 2; the first token, whose context is only
    itself, is alone in bucket 0. The last bucket holds everything further on.
    """
    if position_T.size and int(position_T.min()) < 0:
        raise ValueError(f"position_T: holds {int(position_T.min())}; it must not be negative.")
    # exact for integers below 2**53, unlike the logarithm
    exponent_T = np.frexp(position_T.astype(np.float64) + 1.0)[1] - 1
    return np.minimum(exponent_T, NUM_POSITION_BUCKETS - 1).astype(np.int64)


def first_position(bucket: int) -> int:
    """The smallest position in a bucket: 0, 1, 3, 7, 15, ..."""
    return 2**bucket - 1
