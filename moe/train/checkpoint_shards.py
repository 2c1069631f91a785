"""Which bytes of which file are a whole tensor's, where several files hold its ranges.

A shard's keys are `name` for a whole tensor, with its own shape, and `name[start:end]` for the
elements from start to end of the flattened whole tensor. A file of the plain name, as one process
writes it, holds whole tensors only.
"""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from moe.train.checkpoint_damage import about
from moe.train.checkpoint_manifest import TENSOR_SUFFIX
from moe.train.tensor_header import (
    AnyTensor,
    ShardedTensor,
    Span,
    StoredTensor,
    TensorRecord,
    read_stored_tensors,
)

_RANGE = re.compile(r"(.*)\[(0|[1-9][0-9]{0,17}):([1-9][0-9]{0,17})\]", re.DOTALL)


def range_key(name: str, start: int, end: int) -> str:
    """The key of elements start to end of a flattened tensor."""
    return f"{name}[{start}:{end}]"


def is_range_key(name: str) -> bool:
    """Whether a name reads like a range of another tensor, and so cannot be a tensor's own."""
    return _RANGE.fullmatch(name) is not None


def fault_in_tiling(
    extents: Sequence[tuple[int, int, str]], *, name: str, num_elements: int
) -> tuple[str, str] | None:
    """Who is wrong, and how, unless sorted extents hold each element of a tensor exactly once.

    An extent is the first element, the end, and who has it: a file, or a rank.
    """
    shown = reprlib.repr(name)
    if not extents:
        return "", f"nothing holds {shown}"
    if num_elements == 0 and len(extents) > 1:
        return extents[1][2], f"its {shown} is in {extents[0][2]} too"
    done, before = 0, extents[0][2]
    for start, end, owner in extents:
        if start < done:
            return owner, (
                f"its {shown} has elements {start} to {end}, and {before} has them up to {done}"
            )
        if start > done:
            return owner, (
                f"its {shown} begins with element {start}, and nothing holds those from {done} on"
            )
        done, before = end, owner
    if done != num_elements:
        return before, (
            f"its {shown} ends with element {done} of {num_elements}, and nothing holds the rest"
        )
    return None


def locate_tensors(
    folder: Path, stem: str, *, files: Sequence[str], table: Mapping[str, TensorRecord]
) -> Mapping[str, AnyTensor]:
    """Where each tensor of a stem's table lies in the stem's files, from their headers.

    The files together hold every element exactly once: no gap, no overlap, no other type, no name
    that the table does not have. Raises CheckpointError naming the file that is wrong.
    """
    if tuple(files) == (stem + TENSOR_SUFFIX,):
        with about(folder, files[0]):
            whole = read_stored_tensors(folder / files[0])
            if {name: TensorRecord(t.dtype, t.shape) for name, t in whole.items()} != table:
                raise ValueError("its names, types or shapes differ from the manifest's table")
            return whole
    extents: dict[str, list[tuple[int, int, str, Span]]] = {name: [] for name in table}
    for file in files:
        with about(folder, file):
            for key, tensor in read_stored_tensors(folder / file).items():
                name, start, end = _meaning(key, tensor, table)
                extents[name].append((start, end, file, tensor.spans[0]))
    for name, record in table.items():
        extents[name].sort()
        fault = fault_in_tiling(
            [extent[:3] for extent in extents[name]],
            name=name,
            num_elements=math.prod(record.shape),
        )
        if fault:
            with about(folder, fault[0] or files[0]):
                raise ValueError(fault[1])
    return {
        name: ShardedTensor(record.dtype, record.shape, tuple(e[3] for e in extents[name]))
        for name, record in table.items()
    }


def _meaning(
    key: str, tensor: StoredTensor, table: Mapping[str, TensorRecord]
) -> tuple[str, int, int]:
    """The whole tensor's name and which of its elements these are. Raises ValueError."""
    match = _RANGE.fullmatch(key)
    name = match[1] if match else key
    if name not in table:
        raise ValueError(f"it holds {reprlib.repr(key)}, which the manifest's table does not have")
    record = table[name]
    start, end = (int(match[2]), int(match[3])) if match else (0, math.prod(record.shape))
    shape = (end - start,) if match else record.shape
    is_inside = start < end <= math.prod(record.shape) or not match
    if not is_inside or tensor.shape != shape or tensor.dtype != record.dtype:
        raise ValueError(
            f"its {reprlib.repr(key)} is {tensor.dtype} of shape {list(tensor.shape)}; the "
            f"manifest's table has {reprlib.repr(name)} as {record.dtype} of shape "
            f"{list(record.shape)}"
        )
    return name, start, end
