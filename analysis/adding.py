"""Counts of parts of a trace add to the counts of the whole, in any order and any split."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import numpy as np

C = TypeVar("C", bound="Counts")


@dataclass(frozen=True, eq=False)
class Counts:
    """What was counted in some batches: `a + b` is what counting both would give.

    Arrays of a subclass are added; its other fields say how it was counted and must be equal.
    Sums of integers are exact; sums of float64 depend on the order in their last bits.
    """

    def __add__(self, other: Self) -> Self:
        return total([self, other])


def total(parts: Iterable[C]) -> C:
    """Add at least one part; holds two of them in memory at a time, whatever their number.

    Raises ValueError for no part at all, and for parts that were counted differently.
    """
    summed: C | None = None
    for part in parts:
        summed = _copy(part) if summed is None else add_into(summed, part)
    if summed is None:
        raise ValueError("parts: there is none to add; count at least one batch.")
    return summed


def add_into(summed: C | None, part: C) -> C:
    """Add part to summed in place and return it; None starts with part itself.

    For a loop that owns both: tables of a large vocabulary are too big to copy for each batch.
    """
    if summed is None:
        return part
    _check_same(summed, part)
    for (_, one), (_, two) in zip(_fields(summed), _fields(part), strict=True):
        if isinstance(one, np.ndarray):
            np.add(one, two, out=one)
    return summed


def _copy(counts: C) -> C:
    arrays = {name: v.copy() for name, v in _fields(counts) if isinstance(v, np.ndarray)}
    return dataclasses.replace(counts, **arrays)


def _fields(counts: Counts) -> list[tuple[str, Any]]:
    return [(field.name, getattr(counts, field.name)) for field in dataclasses.fields(counts)]


def _check_same(first: Counts, part: Counts) -> None:
    if type(first) is not type(part):
        raise ValueError(f"counts: {type(first).__name__} and {type(part).__name__} do not add.")
    for (name, one), (_, two) in zip(_fields(first), _fields(part), strict=True):
        if isinstance(one, np.ndarray):
            if one.shape != two.shape:
                raise ValueError(f"{name}: shapes {one.shape} and {two.shape} do not add.")
        elif one != two:
            raise ValueError(f"{name}: counted with {one!r} and with {two!r}; these do not add.")
