"""How token ids lie on disk: raw little-endian shards and a table of documents, memory-mapped.

Every document is <s>, its text's tokens, <|endoftext|>, and lies whole in one shard.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from moe.data.manifest import FileEntry, Manifest, SplitEntry, file_entry, read_manifest
from moe.errors import DataError

SHARD_BYTES = 256 * 2**20
DOCUMENT_DTYPE = np.dtype(
    [("shard", "<u4"), ("offset", "<u8"), ("tokens", "<u8"), ("bytes", "<u8"), ("domain", "<u2")]
)  # offset: the document's first token in its shard; bytes: of its UTF-8 text


def token_dtype(vocab_size: int) -> str:
    """The smallest of uint16 and uint32 that holds every id below vocab_size."""
    return "uint16" if vocab_size <= 2**16 else "uint32"


@dataclass(frozen=True)
class TokenSplit:
    """One split, memory-mapped; pickled as its path, so that workers map the files themselves."""

    data_dir: Path
    name: str
    manifest: Manifest
    shards: tuple[np.ndarray, ...]  # (tokens of the shard,) each
    documents: np.ndarray  # (num_documents,) of DOCUMENT_DTYPE

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

    def tokens(self, document: int) -> np.ndarray:
        """Ids of a document, (tokens,), from <s> to <|endoftext|>; a view into the shard."""
        row = self.documents[document]
        start = int(row["offset"])
        return self.shards[row["shard"]][start : start + int(row["tokens"])]

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (str(self.data_dir), self.name)


def open_split(data_dir: str | Path, split: str, *, verify: bool) -> TokenSplit:
    """Memory-map "train" or "validation" of a prepared folder.

    File sizes and the document table are always checked, SHA-256 of every file with verify.
    Raises DataError naming the file that is missing or damaged, or how to prepare the folder.
    """
    manifest = read_manifest(data_dir, verify=verify)
    folder = Path(data_dir).absolute()
    entry = manifest.split(split)
    item = np.dtype(manifest.dtype).newbyteorder("<")
    shards = []
    for file in entry.shards:
        if file.num_bytes == 0 or file.num_bytes % item.itemsize:
            raise DataError(f"{folder / file.name}: {file.num_bytes} bytes are not {item} tokens.")
        try:
            shards.append(np.memmap(folder / file.name, dtype=item, mode="r"))
        except (OSError, ValueError) as error:
            raise DataError(f"{folder / file.name}: cannot be mapped ({error}).") from None
    documents = _read_documents(folder / entry.documents.name)
    _check_documents(documents, entry=entry, shards=shards, path=folder / entry.documents.name)
    return TokenSplit(folder, split, manifest, tuple(shards), documents)


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


def _reopen(data_dir: str, split: str) -> TokenSplit:
    return open_split(data_dir, split, verify=False)


def _read_documents(path: Path) -> np.ndarray:
    try:
        documents = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError, SyntaxError) as error:
        raise DataError(f"{path}: is damaged ({error}); prepare the data again.") from None
    if documents.dtype != DOCUMENT_DTYPE or documents.ndim != 1:
        raise DataError(f"{path}: is not a table of documents; prepare the data again.")
    return documents


def _check_documents(
    documents: np.ndarray, *, entry: SplitEntry, shards: Sequence[np.ndarray], path: Path
) -> None:
    """The table must tile every shard exactly and agree with the manifest's counts."""
    start_D = np.zeros(len(documents), dtype=np.uint64)
    ends = np.cumsum(documents["tokens"], dtype=np.uint64)
    start_D[1:] = ends[:-1]
    sizes = np.array([len(shard) for shard in shards], dtype=np.uint64)
    first_of_shard = np.cumsum(sizes, dtype=np.uint64) - sizes
    good = (
        len(documents) == entry.num_documents > 0
        and int(ends[-1]) == entry.num_tokens == int(sizes.sum())
        and int(documents["bytes"].sum()) == entry.num_bytes
        and int(documents["tokens"].min()) >= 2
        and int(documents["domain"].max()) < len(entry.domains)
        and int(documents["shard"].max()) < len(shards)
        and bool((first_of_shard[documents["shard"]] + documents["offset"] == start_D).all())
        and bool((documents["offset"] + documents["tokens"] <= sizes[documents["shard"]]).all())
    )
    if not good:
        raise DataError(
            f"{path}: does not agree with the shards and the manifest; prepare the data again."
        )
