"""Whether stored tensors are those of a model: names, shapes, types, and every single value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from moe.convert.hf_folder import listed
from moe.convert.tensor_map import Piece, Shape
from moe.convert.tensor_stream import FLOAT_TYPES, TensorReader, are_equal, bytes_done, check_values
from moe.errors import CheckpointError, nearest
from moe.train.progress import OnProgress
from moe.train.tensor_header import AnyTensor


def check_tensors(
    stored: Mapping[str, AnyTensor],
    wanted: Mapping[str, Shape],
    *,
    targets: Mapping[str, Sequence[Piece]],
    alias: Mapping[str, str],
    where: Path,
) -> None:
    """Raise CheckpointError where stored does not have exactly the wanted keys and shapes.

    targets: the tensors that will be put together; all sources of one must have one type. alias:
    keys that may be stored besides, each with the key that it repeats.
    """
    fix = (
        "The configuration and the tensors belong to different models, or a file is missing: take "
        "all files from one source."
    )
    missing = [key for key in wanted if key not in stored]
    unexpected = [key for key in stored if key not in wanted and key not in alias]
    if missing:
        similar = nearest(missing[0], unexpected) if unexpected else ""
        raise CheckpointError(
            f"{where}: {len(missing)} tensor(s) of the model in config.json are not there: "
            f"{listed(missing)}.{similar} {fix}"
        )
    if unexpected:
        raise CheckpointError(
            f"{where}: {len(unexpected)} tensor(s) have no place in the model of config.json: "
            f"{listed(unexpected)}.{nearest(unexpected[0], wanted)} {fix}"
        )
    for key, tensor in stored.items():
        shape = wanted[alias.get(key, key)]
        if tensor.shape != shape:
            raise CheckpointError(
                f"{tensor.path}: {key} has the shape {list(tensor.shape)}; the model in "
                f"config.json needs {list(shape)}. {fix}"
            )
        if tensor.dtype not in FLOAT_TYPES:
            raise CheckpointError(
                f"{tensor.path}: {key} is {tensor.dtype}; allowed: {', '.join(FLOAT_TYPES)}. "
                + (
                    "Save the model again in float32."
                    if tensor.dtype == "F64"
                    else "Quantised weights are not read: take the model in bfloat16."
                )
            )
    for key, pieces in targets.items():
        types = {stored[piece.source.key].dtype: piece.source.key for piece in pieces}
        if len(types) > 1:
            found = ", ".join(f"{dtype} ({name})" for dtype, name in types.items())
            raise CheckpointError(
                f"{where}: the parts of {key} have several types: {found}; allowed: one type for "
                "all of them. Save the model again in one type."
            )


def check_all_values(
    reader: TensorReader, *, alias: Mapping[str, str], on_progress: OnProgress
) -> None:
    """Read every value: none may be NaN or infinite, and an alias must repeat its tensor."""
    total = sum(tensor.num_bytes for tensor in reader.tensors.values())
    count = bytes_done(on_progress, "MiB checked", total)
    places = {key: (str(tensor.path), tensor.offset) for key, tensor in reader.tensors.items()}
    for key in sorted(places, key=places.__getitem__):
        if reader.tensors[key].num_bytes:
            check_values(reader, key, on_bytes=count)
    for key, other in alias.items():
        if not are_equal(reader, key, other):
            raise CheckpointError(
                f"{reader.tensors[key].path}: {key} differs from {other}, and config.json says "
                "that they are tied (tie_word_embeddings); allowed: equal, or left out. Set "
                "tie_word_embeddings to false in config.json if both were trained."
            )
