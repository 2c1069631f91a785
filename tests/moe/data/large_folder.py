"""A prepared folder with as many documents and shards as a test asks for, in a second or so.

Its tokens are real where they are asked for and holes of sparse files otherwise; its hashes are
those of nothing, so it is opened without verification.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from moe.data.document_table import DOCUMENT_DTYPE
from moe.data.manifest import (
    FORMAT_VERSION,
    DomainCount,
    FileEntry,
    Manifest,
    SplitEntry,
    write_manifest,
)

NUM_DOMAINS = 20


def make_large_folder(
    folder: Path, length_D: np.ndarray, *, num_shards: int, has_tokens: bool = False
) -> Path:
    """Training documents of these lengths in NUM_DOMAINS domains, one domain after another.

    A token, where there are tokens, is the lower 16 bits of its place in the stored stream.
    """
    folder.mkdir(parents=True)
    (folder / "tokenizer.model").write_bytes(b"x")
    splits = (
        _write_split(folder, "train", length_D, num_shards, has_tokens),
        _write_split(folder, "validation", length_D[:1000], 1, has_tokens),
    )
    manifest = Manifest(
        format_version=FORMAT_VERSION, seed=0, dtype="uint16", vocab_size=2**16, bos_id=1,
        end_of_text_id=2, domains=tuple(f"domain {k:02d}" for k in range(NUM_DOMAINS)),
        tokenizer=FileEntry("tokenizer.model", 1, "0" * 64), splits=splits, sources=("x",),
        skipped=(), settings="{}", fingerprint="f" * 64,
    )  # fmt: skip
    write_manifest(manifest, folder)
    return folder


def _write_split(
    folder: Path, name: str, length_D: np.ndarray, num_shards: int, has_tokens: bool
) -> SplitEntry:
    num_documents = len(length_D)
    path = folder / f"{name}.documents.npy"
    table = np.lib.format.open_memmap(path, mode="w+", dtype=DOCUMENT_DTYPE, shape=(num_documents,))
    edges = np.linspace(0, num_documents, num_shards + 1).astype(np.int64).tolist()
    shards, counts = [], np.zeros((NUM_DOMAINS, 2), dtype=np.int64)
    for number in range(num_shards):
        first, stop = edges[number], edges[number + 1]
        rows = np.zeros(stop - first, dtype=DOCUMENT_DTYPE)
        rows["shard"] = number
        rows["tokens"] = length_D[first:stop]
        rows["offset"][1:] = np.cumsum(rows["tokens"])[:-1]
        rows["bytes"] = rows["tokens"] * 4
        rows["domain"] = np.arange(first, stop) * NUM_DOMAINS // num_documents
        table[first:stop] = rows
        counts[:, 0] += np.bincount(rows["domain"], minlength=NUM_DOMAINS)
        counts[:, 1] += np.bincount(
            rows["domain"], weights=rows["tokens"], minlength=NUM_DOMAINS
        ).astype(np.int64)
        shard = folder / f"{name}-{number:05d}.tokens"
        size = 2 * int(rows["tokens"].sum())
        with shard.open("wb") as file:
            if has_tokens:
                at = sum(entry.num_bytes for entry in shards) // 2
                file.write(np.arange(at, at + size // 2).astype("<u2").tobytes())
            file.truncate(size)
        shards.append(FileEntry(shard.name, size, "0" * 64))
    table.flush()
    domains = tuple(
        DomainCount(f"domain {k:02d}", documents, tokens, 4 * tokens)
        for k, (documents, tokens) in enumerate(counts.tolist())
    )
    total = int(counts[:, 1].sum())
    entry = FileEntry(path.name, path.stat().st_size, "0" * 64)
    return SplitEntry(name, tuple(shards), entry, num_documents, total, 4 * total, domains)
