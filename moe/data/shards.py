"""How token ids lie on disk: raw little-endian shards and a table of documents, memory-mapped.

Every document is <s>, its text's tokens, <|endoftext|>, and lies whole in one shard.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moe.data.document_table import (
    ShardPlaces,
    check_rows,
    check_sums,
    open_table,
)
from moe.data.manifest import Manifest, load_manifest, read_manifest
from moe.data.shard_maps import ShardMaps
from moe.data.verify import verify_data
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
    a table that does not take long also row by row. With verify, what this split is made of must
    have its SHA-256, now or when it was last verified (verify_data). Raises DataError naming the
    file that is missing or damaged, or how to prepare the folder.
    """
    if verify:
        verify_data(data_dir, splits=(split,))
    return _map_split(data_dir, split, read_manifest(data_dir, verify=False), check=not verify)


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


def _reopen(data_dir: str, split: str, fingerprint: str) -> TokenSplit:
    """The split in another process: what was looked at before is not looked at again."""
    manifest = load_manifest(data_dir)
    if manifest.fingerprint != fingerprint:
        raise DataError(f"paths.data_dir: {data_dir} was replaced while it was read. Start again.")
    return _map_split(data_dir, split, manifest, check=False)
