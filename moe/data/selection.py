"""Which documents are kept, and on which side of the split: decided by hashes, never by position.

A group's side depends on (seed, group) alone, so adding documents does not move the others. The one
exception: a domain that would have nothing on one side gives its nearest group.
"""

from __future__ import annotations

import hashlib

import numpy as np

from moe.errors import DataError


def group_draws(groups: list[str], *, seed: int, purpose: str) -> np.ndarray:
    """A number in [0, 1) for each group, (D,) float64; independent for each purpose."""
    draws = [_draw(f"{seed}\n{purpose}\n{group}") for group in groups]
    return np.asarray(draws, dtype=np.float64)


def cut_to_bytes(
    draw_D: np.ndarray, *, domain_D: np.ndarray, size_D: np.ndarray, max_bytes: int
) -> np.ndarray:
    """Mark documents to keep, (D,) bool: each domain cut to its share of max_bytes; 0 keeps all.

    Whole documents are taken in the order of their draws; one that no longer fits is passed over.
    """
    total = int(size_D.sum())
    if max_bytes <= 0 or total <= max_bytes:
        return np.ones(len(draw_D), dtype=bool)
    kept_D = np.zeros(len(draw_D), dtype=bool)
    for domain in np.unique(domain_D):
        member = np.flatnonzero(domain_D == domain)
        left = int(size_D[member].sum()) * max_bytes // total
        for document in member[np.argsort(draw_D[member], kind="stable")]:
            if size_D[document] <= left:
                kept_D[document] = True
                left -= int(size_D[document])
    return kept_D


def held_out(groups: list[str], *, domain_D: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Mark validation documents, (D,) bool: whole groups, about fraction of each domain's groups.

    Every domain of two or more groups has at least one on each side. Raises DataError if one
    side stays empty.
    """
    draw_of = {group: _draw(f"{seed}\nvalidation\n{group}") for group in groups}
    chosen = {group for group, draw in draw_of.items() if draw < fraction}
    # in the order of the draws, so that the first and last groups are the nearest ones
    ranked = sorted(draw_of, key=lambda group: (draw_of[group], group))
    for domain in np.unique(domain_D):
        own = {groups[document] for document in np.flatnonzero(domain_D == domain)}
        members = [group for group in ranked if group in own]
        if len(members) >= 2 and not own & chosen:
            chosen.add(members[0])
        if len(members) >= 2 and own <= chosen:
            chosen.remove(members[-1])
    validation_D = np.asarray([group in chosen for group in groups], dtype=bool)
    if not validation_D.any() or validation_D.all():
        raise DataError(
            f"data.sources: {len(groups)} document(s) of {len(draw_of)} origin(s) cannot be split "
            "into training and validation, which needs two origins of one domain at least. "
            "Add documents (cut one long file into several), or raise data.max_bytes."
        )
    return validation_D


def _draw(key: str) -> float:
    digest = hashlib.sha256(key.encode()).digest()
    return int.from_bytes(digest[:6], "little") / 2**48
