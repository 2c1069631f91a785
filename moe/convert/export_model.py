"""A run, a checkpoint or a converted model of ours becomes a Hugging Face folder.

Written: the tensors under the names that save_pretrained uses, in shards with an index, and the
files that transformers opens a model with, a model card among them. The checkpoint may be one file
or the shards of many ranks: its tensors are read piece by piece from where they are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe.convert.check_tensors import check_all_values, check_tensors
from moe.convert.export_files import export_files
from moe.convert.hf_config import family_of
from moe.convert.hf_folder import INDEX_NAME, SINGLE_NAME
from moe.convert.target_folder import check_target, new_folder
from moe.convert.tensor_map import TensorMap, tensor_map
from moe.convert.tensor_stream import TensorReader, bytes_done
from moe.convert.tensor_writer import PlannedTensor, write_tensor_file
from moe.load_run import OpenedRun
from moe.train.atomic_files import write_new_file
from moe.train.progress import OnProgress
from moe.train.tensor_header import AnyTensor

_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@dataclass(frozen=True)
class Exported:
    """What was written; num_bytes counts the tensors."""

    family: str
    dtype: str  # as torch names it
    num_bytes: int
    num_shards: int
    has_tokenizer: bool


def export_model(
    opened: OpenedRun,
    target: Path,
    *,
    window: str | None,
    max_shard_bytes: int,
    on_progress: OnProgress,
) -> Exported:
    """Convert a verified checkpoint; nothing is written before every value is known to be finite.

    window: as in moe.convert.hf_config; None takes what the model was imported with. Raises
    ConfigError where no published architecture holds the model, CheckpointError for bad values.
    """
    checkpoint, model = opened.checkpoint, opened.config.model
    origin: Mapping[str, Any] = checkpoint.state.get("origin") or {}
    window = window or str(origin.get("window", "original"))
    family = family_of(model)
    dtype = str(opened.dtype).removeprefix("torch.")
    files = export_files(opened, dtype=dtype, window=window)  # refuses what has no published form
    table = tensor_map(model, family=family)
    stored = checkpoint.stored("model")
    check_tensors(
        stored, table.ours, targets=table.into_theirs(), alias={}, where=checkpoint.folder
    )
    planned = _plan(table, stored)
    if origin.get("stores_tied_head"):
        planned[_HEAD] = planned[_EMBEDDING]
    shards = split_into_shards(planned, max_bytes=max_shard_bytes)
    num_bytes = sum(one.num_bytes for one in planned.values())
    check_target(target, needed_bytes=num_bytes + sum(map(len, files.values())))
    with TensorReader(stored) as reader:
        check_all_values(reader, alias={}, on_progress=on_progress)
        with new_folder(target) as building:
            _write(building, shards, files, reader, num_bytes=num_bytes, on_progress=on_progress)
            reader.require_unchanged()
            checkpoint.require_unchanged("model")
    has_tokenizer = any(name.startswith("tokenizer") for name in files)
    return Exported(family, dtype, num_bytes, len(shards), has_tokenizer)


def split_into_shards(
    planned: Mapping[str, PlannedTensor], *, max_bytes: int
) -> list[dict[str, PlannedTensor]]:
    """Fill one shard after the other in the order of the model; a larger tensor has its own."""
    shards: list[dict[str, PlannedTensor]] = [{}]
    used = 0
    for key, tensor in planned.items():
        if shards[-1] and used + tensor.num_bytes > max_bytes:
            shards.append({})
            used = 0
        shards[-1][key] = tensor
        used += tensor.num_bytes
    return shards


def _plan(table: TensorMap, stored: Mapping[str, AnyTensor]) -> dict[str, PlannedTensor]:
    pieces = table.into_theirs()
    return {
        key: PlannedTensor(stored[pieces[key][0].source.key].dtype, shape, pieces[key])
        for key, shape in table.theirs.items()
    }


def _write(
    building: Path,
    shards: list[dict[str, PlannedTensor]],
    files: Mapping[str, bytes],
    reader: TensorReader,
    *,
    num_bytes: int,
    on_progress: OnProgress,
) -> None:
    for name, raw in files.items():
        write_new_file(building / name, [raw])
    count = bytes_done(on_progress, "MiB written", num_bytes)
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = [SINGLE_NAME]
    for name, shard in zip(names, shards, strict=True):
        write_tensor_file(building / name, shard, reader, on_bytes=count)
    if len(shards) > 1:
        weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        index = {
            "metadata": {"total_size": num_bytes},
            "weight_map": dict(sorted(weight_map.items())),
        }
        write_new_file(building / INDEX_NAME, [json.dumps(index, indent=2).encode() + b"\n"])
