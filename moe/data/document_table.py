"""Where each document of a split lies: a table of rows on disk, mapped and searched, never held.

The rows tile the shards: a document begins where the one before it ends, or where its shard does.
So the stored stream, all shards one after another, is searched for a token without an index.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moe.data.manifest import SplitEntry
from moe.errors import DataError
from moe.progress_call import ProgressCall, no_progress

DOCUMENT_DTYPE = np.dtype(
    [("shard", "<u4"), ("offset", "<u8"), ("tokens", "<u8"), ("bytes", "<u8"), ("domain", "<u2")]
)  # offset: the document's first token in its shard; bytes: of its UTF-8 text
_ROWS_AT_ONCE = 2**18  # 8 MB of the table: what a check of the whole holds
_SCATTERED_AT_ONCE = 128


@dataclass(frozen=True)
class ShardPlaces:
    """Where each of N shards begins; the last element is the end of the last shard."""

    token_N: np.ndarray  # (N + 1,) int64, in the stored stream
    document_N: np.ndarray  # (N + 1,) int64, in the table


def open_table(folder: Path, entry: SplitEntry, *, dtype: str) -> tuple[np.ndarray, ShardPlaces]:
    """The rows, (num_documents,) of DOCUMENT_DTYPE, mapped, and where the shards begin in them.

    Raises DataError where the table is damaged, has another length than the manifest says, or a
    shard does not begin with a document or is not filled by its own.
    """
    path = folder / entry.documents.name
    try:
        mapped = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError, SyntaxError) as error:
        raise DataError(f"{path}: is damaged ({error}); prepare the data again.") from None
    if mapped.dtype != DOCUMENT_DTYPE or mapped.ndim != 1:
        raise DataError(f"{path}: is not a table of documents; prepare the data again.")
    item = np.dtype(dtype).itemsize
    for file in entry.shards:
        if file.num_bytes == 0 or file.num_bytes % item:
            raise DataError(f"{folder / file.name}: {file.num_bytes} bytes are not {dtype} tokens.")
    documents = mapped.view(np.ndarray)
    shard_tokens = [file.num_bytes // item for file in entry.shards]
    if len(documents) != entry.num_documents or sum(shard_tokens) != entry.num_tokens:
        raise table_error(path)
    return documents, _shard_places(documents, shard_tokens, path=path)


def check_rows(
    documents: np.ndarray,
    part: range,
    *,
    places: ShardPlaces,
    num_domains: int,
    path: Path,
    progress: ProgressCall = no_progress,
) -> tuple[int, int]:
    """Check that these rows tile their shards; returns the sums of their tokens and bytes.

    In pieces of some MiB, whatever the length of the part. Raises DataError.
    """
    size_N = np.diff(places.token_N).astype(np.uint64)
    total_tokens = total_bytes = 0
    for start in range(part.start, part.stop, _ROWS_AT_ONCE):
        stop = min(start + _ROWS_AT_ONCE, part.stop)
        rows = documents[max(start - 1, 0) : stop]  # with the row before, which they follow
        good = bool((rows["shard"] < len(size_N)).all())
        if good:
            size = size_N[rows["shard"]]
            inside = (rows["tokens"] <= size) & (rows["offset"] <= size - rows["tokens"])
            first = places.token_N[rows["shard"]].astype(np.uint64) + rows["offset"]
            good = (
                bool(inside.all())
                and bool((first[1:] == first[:-1] + rows["tokens"][:-1]).all())
                and (start > 0 or int(first[0]) == 0)
                and int(rows["tokens"].min()) >= 2
                and int(rows["domain"].max()) < num_domains
            )
        if not good:
            raise table_error(path)
        own = rows[-(stop - start) :]
        total_tokens += int(own["tokens"].sum())
        total_bytes += int(own["bytes"].sum())
        progress(own.nbytes)
        _forget_pages(documents)
    return total_tokens, total_bytes


def check_sums(entry: SplitEntry, sums: tuple[int, int], *, path: Path) -> None:
    """Compare the sums over all rows with the manifest's counts."""
    if sums != (entry.num_tokens, entry.num_bytes):
        raise table_error(path)


def documents_at(documents: np.ndarray, token_Q: np.ndarray, *, places: ShardPlaces) -> np.ndarray:
    """The documents that hold these tokens of the stored stream, (Q,) int64 both.

    Each row that is looked at may be a page of the disk, so the search guesses by proportion,
    which hits within a page or two, and halves every second time, which bounds it.
    """
    shard_Q = np.searchsorted(places.token_N, token_Q, side="right") - 1
    wanted = token_Q - places.token_N[shard_Q]
    low, high = places.document_N[shard_Q], places.document_N[shard_Q + 1]
    low_at, high_at = np.zeros_like(wanted), np.diff(places.token_N)[shard_Q]
    halve = False
    while (left := np.flatnonzero(high - low > 1)).size:
        bottom, top = low[left], high[left]
        if halve:
            guess = (bottom + top) // 2
        else:
            share = (wanted[left] - low_at[left]) / np.maximum(high_at[left] - low_at[left], 1)
            guess = bottom + (share * (top - bottom)).astype(np.int64)
            guess = np.clip(guess, bottom + 1, top - 1)
        at = documents["offset"][guess].astype(np.int64)
        below = at <= wanted[left]
        low[left], low_at[left] = np.where(below, guess, bottom), np.where(below, at, low_at[left])
        high[left], high_at[left] = np.where(below, top, guess), np.where(below, high_at[left], at)
        halve = not halve
    return low


def table_error(path: Path) -> DataError:
    """What is raised for a table that is whole and yet not that of its shards."""
    return DataError(
        f"{path}: does not agree with the shards and the manifest; prepare the data again."
    )


def _shard_places(documents: np.ndarray, shard_tokens: Sequence[int], *, path: Path) -> ShardPlaces:
    """Find each shard's first document, by bisection of the rows."""
    if not len(documents) or not shard_tokens:
        raise table_error(path)
    size_N = np.array(shard_tokens, dtype=np.int64)
    token_N = np.concatenate([[0], np.cumsum(size_N)])
    wanted = np.arange(len(size_N) + 1)
    low, high = np.zeros(len(wanted), np.int64), np.full(len(wanted), len(documents), np.int64)
    while (open_ := low < high).any():
        middle = (low + high) // 2
        shard = _scattered(documents, np.minimum(middle, len(documents) - 1))["shard"]
        before = open_ & (shard < wanted)
        low = np.where(before, middle + 1, low)
        high = np.where(open_ & ~before, middle, high)
    places = ShardPlaces(token_N, low)
    first = _scattered(documents, low[:-1] % len(documents))
    last = _scattered(documents, low[1:] - 1)
    good = (
        low[0] == 0
        and bool((np.diff(low) > 0).all())
        and bool((first["offset"] == 0).all() and (first["shard"] == wanted[:-1]).all())
        and bool((last["offset"] + last["tokens"] == size_N.astype(np.uint64)).all())
    )
    if not good:
        raise table_error(path)
    return places


def _scattered(documents: np.ndarray, index_N: np.ndarray) -> np.ndarray:
    """Rows from anywhere; each may bring a page in, or 2 MiB where the kernel keeps them so."""
    rows = np.empty(len(index_N), dtype=documents.dtype)
    for start in range(0, len(index_N), _SCATTERED_AT_ONCE):
        part = slice(start, start + _SCATTERED_AT_ONCE)
        rows[part] = documents[index_N[part]]
        _forget_pages(documents)
    return rows


def _forget_pages(documents: np.ndarray) -> None:
    """Take what was looked at out of this process's memory; the kernel keeps it for all of them."""
    owner = documents.base
    while isinstance(owner, np.ndarray) and not hasattr(owner, "_mmap"):
        owner = owner.base
    pages = getattr(owner, "_mmap", owner)
    if isinstance(pages, mmap.mmap):
        pages.madvise(mmap.MADV_DONTNEED)
