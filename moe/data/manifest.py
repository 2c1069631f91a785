"""What manifest.json of a prepared folder says, and whether the folder still agrees with it.

The manifest is written last and seals itself with a SHA-256, and it holds the size and SHA-256 of
every other file; so whatever changes later is found, and named.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moe.config_from_dict import from_dict
from moe.errors import ConfigError, DataError
from moe.progress_call import ProgressCall, no_progress
from moe.train.atomic_files import hash_file

MANIFEST_NAME = "manifest.json"
TOKENIZER_NAME = "tokenizer.model"
FORMAT_VERSION = 1
SPLITS = ("train", "validation")
HOW_TO_PREPARE = "Prepare it with: python launch/prepare_data.py paths.data_dir="


@dataclass(frozen=True)
class FileEntry:
    """A file of the folder; num_bytes is its size on disk."""

    name: str
    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class DomainCount:
    """What one domain adds to a split; num_bytes counts UTF-8 text, tokens include <s> and end."""

    name: str
    num_documents: int
    num_tokens: int
    num_bytes: int


@dataclass(frozen=True)
class SplitEntry:
    """One split: its shards in order, its document table, and its counts."""

    name: str
    shards: tuple[FileEntry, ...]
    documents: FileEntry
    num_documents: int
    num_tokens: int
    num_bytes: int
    domains: tuple[DomainCount, ...]  # in the order of the domain indices, the same in every split


@dataclass(frozen=True)
class SkipCount:
    """How many files or documents of the sources were left out for one reason."""

    reason: str
    count: int
    examples: tuple[str, ...] = ()  # the first few names


@dataclass(frozen=True)
class Manifest:
    """All that is known about a prepared folder.

    settings is the JSON text of the configuration keys that decide the content, by full path.
    fingerprint is a hash of everything that defines the stream of token ids, and of nothing else:
    two machines with the same fingerprint train on the same tokens.
    """

    format_version: int
    seed: int
    dtype: str  # "uint16" or "uint32", little endian on disk
    vocab_size: int
    bos_id: int
    end_of_text_id: int
    domains: tuple[str, ...]
    tokenizer: FileEntry
    splits: tuple[SplitEntry, ...]
    sources: tuple[str, ...]
    skipped: tuple[SkipCount, ...]
    settings: str
    fingerprint: str

    def split(self, name: str) -> SplitEntry:
        """The entry of "train" or "validation"."""
        for entry in self.splits:
            if entry.name == name:
                return entry
        raise DataError(f"split: got {name!r}; allowed: {', '.join(s.name for s in self.splits)}.")

    def files(self) -> list[FileEntry]:
        """Every file of the folder but the manifest itself."""
        entries = [self.tokenizer]
        for entry in self.splits:
            entries += [*entry.shards, entry.documents]
        return entries


def fingerprint_of(
    tokenizer: FileEntry, splits: Iterable[SplitEntry], *, dtype: str, domains: tuple[str, ...]
) -> str:
    """SHA-256 over the contents of the tokenizer, shards and document tables, in order."""
    stream = {
        "format": FORMAT_VERSION, "dtype": dtype, "domains": domains, "tokenizer": tokenizer.sha256,
        "splits": [[s.name, [f.sha256 for f in s.shards], s.documents.sha256] for s in splits],
    }  # fmt: skip
    return hashlib.sha256(json.dumps(stream, sort_keys=True).encode()).hexdigest()


def write_manifest(manifest: Manifest, folder: Path) -> None:
    """Write manifest.json with its seal, and make sure that it is on the disk."""
    fields = asdict(manifest)
    fields["seal"] = _seal(fields)
    with (folder / MANIFEST_NAME).open("w", encoding="utf-8") as file:
        json.dump(fields, file, indent=1, sort_keys=True)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def read_manifest(data_dir: str | Path, *, verify: bool) -> Manifest:
    """Read manifest.json and check the size of every file it names; with verify, their hashes too.

    Raises DataError naming the folder, or the file that is missing, changed, or not a plain
    file inside the folder.
    """
    manifest = load_manifest(data_dir)
    for entry in manifest.files():
        require_file(Path(data_dir), entry)
        if verify:
            require_hash(Path(data_dir), entry)
    return manifest


def load_manifest(data_dir: str | Path) -> Manifest:
    """Read manifest.json alone; raises DataError for a folder that has none, or a damaged one."""
    folder = Path(data_dir)
    path = folder / MANIFEST_NAME
    if not folder.is_dir():
        raise DataError(
            f"paths.data_dir: {data_dir} does not exist. {HOW_TO_PREPARE}{data_dir} "
            "(with the same data and tokenizer groups)."
        )
    try:
        _require_plain(path.lstat(), path)
        fields = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DataError(
            f"{path}: is missing, so {data_dir} is not a prepared data folder. "
            f"{HOW_TO_PREPARE}<a new folder>"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read ({error}). {_again(folder)}") from None
    return _parse(fields, path=path)


def require_file(folder: Path, entry: FileEntry) -> os.stat_result:
    """The state of a file that must be there, plain and of its size; raises DataError."""
    path = folder / entry.name
    try:
        status = path.lstat()
    except FileNotFoundError:
        raise DataError(f"{path}: is missing. {_again(folder)}") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}).") from None
    _require_plain(status, path)
    if status.st_size != entry.num_bytes:
        raise DataError(
            f"{path}: has {status.st_size} bytes; it was written with {entry.num_bytes}. "
            f"{_again(folder)}"
        )
    return status


def require_hash(folder: Path, entry: FileEntry, *, progress: ProgressCall = no_progress) -> None:
    """Hash a file and compare; progress is told of the bytes. Raises DataError."""
    path = folder / entry.name
    try:
        written, _ = hash_file(path, progress=progress)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path}: cannot be read ({reason}).") from None
    if written.sha256 != entry.sha256:
        raise DataError(
            f"{path}: its content changed after it was written (SHA-256 differs). {_again(folder)}"
        )


def file_entry(path: Path) -> FileEntry:
    """Size and SHA-256 of a file as it is now."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return FileEntry(path.name, path.stat().st_size, digest)


def _parse(fields: Any, *, path: Path) -> Manifest:
    if not isinstance(fields, dict) or fields.get("format_version") != FORMAT_VERSION:
        found = fields.get("format_version") if isinstance(fields, dict) else fields
        raise DataError(
            f"{path}: has format {found!r}; this version reads {FORMAT_VERSION}. "
            f"{_again(path.parent)}"
        )
    seal = fields.pop("seal", None)
    if seal != _seal(fields):
        raise DataError(f"{path}: was changed after it was written. {_again(path.parent)}")
    try:
        manifest = from_dict(Manifest, fields)
    except (ConfigError, TypeError) as error:
        raise DataError(f"{path}: {error} {_again(path.parent)}") from None
    names = [entry.name for entry in manifest.files()]
    for name in names:
        # a name with a folder in it, or "..", could reach files outside
        if name != Path(name).name or name in ("", ".", "..", MANIFEST_NAME) or "\\" in name:
            raise DataError(f"{path}: names the file {name!r}, which is not in its folder.")
    if len(set(names)) != len(names) or tuple(s.name for s in manifest.splits) != SPLITS:
        raise DataError(f"{path}: its list of files is not consistent. {_again(path.parent)}")
    if manifest.dtype not in ("uint16", "uint32"):
        raise DataError(f"{path}: dtype is {manifest.dtype!r}; allowed: uint16, uint32.")
    return manifest


def _require_plain(status: os.stat_result, path: Path) -> None:
    """Refuse a link: its target is outside the folder's control."""
    if not stat.S_ISREG(status.st_mode):
        raise DataError(f"{path}: is not a plain file (a link or a folder); prepared files are.")


def _seal(fields: dict[str, Any]) -> str:
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _again(folder: Path) -> str:
    return f"{HOW_TO_PREPARE}{folder} overwrite=true"
