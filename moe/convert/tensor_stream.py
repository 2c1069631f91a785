"""Bytes of tensors as a stream: read in pieces of a few MiB, checked, put in another order.

Read with preadv into one buffer, never mapped: pages of a mapped file count as this process's
memory, and a checkpoint of 84 GB has many of them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from moe.convert.tensor_map import Piece, Shape, num_rows
from moe.errors import CheckpointError
from moe.train.atomic_files import Identity, file_identity, opened_without_links
from moe.train.progress import OnProgress
from moe.train.tensor_header import ITEM_BYTES, AnyTensor, spans_between

CHUNK_BYTES = 16 * 2**20
_MOST_OPEN = 100  # files; a checkpoint of a thousand ranks has as many, a process may open 1024
# a number is NaN or infinite where all the bits of its exponent are set
_EXPONENTS = {
    "BF16": (np.uint16, 0x7F80),
    "F16": (np.uint16, 0x7C00),
    "F32": (np.uint32, 0x7F80_0000),
}
FLOAT_TYPES = tuple(_EXPONENTS)

ByteRows = NDArray[np.uint8]  # (rows, bytes of a row)


class TensorReader:
    """Reads rows of stored tensors from files that must not change meanwhile."""

    def __init__(self, tensors: Mapping[str, AnyTensor]) -> None:
        self.tensors = tensors
        self._open: dict[Path, tuple[int, ExitStack]] = {}  # the one opened last is the last
        self._seen: dict[Path, Identity] = {}

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for _, stack in self._open.values():
            stack.close()
        self._open.clear()

    def read_rows(self, key: str, first: int, into: ByteRows) -> None:
        """Fill `into` with the rows from first on. Raises CheckpointError for a short file."""
        view = into.data.cast("B")
        start = first * into.shape[1]
        for path, offset, length in spans_between(self.tensors[key], start, into.nbytes):
            self._fill(view[:length], path, offset, key=key)
            view = view[length:]
        assert not view, f"{key}: rows past its end were asked for"

    def _fill(self, view: memoryview, path: Path, offset: int, *, key: str) -> None:
        descriptor = self._descriptor(path)
        while view:
            try:
                count = os.preadv(descriptor, [view], offset)
            except OSError as error:
                raise CheckpointError(
                    f"{path}: {key}: cannot be read ({error.strerror}). Copy it again."
                ) from error
            if count == 0:
                raise self._changed(path)
            view, offset = view[count:], offset + count

    def require_unchanged(self) -> None:
        """Raise CheckpointError where a file that was read is not as it was when it was opened."""
        for path, seen in self._seen.items():
            try:
                is_same = file_identity(path) == seen
            except (OSError, ValueError):
                is_same = False
            if not is_same:
                raise self._changed(path)

    def _descriptor(self, path: Path) -> int:
        if path not in self._open:
            if len(self._open) == _MOST_OPEN:
                _, oldest = self._open.pop(next(iter(self._open)))
                oldest.close()
            try:
                identity = file_identity(path)
                stack = ExitStack()
                self._open[path] = stack.enter_context(opened_without_links(path)), stack
            except (OSError, ValueError) as error:
                raise CheckpointError(f"{path}: cannot be read ({error}).") from error
            if self._seen.setdefault(path, identity) != identity:
                raise self._changed(path)
        return self._open[path][0]

    @staticmethod
    def _changed(path: Path) -> CheckpointError:
        return CheckpointError(
            f"{path}: another program changed it while it was read. Wait until it is done, then "
            "convert again."
        )


def check_values(reader: TensorReader, key: str, *, on_bytes: Callable[[int], None]) -> None:
    """Read a tensor of BF16, F16 or F32 and raise CheckpointError at its first NaN or infinity."""
    tensor = reader.tensors[key]
    kind, exponent = _EXPONENTS[tensor.dtype]
    per_chunk = CHUNK_BYTES // ITEM_BYTES[tensor.dtype]
    total = tensor.num_bytes // ITEM_BYTES[tensor.dtype]
    buffer = np.empty((min(per_chunk, total), ITEM_BYTES[tensor.dtype]), np.uint8)
    scratch = np.empty(len(buffer), kind)
    for start in range(0, total, per_chunk):
        rows = buffer[: min(per_chunk, total - start)]
        reader.read_rows(key, start, rows)
        bits = rows.reshape(-1).view(kind)
        masked = np.bitwise_and(bits, kind(exponent), out=scratch[: len(bits)])
        if masked.max() == exponent:
            place = int((masked == exponent).argmax())
            is_nan = bits[place] & kind((exponent & -exponent) - 1)  # any bit below the exponent
            index = [int(i) for i in np.unravel_index(start + place, tensor.shape or (1,))]
            raise CheckpointError(
                f"{tensor.path}: {key}{index} is {'NaN' if is_nan else 'infinite'}; every value "
                "must be finite. Copy the file again, or repair the model that wrote it."
            )
        on_bytes(rows.nbytes)


def are_equal(reader: TensorReader, key: str, other: str) -> bool:
    """Whether two stored tensors of one type and shape hold the same bytes."""
    a, b = (reader.tensors[name] for name in (key, other))
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    buffers = [np.empty((min(CHUNK_BYTES, a.num_bytes), 1), np.uint8) for _ in range(2)]
    for start in range(0, a.num_bytes, CHUNK_BYTES):
        parts = [buffer[: a.num_bytes - start] for buffer in buffers]
        for name, part in zip((key, other), parts, strict=True):
            reader.read_rows(name, start, part)
        if not np.array_equal(parts[0], parts[1]):
            return False
    return True


def bytes_done(on_progress: OnProgress, phase: str, total: int) -> Callable[[int], None]:
    """Return the function that is told how many more bytes are done, and shows them in MiB."""
    done = 0

    def count(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        on_progress(phase, -(-done // 2**20), -(-total // 2**20))

    return count


def tensor_bytes(
    shape: Shape,
    dtype: str,
    pieces: Sequence[Piece],
    reader: TensorReader,
    *,
    on_bytes: Callable[[int], None],
) -> Iterator[memoryview]:
    """Yield the bytes of a tensor put together from pieces; each chunk is valid until the next."""
    total = num_rows(shape)
    row_bytes = ITEM_BYTES[dtype] * (shape[-1] if len(shape) > 1 else 1)
    per_chunk = max(1, CHUNK_BYTES // row_bytes)
    buffer = np.empty((min(per_chunk, total), row_bytes), np.uint8)
    for start in range(0, total, per_chunk):
        rows = buffer[: min(per_chunk, total - start)]
        for piece in pieces:
            _fill(rows, start, piece, reader)
        yield rows.data.cast("B")
        on_bytes(rows.nbytes)


def _fill(rows: ByteRows, start: int, piece: Piece, reader: TensorReader) -> None:
    """Copy those rows of a piece that lie in rows, whose first is the target's row `start`."""
    source, target = piece.source, piece.target
    # the k-th row of the piece is the target's row target.first + k * target.step
    first = max(0, -((target.first - start) // target.step))
    last = min(piece.num_rows, -((target.first - start - len(rows)) // target.step))
    if first >= last:
        return
    place = target.first + first * target.step - start
    wanted = rows[place : place + (last - first - 1) * target.step + 1 : target.step]
    begin = source.first + first * source.step
    if source.step == target.step == 1:
        reader.read_rows(source.key, begin, wanted)
        return
    span = np.empty(((last - first - 1) * source.step + 1, rows.shape[1]), np.uint8)
    reader.read_rows(source.key, begin, span)
    wanted[:] = span[:: source.step]
