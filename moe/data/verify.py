"""Whether a prepared folder's files have the content that its manifest says: hashed once, by all.

Each rank hashes a share. What was found right is written into a stamp, so the next start hashes
only what was written since. Ranks of machines with a copy each, on a local disk, share the work
among those that see the same one.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from moe.data.document_table import check_rows, check_sums, open_table
from moe.data.manifest import (
    MANIFEST_NAME,
    SPLITS,
    FileEntry,
    Manifest,
    load_manifest,
    require_hash,
)
from moe.data.verified_stamp import FileState, read_stamp, state_of, write_stamp
from moe.errors import DataError
from moe.file_shares import share_of_sizes
from moe.progress_call import ProgressCall, no_progress

_THREADS = 2
_SAY_AFTER_SECONDS, _SAY_EVERY_SECONDS = 5.0, 60.0

Result = TypeVar("Result")
Say = Callable[[str], None]


class Ranks(Protocol):
    """Those that verify together."""

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    def all_texts(self, text: str) -> list[str]:
        """Every rank's text, in the order of ranks, on every rank."""
        ...


@dataclass(frozen=True)
class _Alone:
    rank: int = 0
    world_size: int = 1

    def all_texts(self, text: str) -> list[str]:
        return [text]


@dataclass(frozen=True)
class _Group:
    """The ranks that see one copy of the folder, and this rank's place among them."""

    place: int
    size: int
    leader: int  # a rank

    @property
    def leads(self) -> bool:
        return self.place == 0


def verify_data(
    data_dir: str | Path,
    *,
    splits: Sequence[str] = SPLITS,
    ranks: Ranks | None = None,
    say: Say | None = None,
    progress: ProgressCall = no_progress,
) -> None:
    """Make sure that the tokenizer and all files of these splits are as they were written.

    Every rank calls this, with the same arguments. Where it takes long, say is told how far this
    rank is; progress is told of every few MiB, from two threads. Raises the same DataError on
    every rank.
    """
    ranks = ranks or _Alone()
    folder = Path(data_dir).absolute()
    manifest, seen = _together(ranks, lambda: _look(data_dir, folder))
    group = _group(seen, ranks.rank, folder)
    entries = [manifest.tokenizer]
    for entry in map(manifest.split, splits):
        entries += [*entry.shards, entry.documents]
    stamp = read_stamp(folder)

    def look() -> tuple[dict[str, FileState], list[str]]:
        # before anything is hashed: what is written meanwhile has another state the next time
        states = {e.name: state_of(folder, e) for e in entries} if group.leads else {}
        return states, [name for name, state in states.items() if stamp.get(name) != state]

    found, new = _together(ranks, look)
    speed = _Speed(say, progress)

    def hash_share() -> tuple[None, list[Any]]:
        numbers = share_of_sizes([e.num_bytes for e in entries], group.place, num_parts=group.size)
        share = [entries[number] for number in numbers]
        _hash([e for e in share if stamp.get(e.name) != state_of(folder, e)], folder, speed=speed)
        # which tables is the leader's word: another run may write the stamp in between
        tables = [s for s in splits if manifest.split(s).documents.name in new[group.leader]]
        sums = _table_sums(folder, manifest, tables, group=group, progress=progress)
        return None, [group.leader, sums]

    _, results = _together(ranks, hash_share)
    own = [sums for leader, sums in results if leader == group.leader]

    def finish() -> tuple[Path | None, None]:
        for split in splits:
            entry = manifest.split(split)
            parts = [sums[split] for sums in own if split in sums]
            if parts:
                total = (sum(tokens for tokens, _ in parts), sum(size for _, size in parts))
                check_sums(entry, total, path=folder / entry.documents.name)
        return (write_stamp(folder, found) if new[ranks.rank] else None), None

    path, _ = _together(ranks, finish)
    speed.sum_up(path)


def _together(ranks: Ranks, work: Callable[[], tuple[Result, Any]]) -> tuple[Result, list[Any]]:
    """The first part of what work returns, and the second, JSON, of every rank in order.

    Raises the first rank's DataError on every rank.
    """
    result: Result | None = None
    error, told = None, None
    try:
        result, told = work()
    except DataError as caught:
        error = str(caught)
    answers = [json.loads(text) for text in ranks.all_texts(json.dumps([error, told]))]
    for message, _ in answers:
        if message is not None:
            raise DataError(message)
    return result, [answer for _, answer in answers]  # type: ignore[return-value]


def _look(data_dir: str | Path, folder: Path) -> tuple[Manifest, list[Any]]:
    """The manifest, and by what other ranks know that they see the same copy."""
    manifest = load_manifest(data_dir)
    status = (folder / MANIFEST_NAME).stat()
    return manifest, [manifest.fingerprint, status.st_ino, status.st_mtime_ns]


def _group(seen: Sequence[list[Any]], rank: int, folder: Path) -> _Group:
    for other, copy in enumerate(seen):
        if copy[0] != seen[0][0]:
            raise DataError(
                f"paths.data_dir: rank {other} finds other data in {folder} than rank 0. "
                "Give every machine the same prepared folder."
            )
    members = [other for other, copy in enumerate(seen) if copy == seen[rank]]
    return _Group(members.index(rank), len(members), members[0])


class _Speed:
    """How fast a rank's share is hashed, by any threads; said where it takes long."""

    def __init__(self, say: Say | None, progress: ProgressCall) -> None:
        self._say, self._progress = say, progress
        self._lock = threading.Lock()
        self._done = self._total = 0
        self._start = time.monotonic()
        self._next = self._start + _SAY_AFTER_SECONDS

    def expect(self, total: int) -> None:
        """How many bytes this rank is to read."""
        self._total = total

    def add(self, amount: int) -> None:
        self._progress(amount)
        with self._lock:
            self._done += amount
            now = time.monotonic()
            if now < self._next:
                return
            self._next = now + _SAY_EVERY_SECONDS
        self._tell(f"verifying, {self._done / 1e9:,.1f} of {self._total / 1e9:,.1f} GB a rank")

    def sum_up(self, stamp: Path | None) -> None:
        if self._done and time.monotonic() - self._start > _SAY_AFTER_SECONDS:
            later = f"; {stamp} says so from now on" if stamp else ""
            self._tell(f"verified, {self._done / 1e9:,.1f} GB a rank{later}")

    def _tell(self, text: str) -> None:
        if self._say is not None:
            seconds = max(time.monotonic() - self._start, 1e-3)
            self._say(f"data: {text} ({seconds:,.0f} s, {self._done / seconds / 1e9:.2f} GB/s)")


def _hash(entries: Sequence[FileEntry], folder: Path, *, speed: _Speed) -> None:
    speed.expect(sum(entry.num_bytes for entry in entries))
    with ThreadPoolExecutor(max_workers=_THREADS) as pool:
        jobs = [pool.submit(require_hash, folder, e, progress=speed.add) for e in entries]
        try:
            for job in jobs:
                job.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _table_sums(
    folder: Path,
    manifest: Manifest,
    splits: Sequence[str],
    *,
    group: _Group,
    progress: ProgressCall,
) -> dict[str, tuple[int, int]]:
    """Check this rank's rows of these splits' tables: the sums of their tokens and bytes."""
    sums = {}
    for split in splits:
        entry = manifest.split(split)
        path = folder / entry.documents.name
        documents, places = open_table(folder, entry, dtype=manifest.dtype)
        edge = [len(documents) * n // group.size for n in (group.place, group.place + 1)]
        sums[split] = check_rows(
            documents, range(*edge), places=places, num_domains=len(entry.domains), path=path,
            progress=progress,
        )  # fmt: skip
    return sums
