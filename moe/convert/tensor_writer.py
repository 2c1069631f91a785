"""Write safetensors files whose tensors are put together from rows of other files' tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from moe.convert.tensor_map import Piece, Shape
from moe.convert.tensor_stream import TensorReader, tensor_bytes
from moe.train.atomic_files import Written, write_new_file
from moe.train.tensor_header import ITEM_BYTES, TensorRecord, file_header


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor to write: what it is, and which source rows are its rows."""

    dtype: str
    shape: Shape
    pieces: Sequence[Piece]

    @property
    def num_bytes(self) -> int:
        """Its length in the file."""
        size = ITEM_BYTES[self.dtype]
        for extent in self.shape:
            size *= extent
        return size


def write_tensor_file(
    path: Path,
    planned: Mapping[str, PlannedTensor],
    reader: TensorReader,
    *,
    on_bytes: Callable[[int], None],
) -> Written:
    """Write one file, its tensors streamed; returns its size and SHA-256. Raises OSError."""
    return write_new_file(path, _chunks(planned, reader, on_bytes))


def _chunks(
    planned: Mapping[str, PlannedTensor], reader: TensorReader, on_bytes: Callable[[int], None]
) -> Iterator[bytes | memoryview]:
    records = {name: TensorRecord(one.dtype, one.shape) for name, one in planned.items()}
    order, header = file_header(records)
    yield header
    for name in order:
        one = planned[name]
        yield from tensor_bytes(one.shape, one.dtype, one.pieces, reader, on_bytes=on_bytes)
