"""How a model's texts begin and end: the first token, the tokens that stop it."""

from __future__ import annotations

import json
from typing import Any

from moe.errors import CheckpointError
from moe.load_run import LoadedRun
from moe.train.atomic_files import read_small_file
from moe.train.checkpoint import Checkpoint

# the published files that a converted model keeps
_GENERATION_CONFIG, _TOKENIZER_CONFIG = "hf_generation_config.json", "hf_tokenizer_config.json"
_PUBLISHED_CONFIG, _TOKENIZER_JSON = "hf_config.json", "hf_tokenizer.json"
_LIMIT_BYTES = 64 * 2**20


def begins_with_bos(checkpoint: Checkpoint) -> bool:
    """Whether a plain text begins with the tokenizer's first token.

    A model trained here saw it before every document, and its export says so. A model that came
    from a Hugging Face folder does what transformers does with that folder: add_bos_token of
    tokenizer_config.json, and where it is not given, the template in tokenizer.json.
    """
    if _PUBLISHED_CONFIG not in checkpoint.verified:
        return True
    said = _read(checkpoint, _TOKENIZER_CONFIG).get("add_bos_token")
    if said is not None:
        return bool(said)
    return _template_adds_bos(_read(checkpoint, _TOKENIZER_JSON).get("post_processor"))


def stop_ids(run: LoadedRun) -> tuple[int, ...]:
    """Tokens that end a text: the tokenizer's, and those of a published generation_config.

    The published lists do not all name <|end|>, on which every chat must stop. Empty where the
    model came without either file.
    """
    named = _read(run.checkpoint, _GENERATION_CONFIG).get("eos_token_id")
    named = named if isinstance(named, list) else [] if named is None else [named]
    if not all(type(token) is int for token in named):
        raise CheckpointError(
            f"{run.checkpoint.folder / _GENERATION_CONFIG}: eos_token_id is {named!r}; it must be "
            "a token id or a list of them. Correct the file and convert the model again, or give "
            "stop_ids=[...]."
        )
    own = run.tokenizer.stop_ids if run.tokenizer else ()
    return tuple(sorted({*own, *named}))


def _template_adds_bos(post_processor: Any) -> bool:
    """Whether a post-processor of tokenizer.json, or one of a sequence, puts a token first."""
    if not isinstance(post_processor, dict):
        return False
    several = post_processor.get("processors")
    if isinstance(several, list):
        return any(map(_template_adds_bos, several))
    single = post_processor.get("single")
    first = single[0] if isinstance(single, list) and single else None
    return isinstance(first, dict) and "SpecialToken" in first


def _read(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    """A kept JSON file; empty where the model has none."""
    if name not in checkpoint.verified:
        return {}
    path = checkpoint.file(name)
    try:
        values = json.loads(read_small_file(path, limit_bytes=_LIMIT_BYTES))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error}). Convert the model again."
        ) from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: holds no JSON object. Convert the model again.")
    return values
