"""Which file each rank writes in a save, once the ranks' pieces are known to make whole tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe.parallel.pieces import Piece
from moe.train.checkpoint_manifest import (
    MANIFEST_NAME,
    STATE_NAME,
    TENSOR_SUFFIX,
    is_plain_name,
    is_stem,
    shard_name,
)
from moe.train.checkpoint_shards import fault_in_tiling, is_range_key, range_key
from moe.train.tensor_file import TensorToWrite, describe_tensor
from moe.train.tensor_header import TensorRecord

# stem -> [name, type, shape of the whole tensor, first element, number of elements]: plain JSON
Listing = Mapping[str, Sequence[Sequence[Any]]]


@dataclass(frozen=True)
class SavePlan:
    """The same on every rank."""

    tables: Mapping[str, Mapping[str, TensorRecord]]  # whole tensors by name, by stem
    files: Mapping[str, Mapping[int, str]]  # for each stem, the name of each writing rank's file


def list_pieces(pieces: Mapping[str, Sequence[Piece]]) -> Listing:
    """What a rank holds, to be told to the others. Raises ValueError for what cannot be stored."""
    return {
        stem: [_describe(piece) for piece in held if not _is_nothing(piece)]
        for stem, held in pieces.items()
    }


def tensors_to_write(pieces: Sequence[Piece]) -> dict[str, TensorToWrite]:
    """A rank's pieces under the keys that a tensor file has for them."""
    return {
        _key(piece): TensorToWrite(
            describe_tensor(piece.name, piece.values)._replace(
                shape=piece.shape if _is_whole(piece) else (piece.values.numel(),)
            ),
            (piece.values,),
        )
        for piece in pieces
        if not _is_nothing(piece)
    }


def plan_save(listings: Sequence[Listing]) -> SavePlan:
    """Name the files, from what every rank holds, in the order of ranks.

    A stem that one rank holds whole is one file of the plain name; else each rank that holds some
    of it writes a shard. Raises ValueError naming the tensor and the rank where the pieces do not
    make up each tensor exactly once.
    """
    stems = list(dict.fromkeys(stem for listing in listings for stem in listing))
    tables = {stem: _table(stem, listings) for stem in stems}
    files = {}
    for stem in stems:
        ranks = [rank for rank, listing in enumerate(listings) if listing.get(stem)] or [0]
        held = [entry for rank in ranks for entry in listings[rank].get(stem, ())]
        if len(ranks) == 1 and all(count == math.prod(shape) for _, _, shape, _, count in held):
            files[stem] = {ranks[0]: stem + TENSOR_SUFFIX}
        else:
            files[stem] = {
                rank: shard_name(stem, number, num_shards=len(ranks))
                for number, rank in enumerate(ranks, start=1)
            }
    return SavePlan(tables, files)


def check_contents(
    step: int,
    stems: Sequence[str],
    state: Mapping[str, Any],
    extra_files: Mapping[str, Path | bytes],
) -> None:
    """Raise ValueError or TypeError for contents that would not come back as they are."""
    if type(step) is not int or step < 0:
        raise ValueError(f"step: got {step!r}; it must be a whole number of at least 0")
    for stem in stems:
        if not is_stem(stem):
            raise ValueError(f"tensors: {stem!r} is not a plain file name, or a shard's")
    for name in extra_files:
        reserved = name in (MANIFEST_NAME, STATE_NAME) or name.endswith(TENSOR_SUFFIX)
        if reserved or not is_plain_name(name):
            raise ValueError(f"extra_files: {name!r} is reserved or not a plain file name")
    _require_plain(dict(state), "state")


def _describe(piece: Piece) -> list[Any]:
    record = describe_tensor(piece.name, piece.values)
    count, whole = piece.values.numel(), math.prod(piece.shape)
    if is_range_key(piece.name):
        raise ValueError(f"tensor name {piece.name!r} cannot be used: it reads like a range")
    if piece.start < 0 or piece.start + count > whole:
        raise ValueError(
            f"tensor {piece.name!r} of shape {list(piece.shape)} has {whole} elements; a piece of "
            f"it has {count} from {piece.start} on"
        )
    return [piece.name, record.dtype, list(piece.shape), piece.start, count]


def _is_whole(piece: Piece) -> bool:
    return piece.values.numel() == math.prod(piece.shape)


def _is_nothing(piece: Piece) -> bool:
    return piece.values.numel() == 0 and not _is_whole(piece)


def _key(piece: Piece) -> str:
    if _is_whole(piece):
        return piece.name
    return range_key(piece.name, piece.start, piece.start + piece.values.numel())


def _table(stem: str, listings: Sequence[Listing]) -> dict[str, TensorRecord]:
    """The whole tensors of a stem. Raises ValueError where two ranks differ or do not tile one."""
    table: dict[str, TensorRecord] = {}
    extents: dict[str, list[tuple[int, int, str]]] = {}
    for rank, listing in enumerate(listings):
        for name, dtype, shape, start, count in listing.get(stem, ()):
            record = TensorRecord(dtype, tuple(shape))
            if table.setdefault(name, record) != record:
                known = table[name]
                raise ValueError(
                    f"{stem}: rank {rank} has {name!r} as {dtype} of shape {shape}, and "
                    f"{extents[name][0][2]} as {known.dtype} of shape {list(known.shape)}"
                )
            extents.setdefault(name, []).append((start, start + count, f"rank {rank}"))
    for name, record in table.items():
        fault = fault_in_tiling(
            sorted(extents[name]), name=name, num_elements=math.prod(record.shape)
        )
        if fault:
            raise ValueError(f"{stem}: {fault[0]}: {fault[1]}")
    return table


def _require_plain(value: Any, where: str) -> None:
    # a tuple or a key that is a number would come back as something else
    if type(value) is dict:
        for key, inner in value.items():
            if type(key) is not str:
                raise TypeError(f"{where}: key {key!r} must be text to come back the same")
            _require_plain(inner, f"{where}.{key}")
    elif type(value) is list:
        for i, inner in enumerate(value):
            _require_plain(inner, f"{where}[{i}]")
    elif value is not None and type(value) not in (str, int, float, bool):
        raise TypeError(
            f"{where}: {type(value).__name__} would not come back the same; "
            "allowed: dict, list, str, int, float, bool, None"
        )
