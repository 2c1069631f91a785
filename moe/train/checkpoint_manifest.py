"""What a checkpoint's manifest.json says, and whether one read from a disk can be believed.

The manifest lists every file with its size and SHA-256 and every tensor with its type and shape. It
has one allowed spelling, byte for byte, that contains the SHA-256 of the rest of it: any changed
bit, even in white space, is found. Tensors are listed as the whole ones that they are, whether one
file holds them (model.safetensors) or several (model-00001-of-00004.safetensors, ...).
"""

from __future__ import annotations

import hashlib
import json
import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moe.train.tensor_header import TensorRecord

SCHEMA_VERSION = 1
MANIFEST_NAME = "manifest.json"
STATE_NAME = "state.json"
TENSOR_SUFFIX = ".safetensors"

_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SHARD = re.compile(r"(.+)-([0-9]{5})-of-([0-9]{5})\.safetensors")


@dataclass(frozen=True)
class FileRecord:
    """One file of a checkpoint: its plain name, its length in bytes, its SHA-256."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """One checkpoint's contents; `tensors` maps a file's stem to its tensors by name."""

    step: int
    created: str  # UTC, ISO 8601
    written_by: Mapping[str, str]  # program -> version
    files: tuple[FileRecord, ...]
    tensors: Mapping[str, Mapping[str, TensorRecord]]


def is_plain_name(name: object) -> bool:
    """Whether name is a file name without any folder in it, in letters that every system allows."""
    return isinstance(name, str) and _PLAIN_NAME.fullmatch(name) is not None


def shard_name(stem: str, number: int, *, num_shards: int) -> str:
    """The name of one of several files that hold a stem's tensors; numbers begin with 1."""
    return f"{stem}-{number:05d}-of-{num_shards:05d}{TENSOR_SUFFIX}"


def is_stem(stem: object) -> bool:
    """Whether a stem makes file names that are plain and that no other stem can have."""
    is_plain = isinstance(stem, str) and is_plain_name(shard_name(stem, 1, num_shards=1))
    return is_plain and not _SHARD.fullmatch(f"{stem}{TENSOR_SUFFIX}")


def tensor_files(manifest: Manifest, stem: str) -> tuple[str, ...]:
    """The names of the files that hold a stem's tensors, in order."""
    names = {file.name for file in manifest.files}
    if stem + TENSOR_SUFFIX in names:
        return (stem + TENSOR_SUFFIX,)
    return tuple(sorted(n for n in names if (m := _SHARD.fullmatch(n)) and m[1] == stem))


def manifest_bytes(manifest: Manifest) -> bytes:
    """The one allowed spelling of a manifest, its own hash included."""
    return _spelled(
        {
            "schema": SCHEMA_VERSION,
            "step": manifest.step,
            "created": manifest.created,
            "written_by": dict(manifest.written_by),
            "files": {f.name: {"size": f.size, "sha256": f.sha256} for f in manifest.files},
            "tensors": {
                stem: {name: [record.dtype, *record.shape] for name, record in table.items()}
                for stem, table in manifest.tensors.items()
            },
        }
    )


def _spelled(content: dict[str, Any]) -> bytes:
    body = {key: value for key, value in content.items() if key != "content_sha256"}
    compact = json.dumps(body, sort_keys=True, separators=(",", ":")).encode("ascii")
    body["content_sha256"] = hashlib.sha256(compact).hexdigest()
    return json.dumps(body, sort_keys=True, indent=1).encode("ascii") + b"\n"


def parse_manifest(raw: bytes) -> Manifest:
    """Read a manifest, believing nothing. Raises ValueError saying what is wrong with it."""
    try:
        content = json.loads(raw.decode("ascii"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError("it is not a JSON object")
    schema = content.get("schema")
    if type(schema) is not int or schema != SCHEMA_VERSION:
        raise ValueError(
            f"its schema is {reprlib.repr(schema)}; this program reads schema {SCHEMA_VERSION}"
        )
    try:
        believable = _spelled(content) == raw
    except (ValueError, RecursionError):
        believable = False
    if not believable:
        raise ValueError("its content does not match the SHA-256 it gives for itself")
    keys = {"schema", "step", "created", "written_by", "files", "tensors", "content_sha256"}
    if set(content) != keys:
        raise ValueError(
            f"its keys are {reprlib.repr(sorted(content))}; they must be {sorted(keys)}"
        )
    manifest = Manifest(
        step=_count(content["step"], "step"),
        created=_text(content["created"], "created"),
        written_by={
            name: _text(version, f"written_by.{name}")
            for name, version in _object(content["written_by"], "written_by").items()
        },
        files=tuple(
            _file(name, entry) for name, entry in _object(content["files"], "files").items()
        ),
        tensors={
            stem: _table(stem, entry)
            for stem, entry in _object(content["tensors"], "tensors").items()
        },
    )
    _check_tensor_files(manifest)
    return manifest


def _check_tensor_files(manifest: Manifest) -> None:
    """Each stem has one file or all of its shards, and every tensor file belongs to a stem."""
    names = {file.name for file in manifest.files}
    stored = {name for name in names if name.endswith(TENSOR_SUFFIX)}
    described = set()
    for stem in manifest.tensors:
        files = tensor_files(manifest, stem)
        described |= set(files)
        match = _SHARD.fullmatch(files[0]) if files else None
        if not files:
            described.add(stem + TENSOR_SUFFIX)
        elif match and files[0] != stem + TENSOR_SUFFIX:
            count = int(match[3])
            if files != tuple(shard_name(stem, n, num_shards=count) for n in range(1, count + 1)):
                raise ValueError(
                    f"it lists {len(files)} files of {stem}, {reprlib.repr(list(files))}; it must "
                    f"list those from 1 to {count} of {count}, as the first one says"
                )
    if stored != described:
        raise ValueError(f"it lists {reprlib.repr(stored)} but describes {reprlib.repr(described)}")
    if STATE_NAME not in names:
        raise ValueError(f"it does not list {STATE_NAME}")


def _file(name: str, entry: Any) -> FileRecord:
    if not is_plain_name(name) or name == MANIFEST_NAME:
        raise ValueError(
            f"it lists {reprlib.repr(name)}, which is not the plain name of a checkpoint's file"
        )
    values = _object(entry, f"files.{name}")
    sha256 = values.get("sha256")
    if not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
        raise ValueError(
            f"files.{name}.sha256 is {reprlib.repr(sha256)}; it must be 64 hexadecimal digits"
        )
    return FileRecord(name, _count(values.get("size"), f"files.{name}.size"), sha256)


def _table(stem: str, entry: Any) -> dict[str, TensorRecord]:
    table = {}
    for name, values in _object(entry, f"tensors.{stem}").items():
        if not isinstance(values, list) or not values:
            raise ValueError(
                f"tensors.{stem}.{name} is {reprlib.repr(values)}; it must be [type, sizes...]"
            )
        sizes = tuple(_count(size, f"tensors.{stem}.{name}") for size in values[1:])
        table[name] = TensorRecord(_text(values[0], f"tensors.{stem}.{name}"), sizes)
    return table


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{where} is {reprlib.repr(value)}; it must be an object")
    return value


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where} is {reprlib.repr(value)}; it must be text")
    return value


def _count(value: Any, where: str) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(
            f"{where} is {reprlib.repr(value)}; it must be a whole number of at least 0"
        )
    return value
