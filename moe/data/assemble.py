"""The shards and document tables of a split, from the parts' token ids in the parts' order.

Where a document lies follows from the numbers of tokens alone; so the shards are planned first and
then written by any number of processes, each flushed, hashed and kept.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moe.data.building import keep_json, kept_file, key_of, read_json
from moe.data.document_table import DOCUMENT_DTYPE
from moe.data.manifest import SPLITS, DomainCount, FileEntry, SplitEntry, file_entry
from moe.data.tokenise import TokeniseTask
from moe.errors import DataError

COPY_BYTES = 4 * 2**20


@dataclass(frozen=True)
class ShardTask:
    """A shard: ranges of bytes of the parts' ids, one after another."""

    path: Path
    segments: tuple[tuple[Path, int, int], ...]  # (file, start, stop)

    @property
    def num_bytes(self) -> int:
        return sum(stop - start for _, start, stop in self.segments)

    @property
    def entry_path(self) -> Path:
        """What is kept of it beside the file, in the building folder."""
        names = [(path.name, start, stop) for path, start, stop in self.segments]
        return self.path.parent.parent / f"shard-{key_of(self.path.name, names)}.json"

    @property
    def is_kept(self) -> bool:
        """Whether write_shard has done it."""
        is_whole = self.path.exists() and self.path.stat().st_size == self.num_bytes
        return is_whole and self.entry_path.exists()

    def entry(self) -> FileEntry:
        """Size and hash of a shard that is written."""
        return FileEntry(**read_json(self.entry_path))


@dataclass(frozen=True)
class SplitPlan:
    """One split: its shards, and what its table counts."""

    name: str
    shards: tuple[ShardTask, ...]
    documents: Path
    counts: np.ndarray  # (domains, 3): documents, tokens, bytes

    def entry(self, shards: Sequence[FileEntry], *, domains: Sequence[str]) -> SplitEntry:
        """For the manifest."""
        documents, tokens, num_bytes = (int(number) for number in self.counts.sum(axis=0))
        of_domains = tuple(
            DomainCount(name, *map(int, row))
            for name, row in zip(domains, self.counts, strict=True)
        )
        return SplitEntry(
            self.name, tuple(shards), file_entry(self.documents), documents, tokens, num_bytes,
            of_domains,
        )  # fmt: skip


def plan_split(
    parts: Sequence[TokeniseTask], split: str, *, folder: Path, num_domains: int, shard_bytes: int
) -> SplitPlan:
    """Write the table of a split to folder, part by part, and plan its shards.

    Every document lies whole in one shard; one that does not fit begins the next.
    """
    number = SPLITS.index(split)
    total = sum(int((part.rows["split"] == number).sum()) for part in parts)
    counts = np.zeros((num_domains, 3), dtype=np.int64)
    shards: list[list[tuple[Path, int, int]]] = []
    size = shard_bytes  # of the open shard; the first document begins one
    path = folder / f"{split}.documents.npy"
    with kept_file(path) as table:
        header = {"descr": DOCUMENT_DTYPE.descr, "fortran_order": False, "shape": (total,)}
        np.lib.format.write_array_header_1_0(table, header)
        for part in parts:
            rows = part.rows
            rows = rows[rows["split"] == number]
            item = np.dtype(part.dtype).itemsize
            ends = np.cumsum(rows["tokens"], dtype=np.int64) * item
            documents = np.zeros(len(rows), dtype=DOCUMENT_DTYPE)
            for field in ("tokens", "bytes", "domain"):
                documents[field] = rows[field]
            done, start = 0, 0  # documents, bytes of this part
            while done < len(rows):
                stop = int(np.searchsorted(ends, shard_bytes - size + start, side="right"))
                if stop <= done or not shards:
                    shards.append([])
                    size = 0
                    stop = int(np.searchsorted(ends, shard_bytes + start, side="right"))
                    stop = max(stop, done + 1)  # one document longer than a shard
                end = int(ends[stop - 1])
                shards[-1].append((part.path.with_suffix(f".{split}"), start, end))
                documents["shard"][done:stop] = len(shards) - 1
                tokens = rows["tokens"][done:stop].astype(np.int64)
                documents["offset"][done:stop] = (size + ends[done:stop] - start) // item - tokens
                size += end - start
                done, start = stop, end
            table.write(documents.tobytes())
            domain = rows["domain"].astype(np.int64)
            for column, weight in enumerate((np.ones(len(rows)), rows["tokens"], rows["bytes"])):
                counts[:, column] += np.bincount(domain, weight, num_domains).astype(np.int64)
    tasks = tuple(
        ShardTask(folder / f"{split}-{place:05d}.tokens", tuple(segments))
        for place, segments in enumerate(shards)
    )
    return SplitPlan(split, tasks, path, counts)


def write_shard(task: ShardTask) -> None:
    """Write a shard and hash it on the way."""
    digest = hashlib.sha256()
    with kept_file(task.path) as file:
        for path, start, stop in task.segments:
            with path.open("rb") as source:
                source.seek(start)
                while start < stop:
                    content = source.read(min(COPY_BYTES, stop - start))
                    if not content:
                        raise DataError(
                            f"{path}: is shorter than it was written; remove {path.parent} and "
                            "start again."
                        )
                    file.write(content)
                    digest.update(content)
                    start += len(content)
    entry = FileEntry(task.path.name, task.num_bytes, digest.hexdigest())
    keep_json(task.entry_path, vars(entry))
