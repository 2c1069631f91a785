"""The shuffled orders of documents and windows, each a pure function of a seed and an epoch.

Only operations whose result is fixed for all time are used: numpy's Philox words (a counter-based
generator; Generator.permutation may change between versions) and integer arithmetic.
"""

from __future__ import annotations

import hashlib

import numpy as np

NUM_ROUNDS = 6
_MIX_1, _MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def random_key(*parts: object) -> int:
    """A 128-bit key from the parts' texts; other parts, an unrelated key."""
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "little")


def shuffled(size: int, *, key: int) -> np.ndarray:
    """A permutation of range(size), (size,) int64, by sorting the random words of Philox."""
    words = np.random.Philox(key=key).random_raw(size)
    return np.argsort(words, kind="stable")


def random_words(number: np.ndarray, *, key: int) -> np.ndarray:
    """A random word, uint64, for each number: a pure function of the number and the key."""
    word = number.astype(np.uint64)
    for round_key in np.random.Philox(key=key).random_raw(3):
        word = _mixed(word ^ round_key)
    return word


def order_of(word: np.ndarray) -> np.ndarray:
    """A permutation of range(len(word)), int64, by the upper bits of the words.

    Like argsort and several times faster: a place in the lower bits makes all words differ, so
    that any way of sorting them gives one result.
    """
    place_bits = np.uint64(max(1, len(word) - 1).bit_length())
    mask = np.uint64((1 << int(place_bits)) - 1)
    placed = (word & ~mask) | np.arange(len(word), dtype=np.uint64)
    return (np.sort(placed) & mask).astype(np.int64)


def permuted(position: np.ndarray, *, size: int, key: int) -> np.ndarray:
    """The elements at some positions of a permutation of range(size), same shape, int64.

    A Feistel network on the smallest even number of bits that holds size; results outside the
    range go through it again until they are inside, which keeps it one to one. It needs O(1)
    memory, so one window of a long epoch is found without making the whole order.
    """
    half_bits = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half_bits)) - 1)
    round_keys = np.random.Philox(key=key).random_raw(NUM_ROUNDS)
    element = position.astype(np.uint64)
    outside = np.ones(element.shape, dtype=bool)
    while outside.any():
        left, right = element[outside] >> half_bits, element[outside] & mask
        for round_key in round_keys:
            left, right = right, left ^ (_mixed(right ^ round_key) & mask)
        element[outside] = (left << half_bits) | right
        outside = element >= size
    return element.astype(np.int64)


def _mixed(word: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64: every input bit reaches every output bit."""
    word = (word ^ (word >> np.uint64(30))) * _MIX_1
    word = (word ^ (word >> np.uint64(27))) * _MIX_2
    return word ^ (word >> np.uint64(31))
