"""Tensors to a safetensors file's bytes, piece by piece, and back through the safetensors library.

The library's own writer needs a second pass over the file to hash it and keeps all tensors in host
memory at once. Here one tensor after the other is copied to the host, hashed and written. Layout:
the header's length (8 bytes, little-endian), a JSON header padded to 8 bytes, then the tensors.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from moe.errors import CheckpointError
from moe.train.atomic_files import opened_without_links
from moe.train.tensor_header import TensorRecord, read_stored_tensors

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


_BUFFER_BYTES = 16 * 2**20  # a multiple of every element's size


def describe_tensors(tensors: Mapping[str, torch.Tensor]) -> dict[str, TensorRecord]:
    """Type and shape of each tensor by name. Raises ValueError where one cannot be stored."""
    return {name: _describe(name, tensor) for name, tensor in tensors.items()}


def _describe(name: str, tensor: torch.Tensor) -> TensorRecord:
    if not isinstance(name, str) or name == "__metadata__":
        raise ValueError(f"tensor name {name!r} cannot be used: the file format reserves it")
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
        raise ValueError(f"tensor {name!r} has no plain values: {tensor.layout} on {tensor.device}")
    if tensor.dtype not in DTYPE_NAMES:
        known = ", ".join(str(dtype) for dtype in DTYPE_NAMES)
        raise ValueError(f"tensor {name!r} is {tensor.dtype}; these can be stored: {known}")
    return TensorRecord(DTYPE_NAMES[tensor.dtype], tuple(tensor.shape))


def tensor_file_chunks(tensors: Mapping[str, torch.Tensor]) -> Iterator[bytes | memoryview]:
    """Yield the file's bytes; tensors may lie on any device, be strided, or share their storage.

    Each is stored whole and on its own, as the values its view shows and nothing beside them.
    """
    if sys.byteorder != "little":
        raise CheckpointError(
            "checkpoints: their tensor files are little-endian and this machine is big-endian; "
            "saving on it is not supported. Train on a little-endian machine."
        )
    records = describe_tensors(tensors)
    # widest elements first, so that each tensor starts at a multiple of its element size
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        start, end = end, end + tensors[name].numel() * tensors[name].element_size()
        record = records[name]
        header[name] = {
            "dtype": record.dtype,
            "shape": list(record.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode("ascii")
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little")
    yield text
    for name in order:
        yield _bytes_of(tensors[name])


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    plain = tensor.detach().resolve_conj().resolve_neg().to("cpu").contiguous()
    return plain.reshape(-1).view(torch.uint8).numpy().data


def read_tensor_table(path: Path) -> dict[str, TensorRecord]:
    """Type and shape of each tensor in a safetensors file, from its header alone.

    Raises ValueError where the header is not valid: sizes that do not add up, overlaps, bad JSON.
    """
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 not a dict
            return {
                name: TensorRecord(part.get_dtype(), tuple(part.get_shape()))
                for name, part in slices.items()
            }
    except SafetensorError as error:
        raise ValueError(f"it is not a valid safetensors file ({error})") from error


def copy_stored_tensors(path: Path, into: Mapping[str, torch.Tensor]) -> None:
    """Copy a file's tensors into those of the same names, which have the same shapes.

    Read through one buffer: a mapped file's pages would count as memory beside the tensors. Raises
    OSError, or ValueError where the file is damaged.
    """
    dtypes = {name: dtype for dtype, name in DTYPE_NAMES.items()}
    buffer = torch.empty(_BUFFER_BYTES, dtype=torch.uint8)
    stored = read_stored_tensors(path)
    with opened_without_links(path) as descriptor, torch.no_grad():
        for name, target in into.items():
            tensor = stored[name]
            dtype = dtypes[tensor.dtype]
            flat = target.detach().view(-1)
            for start in range(0, tensor.num_bytes, _BUFFER_BYTES):
                piece = buffer[: tensor.num_bytes - start]
                _read_exactly(descriptor, piece, tensor.offset + start)
                first = start // dtype.itemsize
                flat[first : first + len(piece) // dtype.itemsize].copy_(piece.view(dtype))


def _read_exactly(descriptor: int, into: torch.Tensor, offset: int) -> None:
    view = into.numpy().data
    while view:
        count = os.preadv(descriptor, [view], offset)
        if count == 0:
            raise ValueError("it ends before its last tensor does")
        view, offset = view[count:], offset + count


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read every tensor of a safetensors file into memory of its own, on the CPU.

    Not left as a map of the file: a file rewritten in place would then change a tensor's values.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"it is not a valid safetensors file ({error})") from error
