"""What the sources hold: read once into one file, without duplicates, and cut to data.max_bytes."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moe.data.corpus import read_documents
from moe.data.selection import cut_to_bytes, group_draws
from moe.errors import DataError


@dataclass(frozen=True)
class Survey:
    """What was read: the text is in a file, this is the rest; D documents in the order read."""

    spans: list[tuple[int, int]]  # (offset, length) in bytes
    groups: list[str]
    domain_D: np.ndarray
    size_D: np.ndarray
    domains: tuple[str, ...]
    skipped: Counter[str]


def read_sources(
    sources: Sequence[str], text_path: Path, *, on_read: Callable[[int], None]
) -> Survey:
    """Write the text of every source to text_path, leaving out exact duplicates.

    on_read is told the bytes so far. Raises DataError if there is no document.
    """
    skipped: Counter[str] = Counter()
    seen: set[bytes] = set()
    spans: list[tuple[int, int]] = []
    groups: list[str] = []
    names: list[str] = []
    offset = 0
    with text_path.open("xb") as file:
        documents = read_documents(sources, on_skip=lambda origin, reason: skipped.update([reason]))
        for document in documents:
            content = document.text.encode()
            digest = hashlib.sha256(content).digest()
            if digest in seen:
                skipped["duplicate"] += 1
                continue
            seen.add(digest)
            file.write(content)
            spans.append((offset, len(content)))
            groups.append(document.group)
            names.append(document.domain)
            offset += len(content)
            on_read(offset)
    if not spans:
        found = ", ".join(f"{number} {reason}" for reason, number in sorted(skipped.items()))
        raise DataError(
            f"data.sources: no document in {list(sources)} "
            f"({found or 'no files at all'}). Give folders with text files, or .jsonl files."
        )
    domains = tuple(sorted(set(names)))
    if len(domains) > 2**16:
        raise DataError(f"data.sources: {len(domains)} domains; at most {2**16} are allowed.")
    index = {name: number for number, name in enumerate(domains)}
    domain_D = np.array([index[name] for name in names], dtype=np.int64)
    size_D = np.array([length for _, length in spans], dtype=np.int64)
    return Survey(spans, groups, domain_D, size_D, domains, skipped)


def cut_survey(survey: Survey, *, max_bytes: int, seed: int) -> Survey:
    """The documents that are kept under data.max_bytes (0 for all), each domain in proportion."""
    draw_D = group_draws(survey.groups, seed=seed, purpose="max_bytes")
    kept_D = cut_to_bytes(
        draw_D, domain_D=survey.domain_D, size_D=survey.size_D, max_bytes=max_bytes
    )
    kept = np.flatnonzero(kept_D)
    if not len(kept):
        raise DataError(
            f"data.max_bytes: got {max_bytes}; no document is that small. "
            f"The smallest has {survey.size_D.min()} bytes. Raise it, or set it to 0 for all."
        )
    return Survey(
        [survey.spans[d] for d in kept], [survey.groups[d] for d in kept],
        survey.domain_D[kept], survey.size_D[kept], survey.domains, survey.skipped,
    )  # fmt: skip


def texts_of(text_path: Path, spans: list[tuple[int, int]]) -> Iterator[str]:
    """The texts at these spans of the file."""
    with text_path.open("rb") as file:
        for offset, length in spans:
            file.seek(offset)
            yield file.read(length).decode("utf-8")
