"""How a model's texts begin and end: the first token, the tokens that stop it."""

from __future__ import annotations

import json
from typing import Any

from moe.errors import CheckpointError
from moe.load_run import LoadedRun
from moe.train.atomic_files import read_small_file

# the published files that a converted model keeps
_GENERATION_CONFIG, _TOKENIZER_CONFIG = "hf_generation_config.json", "hf_tokenizer_config.json"
_PUBLISHED_CONFIG = "hf_config.json"
_LIMIT_BYTES = 16 * 2**20


def begins_with_bos(run: LoadedRun) -> bool:
    """Whether a plain text begins with the tokenizer's first token.

    A model trained here saw it before every document. For a published one its tokenizer_config
    says so (add_bos_token, false in all current ones), as transformers reads it.
    """
    if _PUBLISHED_CONFIG not in run.checkpoint.verified:
        return True
    return bool(_read(run, _TOKENIZER_CONFIG).get("add_bos_token", False))


def stop_ids(run: LoadedRun) -> tuple[int, ...]:
    """Tokens that end a text: the tokenizer's, and those of a published generation_config.

    The published lists do not all name <|end|>, on which every chat must stop. Empty where the
    model came without either file.
    """
    named = _read(run, _GENERATION_CONFIG).get("eos_token_id")
    named = named if isinstance(named, list) else [] if named is None else [named]
    if not all(type(token) is int for token in named):
        raise CheckpointError(
            f"{run.checkpoint.folder / _GENERATION_CONFIG}: eos_token_id is {named!r}; it must be "
            "a token id or a list of them. Correct the file and convert the model again, or give "
            "stop_ids=[...]."
        )
    own = run.tokenizer.stop_ids if run.tokenizer else ()
    return tuple(sorted({*own, *named}))


def _read(run: LoadedRun, name: str) -> dict[str, Any]:
    """A kept JSON file; empty where the model has none."""
    if name not in run.checkpoint.verified:
        return {}
    path = run.checkpoint.file(name)
    try:
        values = json.loads(read_small_file(path, limit_bytes=_LIMIT_BYTES))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error}). Convert the model again."
        ) from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: holds no JSON object. Convert the model again.")
    return values
