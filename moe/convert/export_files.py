"""The small files of an exported model: configuration, generation, tokenizer, model card.

Files that came with a published model are given back byte for byte while they still describe the
model; the others are written from what we know.
"""

from __future__ import annotations

import json
from typing import Any

from moe.convert.hf_config import config_describes, to_hf_config
from moe.convert.hf_config_write import ARCHITECTURES, published_special_ids
from moe.convert.hf_folder import CONFIG_NAME, KEPT_NAMES, KEPT_PREFIX, TOKENIZER_NAMES
from moe.convert.model_card import model_card
from moe.convert.pick_tokenizer import tokenizer_file_name
from moe.data.manifest import TOKENIZER_NAME
from moe.errors import ConfigError
from moe.load_run import OpenedRun
from moe.text_habits import begins_with_bos
from moe.train.tensor_header import parse_json_object

_GENERATION_NAME = "generation_config.json"
# transformers has these classes: a folder of another type needs code of its own
_NATIVE_TYPES = ("phi3", "phimoe")


def export_files(opened: OpenedRun, *, dtype: str, window: str) -> dict[str, bytes]:
    """Content of each file by name. Raises ConfigError where the model has no published form."""
    kept = _kept_files(opened)
    ids = _special_ids(opened)
    config = kept.pop(CONFIG_NAME, None)
    files = {CONFIG_NAME: _config(opened, config, dtype=dtype, window=window, special_ids=ids)}
    tokenizer_files = _tokenizer_files(opened, kept)
    generation = kept.pop(_GENERATION_NAME, None) or (_json(ids) if ids else None)
    if generation is not None:
        files[_GENERATION_NAME] = generation
    files |= tokenizer_files
    files["README.md"] = model_card(opened, window=window, has_tokenizer=bool(tokenizer_files))
    return files


def _kept_files(opened: OpenedRun) -> dict[str, bytes]:
    checkpoint = opened.checkpoint
    return {
        name: checkpoint.file(KEPT_PREFIX + name).read_bytes()
        for name in (*KEPT_NAMES, *TOKENIZER_NAMES)
        if KEPT_PREFIX + name in checkpoint.verified
    }


def _config(
    opened: OpenedRun, kept: bytes | None, *, dtype: str, window: str, special_ids: dict[str, Any]
) -> bytes:
    model, router = opened.config.model, opened.config.router
    if kept is not None:
        values = parse_json_object(kept)
        family = values.get("model_type")
        if family in ARCHITECTURES and _describes(values, opened, window=window):
            if family not in _NATIVE_TYPES:
                return kept
            # its code is not given with it, and transformers has classes of its own
            has_code = values.pop("auto_map", None)
            # transformers writes its own class, which nothing else looks up
            has_other_name = values.get("architectures") != [ARCHITECTURES[family]]
            values["architectures"] = [ARCHITECTURES[family]]
            return _json(values) if has_code or has_other_name else kept
    return _json(to_hf_config(model, router, dtype=dtype, window=window, special_ids=special_ids))


def _describes(values: dict[str, Any], opened: OpenedRun, *, window: str) -> bool:
    model, router = opened.config.model, opened.config.router
    try:
        return config_describes(values, model, router, where=CONFIG_NAME, window=window)
    except ConfigError:
        return False


def _special_ids(opened: OpenedRun) -> dict[str, Any]:
    """What begins, ends and pads texts, as generation_config.json has it; empty if not known."""
    from moe.load_run import open_tokenizer

    tokenizer = open_tokenizer(opened)
    if tokenizer is None:
        return published_special_ids(opened.config.model)
    return {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": list(tokenizer.stop_ids),
        "pad_token_id": tokenizer.pad_id,
    }


def _tokenizer_files(opened: OpenedRun, kept: dict[str, bytes]) -> dict[str, bytes]:
    """The published files where the model came with them, else files made from our tokenizer."""
    from moe.load_run import open_tokenizer

    files = {name: raw for name, raw in kept.items() if name not in (CONFIG_NAME, _GENERATION_NAME)}
    checkpoint = opened.checkpoint
    if files:
        has_own = any(name in files for name in TOKENIZER_NAMES)
        if TOKENIZER_NAME in checkpoint.verified and not has_own:
            content = checkpoint.file(TOKENIZER_NAME).read_bytes()
            files[tokenizer_file_name(content)] = content
        return files
    tokenizer = open_tokenizer(opened)
    if tokenizer is None:
        return {}
    from moe.convert.tokenizer_files import hugging_face_tokenizer_files

    return hugging_face_tokenizer_files(
        tokenizer,
        chat_template=opened.config.tokenizer.chat_template,
        max_length=opened.config.model.usable_length,
        adds_bos=begins_with_bos(checkpoint),
    )


def _json(values: dict[str, Any]) -> bytes:
    return json.dumps(values, indent=2, sort_keys=True).encode() + b"\n"
