"""Which documents are kept, and on which side of the split: decided by hashes, never by position.

A group's side depends on (seed, group) alone, so adding documents does not move the others. The one
exception: a domain that would have nothing on one side gives its nearest group.

The documents come in blocks of the survey's tables, read anew for each pass, so that memory has a
bound of AT_ONCE documents beside one byte for each.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

AT_ONCE = 4_000_000  # documents whose hashes or draws are sorted together: 100 to 200 MB


@dataclass(frozen=True)
class Block:
    """Consecutive documents of which some are members; only these count."""

    member_D: np.ndarray  # bool
    draw_D: np.ndarray  # float64 in [0, 1)
    domain_D: np.ndarray  # int64
    size_D: np.ndarray  # bytes
    group_D: np.ndarray  # uint64


Blocks = Callable[[], Iterable[Block]]


def draw(group: str, *, seed: int, purpose: str) -> float:
    """A number in [0, 1) for a group; independent for each purpose."""
    digest = hashlib.sha256(f"{seed}\n{purpose}\n{group}".encode()).digest()
    return int.from_bytes(digest[:6], "little") / 2**48


def first_of_each(
    digests: Callable[[], Iterable[tuple[np.ndarray, np.ndarray]]], *, at_once: int = AT_ONCE
) -> np.ndarray:
    """Mark the first document of each text, (D,) bool; digests gives 2 x (documents,) uint64."""
    first_D = np.ones(sum(len(high) for high, _ in digests()), dtype=bool)
    num_ranges = max(1, -(-len(first_D) // at_once))
    for number in range(num_ranges):
        low_end = np.uint64(number * 2**64 // num_ranges)
        high_end = np.uint64((number + 1) * 2**64 // num_ranges - 1)
        found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        start = 0
        for high, low in digests():
            inside = np.flatnonzero((high >= low_end) & (high <= high_end))
            found.append((high[inside], low[inside], inside + start))
            start += len(high)
        if not found:
            continue
        high, low, place = (np.concatenate(column) for column in zip(*found, strict=True))
        order = np.lexsort((low, high))  # stable, so equal ones stay in order
        high, low, place = high[order], low[order], place[order]
        again = (high[1:] == high[:-1]) & (low[1:] == low[:-1])
        first_D[place[1:][again]] = False
    return first_D


def cut_to_bytes(
    blocks: Blocks, *, num_domains: int, max_bytes: int, at_once: int = AT_ONCE
) -> np.ndarray:
    """Mark members to keep, (D,) bool: each domain cut to its share of max_bytes; 0 keeps all.

    Whole documents are taken in the order of their draws; one that no longer fits is passed over.
    """
    kept_D = np.concatenate([block.member_D for block in blocks()] or [np.zeros(0, dtype=bool)])
    bytes_of = np.zeros(num_domains, dtype=np.int64)
    for block in blocks():
        np.add.at(bytes_of, block.domain_D[block.member_D], block.size_D[block.member_D])
    total = int(bytes_of.sum())
    if max_bytes <= 0 or total <= max_bytes:
        return kept_D
    kept_D[:] = False
    left = np.array([int(size) * max_bytes // total for size in bytes_of], dtype=np.int64)
    below = 0.0
    while below < 1.0:
        count = sum(int(_fitting(block, left, below, 1.0).sum()) for block in blocks())
        if count == 0:
            break
        above = 1.0 if count <= at_once else below + (1.0 - below) * at_once / count
        found: list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = []
        start = 0
        for block in blocks():
            fits = np.flatnonzero(_fitting(block, left, below, above))
            found.append(
                (block.draw_D[fits], block.domain_D[fits], block.size_D[fits], fits + start)
            )
            start += len(block.member_D)
        draw_D, domain_D, size_D, place_D = (np.concatenate(c) for c in zip(*found, strict=True))
        order = np.lexsort((draw_D, domain_D))
        domain_D, size_D, place_D = domain_D[order], size_D[order], place_D[order]
        names, starts = np.unique(domain_D, return_index=True)
        for domain, begin, end in zip(names, starts, [*starts[1:], len(order)], strict=True):
            taken, left[domain] = _taken_in_order(size_D[begin:end], int(left[domain]))
            kept_D[place_D[begin:end][taken]] = True
        below = above
    return kept_D


def with_every_domain(kept_D: np.ndarray, blocks: Blocks, *, num_domains: int) -> np.ndarray:
    """Mark also the first smallest member of each domain of which nothing is kept, (D,) bool."""
    num_kept = np.zeros(num_domains, dtype=np.int64)
    least = np.full(num_domains, np.iinfo(np.int64).max)
    place_of = np.zeros(num_domains, dtype=np.int64)
    start = 0
    for block in blocks():
        kept = kept_D[start : start + len(block.member_D)] & block.member_D
        num_kept += np.bincount(block.domain_D[kept], minlength=num_domains)
        member = np.flatnonzero(block.member_D)
        order = member[np.lexsort((block.size_D[member], block.domain_D[member]))]
        domains, first = np.unique(block.domain_D[order], return_index=True)
        rows = order[first]
        smaller = block.size_D[rows] < least[domains]
        least[domains[smaller]] = block.size_D[rows][smaller]
        place_of[domains[smaller]] = start + rows[smaller]
        start += len(block.member_D)
    lacking = (num_kept == 0) & (least < np.iinfo(np.int64).max)
    all_D = kept_D.copy()
    all_D[place_of[lacking]] = True
    return all_D


def held_out(blocks: Blocks, *, num_domains: int, fraction: float) -> np.ndarray:
    """Mark validation documents, (D,) bool: whole groups, about fraction of each domain's groups.

    Every domain of two or more groups has at least one on each side. Nothing is marked, or every
    member, where no domain has two.
    """
    least, most = np.full(num_domains, 2.0), np.full(num_domains, -1.0)
    least_group, most_group = (np.zeros(num_domains, dtype=np.uint64) for _ in range(2))
    for block in blocks():
        member = np.flatnonzero(block.member_D)
        order = member[
            np.lexsort((block.group_D[member], block.draw_D[member], block.domain_D[member]))
        ]
        domains, first = np.unique(block.domain_D[order], return_index=True)
        for ends, best, group, is_better in (
            (first, least, least_group, np.less),
            (np.append(first[1:], len(order)) - 1, most, most_group, np.greater),
        ):
            if not len(order):
                continue
            rows = order[ends]
            better = is_better(block.draw_D[rows], best[domains])
            best[domains[better]] = block.draw_D[rows][better]
            group[domains[better]] = block.group_D[rows][better]
    has_two = (most >= 0) & (least_group != most_group)
    moved_in = least_group[has_two & (least >= fraction)]
    moved_out = most_group[has_two & (most < fraction)]
    sides = []
    for block in blocks():
        side = (block.draw_D < fraction) | np.isin(block.group_D, moved_in)
        sides.append(side & ~np.isin(block.group_D, moved_out) & block.member_D)
    return np.concatenate(sides or [np.zeros(0, dtype=bool)])


def _fitting(block: Block, left: np.ndarray, below: float, above: float) -> np.ndarray:
    is_next = block.member_D & (block.draw_D >= below) & (block.draw_D < above)
    return is_next & (block.size_D <= left[block.domain_D])


def _taken_in_order(size_D: np.ndarray, left: int) -> tuple[np.ndarray, int]:
    """The places that are taken one after another while they fit, and what is left then."""
    taken = []
    place = np.arange(len(size_D))
    while len(place := place[size_D[place] <= left]):
        ends = np.cumsum(size_D[place], dtype=np.int64)
        count = int(np.searchsorted(ends, left, side="right"))
        taken.append(place[:count])
        left -= int(ends[count - 1])
        place = place[count:]
    return np.concatenate(taken or [np.zeros(0, dtype=np.int64)]), left
