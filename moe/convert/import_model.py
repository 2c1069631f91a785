"""A Hugging Face folder becomes a model of ours: checked as a whole first, then streamed.

The result is a checkpoint folder: model.safetensors in our layout, config.json (a TrainConfig),
state.json (where it came from), the published files under hf_*, a tokenizer, and a manifest.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe.config import DataConfig, TokenizerConfig, TrainConfig
from moe.convert.check_tensors import check_all_values, check_tensors
from moe.convert.hf_config import HfModel, read_hf_config
from moe.convert.hf_folder import CONFIG_NAME, KEPT_PREFIX, HfFolder, about, open_hf_folder
from moe.convert.pick_tokenizer import pick_tokenizer, read_tokenizer_file
from moe.convert.read_chat_template import RecognisedTemplate, recognise_chat_template
from moe.convert.target_folder import check_target, new_folder
from moe.convert.tensor_map import tensor_map
from moe.convert.tensor_stream import TensorReader, bytes_done
from moe.convert.tensor_writer import PlannedTensor, write_tensor_file
from moe.data.manifest import TOKENIZER_NAME
from moe.errors import CheckpointError
from moe.model_config import ModelConfig
from moe.train.atomic_files import write_new_file
from moe.train.checkpoint_manifest import (
    MANIFEST_NAME,
    STATE_NAME,
    FileRecord,
    Manifest,
    manifest_bytes,
)
from moe.train.progress import OnProgress
from moe.train.tensor_header import TensorRecord, parse_json_object

PRECISIONS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_MODEL_NAME = "model.safetensors"
_TOKENIZER_CONFIG_NAME, _JINJA_NAME = "tokenizer_config.json", "chat_template.jinja"
_LARGE_TABLE = 100_000  # tensors; the published models have at most 1,957
_SMALLEST_TOKENIZER = 512  # of TokenizerConfig; a test model's vocabulary may be smaller
# buffers that old versions of modelling code saved; computed anew from config.json
_SKIPPED = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")


@dataclasses.dataclass(frozen=True)
class Imported:
    """What was written; num_bytes counts the tensors."""

    found: HfModel
    precision: str
    num_bytes: int
    skipped: tuple[str, ...]
    has_tokenizer: bool
    notes: tuple[str, ...]  # what the user should know about tokenizer and template


def import_model(
    source: Path,
    target: Path,
    *,
    window: str,
    tokenizer: Path | None,
    on_progress: OnProgress,
) -> Imported:
    """Convert; nothing is written before every header and every value is known to be right.

    Memory does not depend on the size of the model. Raises ConfigError (config.json, target) or
    CheckpointError (files and tensors).
    """
    folder = open_hf_folder(source)
    found = read_hf_config(folder.config, where=str(source / CONFIG_NAME), window=window)
    has_stored_head = found.model.tie_embeddings and "lm_head.weight" in folder.tensors
    has_fused_experts = _has_fused_experts(folder.tensors)
    _require_enough(folder, found.model, has_fused_experts=has_fused_experts)
    table = tensor_map(found.model, family=found.family, fused_experts=has_fused_experts)
    skipped = tuple(key for key in folder.tensors if _SKIPPED.fullmatch(key))
    used = {key: tensor for key, tensor in folder.tensors.items() if key not in skipped}
    alias = {"lm_head.weight": "model.embed_tokens.weight"} if has_stored_head else {}
    pieces = table.into_ours()
    check_tensors(used, table.theirs, targets=pieces, alias=alias, where=source)
    planned = {
        key: PlannedTensor(used[pieces[key][0].source.key].dtype, shape, pieces[key])
        for key, shape in table.ours.items()
    }
    num_bytes = sum(one.num_bytes for one in planned.values())
    check_target(target, needed_bytes=num_bytes)
    template = _chat_template(folder, found)
    config = train_config(found, chat_template=template.name)
    picked = pick_tokenizer(tokenizer, folder, vocab_size=found.model.vocab_size)
    state = _state(folder, found, planned, window=window, skipped=skipped, alias=alias)
    extra = {KEPT_PREFIX + name: raw for name, raw in folder.kept_files.items()}
    if picked.content is not None:
        extra[TOKENIZER_NAME] = picked.content
    if folder.tokenizer is not None and folder.tokenizer != picked.path:
        extra[KEPT_PREFIX + folder.tokenizer.name] = read_tokenizer_file(folder.tokenizer)
    with TensorReader(used) as reader:
        check_all_values(reader, alias=alias, on_progress=on_progress)
        with new_folder(target) as building:
            _write(building, planned, reader, config, state, extra, on_progress=on_progress)
            reader.require_unchanged()
    precision = state["train"]["precision"]
    has_tokenizer = picked.content is not None
    wrapped = (
        "its keys have the prefix of a wrapper (_orig_mod., module.), which is taken off."
        if folder.is_wrapped
        else None
    )
    given = (wrapped, picked.note, template.note if has_tokenizer else None)
    notes = tuple(note for note in given if note)
    return Imported(found, precision, num_bytes, skipped, has_tokenizer, notes)


def train_config(found: HfModel, *, chat_template: str) -> TrainConfig:
    """The configuration to open this model with, or to train it further."""
    model = found.model
    length = min(model.usable_length, model.rope.original_max_position)
    return TrainConfig(
        name=model.name,
        model=model,
        router=found.router,
        data=DataConfig(seq_len=length),
        tokenizer=TokenizerConfig(
            vocab_size=max(model.vocab_size, _SMALLEST_TOKENIZER), chat_template=chat_template
        ),
    )


def common_precision(dtypes: set[str]) -> str:
    """The torch name of the narrowest type that holds numbers of all these types."""
    return PRECISIONS[next(iter(dtypes))] if len(dtypes) == 1 else "float32"


def _require_enough(folder: HfFolder, model: ModelConfig, *, has_fused_experts: bool) -> None:
    """Refuse sizes that no table of so few tensors can have, before the table is made."""
    experts = model.num_experts if model.is_sparse and not has_fused_experts else 1
    least = model.num_layers * experts
    # a smaller table is made in a moment, and what it lacks is then named
    if least > max(len(folder.tensors), _LARGE_TABLE):
        raise CheckpointError(
            f"{folder.folder}: {CONFIG_NAME} says {model.num_layers:,} layers"
            + (f" of {experts:,} experts" if experts > 1 else "")
            + f", at least {least:,} tensors, and its files hold {len(folder.tensors):,}. Take all "
            "files from one source."
        )


def _has_fused_experts(keys: Mapping[str, Any]) -> bool:
    return any(".mlp.experts." in key or ".mlp.router." in key for key in keys)


def _chat_template(folder: HfFolder, found: HfModel) -> RecognisedTemplate:
    raw = folder.kept_files.get(_TOKENIZER_CONFIG_NAME, b"{}")
    fix = "Copy it again, or remove it."
    with about(folder.folder / _TOKENIZER_CONFIG_NAME, fix):
        values = parse_json_object(raw)
    if _JINJA_NAME in folder.kept_files:  # where transformers 5 writes the template
        with about(folder.folder / _JINJA_NAME, fix):
            values["chat_template"] = folder.kept_files[_JINJA_NAME].decode("utf-8")
    return recognise_chat_template(values, family=found.family)


def _state(
    folder: HfFolder,
    found: HfModel,
    planned: Mapping[str, PlannedTensor],
    *,
    window: str,
    skipped: tuple[str, ...],
    alias: Mapping[str, str],
) -> dict[str, Any]:
    return {
        "train": {
            "run_id": "converted",
            "precision": common_precision({one.dtype for one in planned.values()}),
            "step": 0,
            "tokens_seen": 0,
            "consecutive_skips": 0,
            "skipped_steps": [],
        },
        "origin": {
            "folder": folder.folder.resolve().name,
            "family": found.family,
            "window": window,
            "skipped": list(skipped),
            "stores_tied_head": bool(alias),
        },
    }


def _write(
    building: Path,
    planned: Mapping[str, PlannedTensor],
    reader: TensorReader,
    config: TrainConfig,
    state: Mapping[str, Any],
    extra: Mapping[str, bytes],
    *,
    on_progress: OnProgress,
) -> None:
    files = {
        **extra,
        "config.json": json.dumps(dataclasses.asdict(config), indent=1).encode(),
        STATE_NAME: json.dumps(dict(state), separators=(",", ":")).encode(),
    }
    records = [
        FileRecord(name, *write_new_file(building / name, [raw])) for name, raw in files.items()
    ]
    total = sum(one.num_bytes for one in planned.values())
    count = bytes_done(on_progress, "MiB written", total)
    written = write_tensor_file(building / _MODEL_NAME, planned, reader, on_bytes=count)
    records.append(FileRecord(_MODEL_NAME, *written))
    manifest = Manifest(
        step=0,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
        written_by={"python": platform.python_version()},
        files=tuple(records),
        tensors={"model": {k: TensorRecord(one.dtype, one.shape) for k, one in planned.items()}},
    )
    write_new_file(building / MANIFEST_NAME, [manifest_bytes(manifest)])
