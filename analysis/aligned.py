"""Two traces of the same tokens, side by side, in batches that hold the same rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from moe.errors import DataError
from moe.trace.batch import TraceBatch, slice_rows

_MUST_AGREE = ("token_T", "document_T", "position_T")


def aligned(
    one: Iterable[TraceBatch], two: Iterable[TraceBatch]
) -> Iterator[tuple[TraceBatch, TraceBatch]]:
    """Yield batches of both with the same tokens; how either was cut into batches is no matter.

    Raises DataError where token, document or position differ, or where one trace ends before the
    other: routing of different tokens cannot be compared.
    """
    rest: list[TraceBatch | None] = [None, None]
    sources = (iter(one), iter(two))
    row = 0
    while True:
        for side in range(2):
            if rest[side] is None:
                rest[side] = next((b for b in sources[side] if b.num_rows), None)
        first, second = rest
        if first is None or second is None:
            if first is not second:
                shorter, longer = ("first", "second") if first is None else ("second", "first")
                raise DataError(
                    f"trace: the {shorter} trace ends after {row:,} tokens and the {longer} one "
                    "goes on; trace both checkpoints over the same documents."
                )
            return
        num_rows = min(first.num_rows, second.num_rows)
        pair = slice_rows(first, 0, num_rows), slice_rows(second, 0, num_rows)
        check_same_tokens(*pair, row=row)
        yield pair
        row += num_rows
        rest = [
            slice_rows(batch, num_rows, batch.num_rows) if batch.num_rows > num_rows else None
            for batch in (first, second)
        ]


def check_same_tokens(one: TraceBatch, two: TraceBatch, *, row: int = 0) -> None:
    """Refuse two batches whose tokens, documents or positions differ; row is that of the first."""
    if one.num_rows != two.num_rows:
        raise DataError(
            f"trace: a batch of {one.num_rows} tokens was given with one of "
            f"{two.num_rows}; both must hold the same tokens."
        )
    for name in _MUST_AGREE:
        differs_T = getattr(one, name) != getattr(two, name)
        if differs_T.any():
            at = int(np.flatnonzero(differs_T)[0])
            values = getattr(one, name)[at], getattr(two, name)[at]
            raise DataError(
                f"trace: row {row + at:,} has {name.removesuffix('_T')} {values[0]} in the first "
                f"trace and {values[1]} in the second; trace both checkpoints over the same "
                "documents."
            )
