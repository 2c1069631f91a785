"""What a Hugging Face folder holds: config.json, its tensors over all shards, its other files.

Nothing that the folder says is believed: a shard's name must be a plain name in the folder, a key
must be in the shard that the index names and in no other. Links are refused, but for those of the
Hugging Face cache: there a snapshot is a folder of links to files of the same model's blobs/.
"""

from __future__ import annotations

import contextlib
import os
import reprlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe.errors import CheckpointError
from moe.train.atomic_files import read_small_file
from moe.train.checkpoint_manifest import is_plain_name
from moe.train.tensor_header import (
    LFS_POINTER,
    StoredTensor,
    parse_json_object,
    read_stored_tensors,
)

CONFIG_NAME = "config.json"
SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
# kept in a converted model under the prefix hf_, and given back when it is exported
KEPT_NAMES = (
    CONFIG_NAME, "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
)  # fmt: skip
KEPT_PREFIX = "hf_"
TOKENIZER_NAMES = ("tokenizer.model", "cl100k_base.tiktoken")
_ADAPTER_NAME = "adapter_config.json"
# names that torch.compile and data-parallel wrappers put into keys
_COMPILED, _PARALLEL = "_orig_mod.", "module."
_SMALL_LIMIT_BYTES = 64 * 2**20
_COPY_AGAIN = "Copy the folder again from where it was published."


@dataclass(frozen=True)
class HfFolder:
    """An opened folder; only headers have been read, no tensor's values."""

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, StoredTensor]
    is_wrapped: bool  # the keys had a wrapper's prefix, which is taken off
    kept_files: dict[str, bytes]  # by their own names
    tokenizer: Path | None  # a SentencePiece model or tiktoken ranks


def is_hf_folder(folder: Path) -> bool:
    """Whether this looks like a published model, or like a part or another form of one."""
    names = (SINGLE_NAME, INDEX_NAME, CONFIG_NAME, _ADAPTER_NAME)
    return any((folder / name).exists() for name in names) or any(folder.glob("*.gguf"))


def file_of(folder: Path, name: str) -> Path:
    """Where a file of the folder is: there, or in blobs/ where the folder is a snapshot of the
    Hugging Face cache and the file a link into it. Any other link is left, to be refused."""
    path = folder / name
    if not path.is_symlink():
        return path
    snapshot = folder.resolve()
    target = Path(os.path.normpath(snapshot / os.readlink(path)))
    is_blob = (
        snapshot.parent.name == "snapshots"
        and target.parent == snapshot.parent.parent / "blobs"
        and not target.is_symlink()
    )
    return target if is_blob else path


def open_hf_folder(folder: Path) -> HfFolder:
    """Read config.json, the index and every shard's header. Raises CheckpointError naming the file.

    Allowed: one model.safetensors, or model.safetensors.index.json with shards beside it.
    """
    _require_model(folder)
    config = _read_config(folder)
    stored = _read_tensors(folder)
    tensors = _without_wrapper(stored, folder)
    kept = {name: raw for name in KEPT_NAMES if (raw := _read_if_there(folder, name)) is not None}
    found = [folder / name for name in TOKENIZER_NAMES if os.path.lexists(folder / name)]
    is_wrapped = tensors.keys() != stored.keys()
    return HfFolder(folder, config, tensors, is_wrapped, kept, found[0] if found else None)


def _require_model(folder: Path) -> None:
    """Refuse, by what it is, a folder without a model of its own."""
    if any(os.path.lexists(folder / name) for name in (SINGLE_NAME, INDEX_NAME)):
        return
    if (folder / _ADAPTER_NAME).exists():
        raise CheckpointError(
            f"{folder}: {_ADAPTER_NAME} says that this is a PEFT adapter, which holds only what it "
            "changes of another model. Merge it into that model and convert the result: "
            "AutoPeftModelForCausalLM.from_pretrained(FOLDER).merge_and_unload()"
            ".save_pretrained(NEW)."
        )
    ggufs = sorted(path.name for path in folder.glob("*.gguf"))
    if ggufs:
        raise CheckpointError(
            f"{folder}: holds {ggufs[0]}, llama.cpp's form of a model, which is not read, and no "
            "*.safetensors. Give the folder that it was made from."
        )


def _read_config(folder: Path) -> dict[str, Any]:
    with about(folder / CONFIG_NAME, "Give the folder of a model that transformers can open."):
        return parse_json_object(read_file(folder, CONFIG_NAME))


def _read_tensors(folder: Path) -> dict[str, StoredTensor]:
    has_single, has_index = (os.path.lexists(folder / n) for n in (SINGLE_NAME, INDEX_NAME))
    if has_single and has_index:
        raise CheckpointError(
            f"{folder}: has both {SINGLE_NAME} and {INDEX_NAME}; allowed: one of them, as they may "
            "be different models. Move the one that does not belong to this model away."
        )
    if has_index:
        return _read_shards(folder)
    if has_single:
        with about(folder / SINGLE_NAME, _COPY_AGAIN):
            return read_stored_tensors(file_of(folder, SINGLE_NAME))
    pickles = sorted(folder.glob("*.bin"))
    why = (
        f" {pickles[0].name} is a pickle, which can run code and is not read: let its author save "
        "it again with safe_serialization=True."
        if pickles
        else " Download the model's *.safetensors files into this folder too."
    )
    raise CheckpointError(f"{folder}: has neither {SINGLE_NAME} nor {INDEX_NAME}.{why}")


def _read_shards(folder: Path) -> dict[str, StoredTensor]:
    with about(folder / INDEX_NAME, _COPY_AGAIN):
        shard_of = _weight_map(parse_json_object(read_file(folder, INDEX_NAME)))
    tensors: dict[str, StoredTensor] = {}
    for name in sorted(set(shard_of.values())):
        with about(folder / name, _COPY_AGAIN):
            for key, tensor in read_stored_tensors(file_of(folder, name)).items():
                if key in tensors:
                    other = shard_of.get(key, tensors[key].path.name)
                    raise ValueError(f"its tensor {key} is in {other} too; one of them is wrong")
                if shard_of.get(key) != name:
                    said = shard_of.get(key)
                    raise ValueError(
                        f"it holds {key}, which {INDEX_NAME} "
                        + (f"says is in {said}" if said else "does not list")
                    )
                tensors[key] = tensor
    missing = [key for key in shard_of if key not in tensors]
    if missing:
        raise CheckpointError(
            f"{folder / shard_of[missing[0]]}: does not hold {listed(missing)}, which {INDEX_NAME} "
            f"says it does. {_COPY_AGAIN}"
        )
    return tensors


def _without_wrapper(tensors: dict[str, StoredTensor], folder: Path) -> dict[str, StoredTensor]:
    """The tensors under their own keys, should a wrapped model have been saved."""
    is_parallel = all(key.startswith(_PARALLEL) for key in tensors)
    plain: dict[str, StoredTensor] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(_PARALLEL) if is_parallel else key
        name = name.replace(_COMPILED, "")
        if name in plain:
            raise CheckpointError(
                f"{folder}: {name} is there twice, once as {key}: a wrapped model and the model "
                "itself were saved together. Save one of them again."
            )
        plain[name] = tensor
    return plain


def _weight_map(index: dict[str, Any]) -> dict[str, str]:
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(
            f"its weight_map is {reprlib.repr(weight_map)}; it must name each tensor's file"
        )
    for key, name in weight_map.items():
        if not is_plain_name(name) or not name.endswith(".safetensors"):
            raise ValueError(
                f"its weight_map says that {reprlib.repr(key)} is in {reprlib.repr(name)}; allowed "
                "are names of *.safetensors files in the same folder, without any path"
            )
    return weight_map


def _read_if_there(folder: Path, name: str) -> bytes | None:
    if not os.path.lexists(folder / name):
        return None
    with about(folder / name, _COPY_AGAIN):
        return read_file(folder, name)


def read_file(folder: Path, name: str) -> bytes:
    """A small file of the folder. Raises OSError, or ValueError saying what is wrong with it."""
    raw = read_small_file(file_of(folder, name), limit_bytes=_SMALL_LIMIT_BYTES)
    if raw.startswith(LFS_POINTER):
        raise ValueError("it is a Git LFS pointer, not the file (git lfs pull fetches it)")
    return raw


@contextlib.contextmanager
def about(path: Path, fix: str) -> Iterator[None]:
    """Turn a reason into one CheckpointError: the file, what is wrong with it, what to do."""
    try:
        yield
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: is missing. {fix}") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}). {fix}") from error
    except ValueError as error:
        if "symbolic link" in str(error):
            fix = "Copy the folder with its links followed: cp -rL FOLDER COPY."
        raise CheckpointError(f"{path}: {error}. {fix}") from error


def listed(names: list[str], *, limit: int = 4) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
