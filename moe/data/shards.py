"""How token ids lie on disk: raw little-endian shards and a table of documents, memory-mapped.

Every document is <s>, its text's tokens, <|endoftext|>, and lies whole in one shard.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from moe.data.document_table import (
    DOCUMENT_DTYPE,
    ShardPlaces,
    check_rows,
    check_sums,
    open_table,
)
from moe.data.manifest import FileEntry, Manifest, file_entry, load_manifest, read_manifest
from moe.data.shard_maps import ShardMaps
from moe.errors import DataError

SHARD_BYTES = 256 * 2**20
_CHECKED_AT_ONCE = 2**20  # documents; 0.1 s


def token_dtype(vocab_size: int) -> str:
    """The smallest of uint16 and uint32 that holds every id below vocab_size."""
    return "uint16" if vocab_size <= 2**16 else "uint32"


@dataclass(frozen=True)
class TokenSplit:
    """One split, memory-mapped; pickled as its path, so that workers map the files themselves."""

    data_dir: Path
    name: str
    manifest: Manifest
    shards: ShardMaps  # (tokens of the shard,) each
    documents: np.ndarray  # (num_documents,) of DOCUMENT_DTYPE, mapped
    places: ShardPlaces  # of the shards among all tokens and documents

    @property
    def num_documents(self) -> int:
        return len(self.documents)

    @property
    def num_tokens(self) -> int:
        return self.manifest.split(self.name).num_tokens

    @property
    def domains(self) -> tuple[str, ...]:
        """Names of the domain indices; the same in every split."""
        return self.manifest.domains

    @property
    def table_path(self) -> Path:
        """The file that documents maps."""
        return self.data_dir / self.manifest.split(self.name).documents.name

    def tokens(self, document: int) -> np.ndarray:
        """Ids of a document, (tokens,), from <s> to <|endoftext|>; a view into the shard."""
        row = self.documents[document]
        start = int(row["offset"])
        return self.shards[row["shard"]][start : start + int(row["tokens"])]

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (str(self.data_dir), self.name, self.manifest.fingerprint)


def open_split(data_dir: str | Path, split: str, *, verify: bool) -> TokenSplit:
    """Memory-map "train" or "validation" of a prepared folder.

    The size of every file, and where each shard begins in the document table, are always checked;
    a table that does not take long also row by row; SHA-256 of every file with verify. Raises
    DataError naming the file that is missing or damaged, or how to prepare the folder.
    """
    return _map_split(data_dir, split, read_manifest(data_dir, verify=verify), check=True)


def _map_split(data_dir: str | Path, split: str, manifest: Manifest, *, check: bool) -> TokenSplit:
    folder = Path(data_dir).absolute()
    entry = manifest.split(split)
    documents, places = open_table(folder, entry, dtype=manifest.dtype)
    if check and len(documents) <= _CHECKED_AT_ONCE:
        path = folder / entry.documents.name
        whole = range(len(documents))
        num_domains = len(entry.domains)
        sums = check_rows(documents, whole, places=places, num_domains=num_domains, path=path)
        check_sums(entry, sums, path=path)
    shards = ShardMaps(folder, entry.shards, np.dtype(manifest.dtype).newbyteorder("<"))
    return TokenSplit(folder, split, manifest, shards, documents, places)


class SplitWriter:
    """Writes documents of one split one after another into shards, then the table.

    A context manager: leaving it closes the open shard. Call finish() for the entry.
    """

    def __init__(self, folder: Path, split: str, *, dtype: str, shard_bytes: int) -> None:
        self._folder, self._split, self._shard_bytes = folder, split, shard_bytes
        self._item = np.dtype(dtype).newbyteorder("<")
        self._file: BinaryIO | None = None
        self._hash = hashlib.sha256()
        self._size = 0
        self._entries: list[FileEntry] = []
        self._rows: list[tuple[int, int, int, int, int]] = []

    def __enter__(self) -> SplitWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def add(self, tokens: np.ndarray, *, num_bytes: int, domain: int) -> None:
        """Append one document's ids, (tokens,)."""
        content = tokens.astype(self._item).tobytes()
        if self._size and self._size + len(content) > self._shard_bytes:
            self._close_shard()
        if self._file is None:
            self._file = (self._folder / self._shard_name()).open("xb")
        offset = self._size // self._item.itemsize
        self._rows.append((len(self._entries), offset, len(tokens), num_bytes, domain))
        self._file.write(content)
        self._hash.update(content)
        self._size += len(content)

    def finish(self) -> tuple[tuple[FileEntry, ...], FileEntry, np.ndarray]:
        """Write the table; returns the shards' entries, the table's entry, and the table."""
        self._close_shard()
        documents = np.array(self._rows, dtype=DOCUMENT_DTYPE)
        path = self._folder / f"{self._split}.documents.npy"
        with path.open("xb") as file:
            np.save(file, documents, allow_pickle=False)
            file.flush()
            os.fsync(file.fileno())
        return tuple(self._entries), file_entry(path), documents

    def _shard_name(self) -> str:
        return f"{self._split}-{len(self._entries):05d}.tokens"

    def _close_shard(self) -> None:
        if self._file is None:
            return
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        entry = FileEntry(self._shard_name(), self._size, self._hash.hexdigest())
        self._entries.append(entry)
        self._file, self._size, self._hash = None, 0, hashlib.sha256()


def _reopen(data_dir: str, split: str, fingerprint: str) -> TokenSplit:
    """The split in another process: what was looked at before is not looked at again."""
    manifest = load_manifest(data_dir)
    if manifest.fingerprint != fingerprint:
        raise DataError(f"paths.data_dir: {data_dir} was replaced while it was read. Start again.")
    return _map_split(data_dir, split, manifest, check=False)
