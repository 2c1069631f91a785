"""Headers of safetensors files: written, and read without believing them where tensors lie.

Standard library only. A file is the header's length (8 bytes, little-endian), a JSON header, then
the tensors' bytes, each tensor where its data_offsets say, without holes and without overlaps.
"""

from __future__ import annotations

import json
import math
import os
import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from moe.train.atomic_files import opened_without_links

ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "C64": 8, "I64": 8,
    "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip
LFS_POINTER = b"version https://git-lfs"  # what a clone without Git LFS holds instead of a file
_HEADER_LIMIT_BYTES = 100_000_000  # the limit of the safetensors library


class TensorRecord(NamedTuple):
    """A tensor's type, by its safetensors name, and its shape."""

    dtype: str
    shape: tuple[int, ...]


def file_header(records: Mapping[str, TensorRecord]) -> tuple[list[str], bytes]:
    """The order in which a file holds these tensors, and its bytes before the first of them.

    Widest elements come first, so that each tensor starts at a multiple of its element size.
    """
    order = sorted(records, key=lambda name: (-ITEM_BYTES[records[name].dtype], name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        dtype, shape = records[name]
        start, end = end, end + math.prod(shape) * ITEM_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode("ascii")
    text += b" " * (-len(text) % 8)
    return order, len(text).to_bytes(8, "little") + text


class Span(NamedTuple):
    """Bytes of a file, one after the other."""

    path: Path
    offset: int  # of the first byte in the file
    num_bytes: int


class StoredTensor(NamedTuple):
    """A tensor in a file: its type by safetensors name, its shape, and where its bytes are."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int  # of its first byte in the file
    num_bytes: int

    @property
    def spans(self) -> tuple[Span, ...]:
        """Where its bytes are, in order."""
        return (Span(self.path, self.offset, self.num_bytes),)


@dataclass(frozen=True)
class ShardedTensor:
    """A tensor whose bytes lie in several places, each of a whole number of elements."""

    dtype: str
    shape: tuple[int, ...]
    spans: tuple[Span, ...]  # in order, at least one

    @property
    def path(self) -> Path:
        """The file of its first byte."""
        return self.spans[0].path

    @property
    def offset(self) -> int:
        """Where its first byte is in that file."""
        return self.spans[0].offset

    @property
    def num_bytes(self) -> int:
        """Its length in all files together."""
        return sum(span.num_bytes for span in self.spans)


AnyTensor = StoredTensor | ShardedTensor


def spans_between(tensor: AnyTensor, start: int, num_bytes: int) -> Iterator[Span]:
    """Yield where num_bytes bytes of a tensor lie, from its byte `start` on, in order.

    Past the tensor's end nothing is yielded.
    """
    end = start + num_bytes
    first = 0  # of the span, in the tensor
    for path, offset, length in tensor.spans:
        begin, stop = max(start - first, 0), min(end - first, length)
        if begin < stop:
            yield Span(path, offset + begin, stop - begin)
        first += length


def read_stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of a safetensors file, in the order of its bytes.

    Raises OSError, or ValueError saying what is wrong: a link, a truncated file, broken JSON, a
    name given twice, sizes that do not agree, overlaps, holes.
    """
    with opened_without_links(path) as descriptor:
        size = os.fstat(descriptor).st_size
        if os.pread(descriptor, len(LFS_POINTER), 0) == LFS_POINTER:
            raise ValueError("it is a Git LFS pointer, not the file (git lfs pull fetches it)")
        length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
        if size < 8 or length > size - 8:
            raise ValueError(
                f"its header should have {length:,} bytes and the file ends after {size:,}; it is "
                "truncated, or no safetensors file"
            )
        if length > _HEADER_LIMIT_BYTES:
            raise ValueError(f"its header has {length:,} bytes; allowed: {_HEADER_LIMIT_BYTES:,}")
        raw = os.pread(descriptor, length, 8)
    header = parse_json_object(raw)
    tensors = [
        _stored(path, name, entry, start=8 + length)
        for name, entry in header.items()
        if name != "__metadata__"
    ]
    tensors.sort(key=lambda named: (named[1].offset, named[1].num_bytes))
    _require_no_holes(tensors, start=8 + length, size=size)
    return dict(tensors)


def parse_json_object(raw: bytes) -> dict[str, Any]:
    """Parse a JSON object, refusing a key given twice at any depth. Raises ValueError."""
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=_without_duplicates)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except UnicodeDecodeError as error:
        raise ValueError("it is not text in UTF-8") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"it is {reprlib.repr(value)}; it must be a JSON object")
    return value


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key {reprlib.repr(twice)} is given twice")
    return made


def _stored(path: Path, name: str, entry: Any, *, start: int) -> tuple[str, StoredTensor]:
    shown = reprlib.repr(name)
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(
            f"its header says {reprlib.repr(entry)} about {shown}; it must have dtype, shape and "
            "data_offsets"
        )
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise ValueError(
            f"{shown} has the type {reprlib.repr(dtype)}; known: {', '.join(ITEM_BYTES)}"
        )
    if not _are_counts(shape):
        raise ValueError(f"{shown} has the shape {reprlib.repr(shape)}; it must be whole numbers")
    if not _are_counts(offsets) or len(offsets) != 2:
        raise ValueError(f"{shown} has the data_offsets {reprlib.repr(offsets)}; it must be two")
    first, end = offsets
    num_bytes = math.prod(shape) * ITEM_BYTES[dtype]
    if end - first != num_bytes:
        raise ValueError(
            f"{shown} is {dtype} of shape {shape}, which takes {num_bytes:,} bytes, and its "
            f"data_offsets {offsets} say {end - first:,}"
        )
    return name, StoredTensor(path, dtype, tuple(shape), start + first, num_bytes)


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 2**63 for v in values)


def _require_no_holes(tensors: list[tuple[str, StoredTensor]], *, start: int, size: int) -> None:
    for name, tensor in tensors:
        if tensor.offset != start:
            problem = "overlaps the tensor before it" if tensor.offset < start else "leaves a hole"
            raise ValueError(
                f"{reprlib.repr(name)} starts at byte {tensor.offset:,} and the tensors before it "
                f"end at {start:,}: it {problem}"
            )
        start += tensor.num_bytes
    if start != size:
        what = "is truncated" if size < start else "has bytes that belong to no tensor"
        raise ValueError(f"its tensors end at byte {start:,} and the file at {size:,}: it {what}")
