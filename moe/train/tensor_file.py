"""Tensors to a safetensors file's bytes, one after the other, and back, in pieces of a few MiB.

The safetensors library's own writer needs a second pass over the file to hash it and keeps all
tensors in host memory at once; its reader maps the file, whose pages count as memory. Layout: the
header's length (8 bytes, little-endian), a JSON header padded to 8 bytes, then the tensors.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

import torch

from moe.errors import CheckpointError
from moe.progress_call import ProgressCall, no_progress
from moe.train.tensor_header import AnyTensor, TensorRecord, file_header, spans_between

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
TORCH_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
_BUFFER_BYTES = 4 * 2**20  # a multiple of every element's size
_MOST_BYTES_A_READ = 64 * 2**20  # so that a slow disk's progress shows

OpenFile = Callable[[Path], AbstractContextManager[int]]  # gives a descriptor for reading


class TensorToWrite(NamedTuple):
    """A tensor's type and shape in the file, and tensors with its bytes one after the other."""

    record: TensorRecord
    values: Sequence[torch.Tensor]


def describe_tensors(tensors: Mapping[str, torch.Tensor]) -> dict[str, TensorRecord]:
    """Type and shape of each tensor by name. Raises ValueError where one cannot be stored."""
    return {name: describe_tensor(name, tensor) for name, tensor in tensors.items()}


def describe_tensor(name: str, tensor: torch.Tensor) -> TensorRecord:
    """Type and shape of a tensor. Raises ValueError where it cannot be stored."""
    if not isinstance(name, str) or name == "__metadata__":
        raise ValueError(f"tensor name {name!r} cannot be used: the file format reserves it")
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
        raise ValueError(f"tensor {name!r} has no plain values: {tensor.layout} on {tensor.device}")
    if tensor.dtype not in DTYPE_NAMES:
        known = ", ".join(str(dtype) for dtype in DTYPE_NAMES)
        raise ValueError(f"tensor {name!r} is {tensor.dtype}; these can be stored: {known}")
    return TensorRecord(DTYPE_NAMES[tensor.dtype], tuple(tensor.shape))


def tensor_file_chunks(tensors: Mapping[str, TensorToWrite]) -> Iterator[bytes | memoryview]:
    """Yield the file's bytes; values may lie on any device, be strided, or share their storage.

    Each is stored as the values its view shows and nothing beside them.
    """
    if sys.byteorder != "little":
        raise CheckpointError(
            "checkpoints: their tensor files are little-endian and this machine is big-endian; "
            "saving on it is not supported. Train on a little-endian machine."
        )
    order, header = file_header({name: tensor.record for name, tensor in tensors.items()})
    yield header
    for key in order:
        for values in tensors[key].values:
            yield bytes_of(values)


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor's elements in order, in host memory."""
    plain = tensor.detach().resolve_conj().resolve_neg().to("cpu").contiguous()
    return plain.reshape(-1).view(torch.uint8).numpy().data


def read_elements(
    stored: AnyTensor,
    start: int,
    into: torch.Tensor,
    *,
    open_file: OpenFile,
    progress: ProgressCall = no_progress,
) -> None:
    """Fill `into` with elements of the flattened stored tensor, from element `start` on.

    into: contiguous, on any device; values of another type are converted. Straight into its memory
    where that can be, else through one buffer: a mapped file's pages would count as memory beside
    it. open_file opens each file that is read; progress is told of the bytes. Raises OSError, or
    ValueError for a short file.
    """
    dtype = TORCH_DTYPES[stored.dtype]
    with torch.no_grad():
        flat = into.detach().view(-1)
        is_direct = flat.dtype == dtype and flat.device.type == "cpu"
        num_bytes = flat.numel() * dtype.itemsize
        size = 0 if is_direct else min(_BUFFER_BYTES, num_bytes)
        buffer = torch.empty(size, dtype=torch.uint8)
        done = 0  # elements
        for path, offset, length in spans_between(stored, start * dtype.itemsize, num_bytes):
            count = length // dtype.itemsize
            part = flat[done : done + count]
            with open_file(path) as descriptor:
                if is_direct:
                    _read_exactly(descriptor, part.view(torch.uint8), offset, progress)
                else:
                    _read_through(descriptor, buffer, offset, part, dtype=dtype, progress=progress)
            done += count
    if done != flat.numel():
        raise ValueError(f"elements from {start} on: it has {done} of {flat.numel()} of them")


def _read_through(
    descriptor: int,
    buffer: torch.Tensor,
    offset: int,
    into: torch.Tensor,
    *,
    dtype: torch.dtype,
    progress: ProgressCall,
) -> None:
    per_buffer = len(buffer) // dtype.itemsize
    for first in range(0, into.numel(), per_buffer):
        part = into[first : first + per_buffer]
        raw = buffer[: part.numel() * dtype.itemsize]
        _read_exactly(descriptor, raw, offset + first * dtype.itemsize, progress)
        part.copy_(raw.view(dtype))


def _read_exactly(
    descriptor: int, into: torch.Tensor, offset: int, progress: ProgressCall = no_progress
) -> None:
    view = into.numpy().data
    while view:
        count = os.preadv(descriptor, [view[:_MOST_BYTES_A_READ]], offset)
        if count == 0:
            raise ValueError("it ends before its last tensor does")
        view, offset = view[count:], offset + count
        progress(count)


def byte_chunks(stored: AnyTensor, *, open_file: OpenFile) -> Iterator[memoryview]:
    """Yield a stored tensor's bytes in order; each chunk is valid until the next."""
    buffer = torch.empty(min(_BUFFER_BYTES, stored.num_bytes), dtype=torch.uint8)
    for path, offset, length in stored.spans:
        with open_file(path) as descriptor:
            for first in range(0, length, _BUFFER_BYTES):
                raw = buffer[: min(len(buffer), length - first)]
                _read_exactly(descriptor, raw, offset + first)
                yield raw.numpy().data
