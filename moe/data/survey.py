"""What the sources hold: a row for each document, on disk, and which of them are used how."""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moe.data.building import keep_json, kept_file, key_of, read_json
from moe.data.corpus import Document, Part, documents_of
from moe.data.manifest import SkipCount
from moe.data.record_rows import OtherRecordsError
from moe.data.selection import Block, Blocks, draw
from moe.errors import DataError

ROW_DTYPE = np.dtype(
    [
        ("high", "<u8"), ("low", "<u8"), ("group", "<u8"),  # of SHA-256: of the text, of the group
        ("validation", "<f8"), ("max_bytes", "<f8"), ("tokenizer", "<f8"),  # the group's draws
        ("bytes", "<u8"), ("domain", "<u4"),
    ]
)  # fmt: skip
PURPOSES = ("validation", "max_bytes", "tokenizer")
ROWS_AT_ONCE = 20_000
NUM_EXAMPLES = 5  # of what was left out for one reason


class Skips:
    """What was left out: how many for each reason, and the first few names."""

    def __init__(self) -> None:
        self.found: dict[str, tuple[int, list[str]]] = {}

    def add(self, origin: str, reason: str) -> None:
        """One more."""
        self.merge({reason: (1, [origin])})

    def merge(self, found: dict[str, Any]) -> None:
        """What others found, after what was found before."""
        for reason, (count, names) in found.items():
            before, shown = self.found.get(reason, (0, []))
            new = [name for name in dict.fromkeys(names) if name not in shown]
            self.found[reason] = before + count, [*shown, *new][:NUM_EXAMPLES]

    def counts(self) -> tuple[SkipCount, ...]:
        """By reason."""
        return tuple(
            SkipCount(reason, count, tuple(names))
            for reason, (count, names) in sorted(self.found.items())
        )

    def words(self) -> str:
        """For a message."""
        return "; ".join(
            f"{skip.count} {skip.reason} ({', '.join(skip.examples)})" for skip in self.counts()
        )


@dataclass(frozen=True)
class SurveyTask:
    """A part to survey, and what the rows depend on beside its text."""

    part: Part
    folder: Path
    seed: int
    text_key: str
    max_bad_lines: int

    @property
    def num_bytes(self) -> int:
        """Bytes of the sources, about."""
        return self.part.num_bytes

    @property
    def is_kept(self) -> bool:
        """Whether survey_part has done it."""
        return (self.folder / f"{self.stem}.json").exists()

    @functools.cached_property
    def stem(self) -> str:
        """The name of the result."""
        what = [self.part.key(), self.seed, self.text_key, self.max_bad_lines]
        return f"survey-{key_of(*what)}"


def survey_part(task: SurveyTask) -> None:
    """Keep a part's rows, and what was left out of it."""
    skips, bad = Skips(), list[str]()
    num_bad, num_documents = 0, 0
    domains: dict[str, int] = {}

    def on_bad(error: DataError) -> None:
        nonlocal num_bad
        num_bad += 1
        bad[:] = [*bad, str(error)][:1]
        if num_bad > task.max_bad_lines:
            if isinstance(error, OtherRecordsError):
                raise error  # leaving such records out would leave out the file
            raise too_many_bad(str(error), task.max_bad_lines)
        skips.add(str(error).split(": ")[0], "a record that cannot be read")

    documents = documents_of(task.part, on_skip=skips.add, on_bad=on_bad, text_key=task.text_key)
    path = task.folder / task.stem
    with kept_file(path.with_suffix(".rows")) as file:
        while rows := [
            _row(document, seed=task.seed, domains=domains)
            for document in itertools.islice(documents, ROWS_AT_ONCE)
        ]:
            num_documents += len(rows)
            file.write(np.array(rows, dtype=ROW_DTYPE).tobytes())
    found = {
        "num_documents": num_documents, "domains": list(domains), "skipped": skips.found,
        "num_bad": num_bad, "bad": bad,
    }  # fmt: skip
    keep_json(path.with_suffix(".json"), found)


def too_many_bad(first: str, max_bad_lines: int) -> DataError:
    """The first bad record, and how to go on without it."""
    way_out = f"Mend it, or leave out bad records: data.max_bad_lines=N (now {max_bad_lines})."
    return DataError(f"{first} {way_out}")


def text_digest(text: str) -> tuple[int, int, int]:
    """(high, low, bytes) of a text: the first halves of its SHA-256, and its length as UTF-8."""
    content = text.encode()
    digest = hashlib.sha256(content).digest()
    return int.from_bytes(digest[:8], "big"), int.from_bytes(digest[8:16], "big"), len(content)


@dataclass(frozen=True)
class Surveyed:
    """A part with its rows."""

    task: SurveyTask
    first: int  # place of its first document among all
    num_documents: int
    names: tuple[str, ...]  # of the domain numbers in its rows

    @property
    def rows(self) -> np.ndarray:
        """(documents,) of ROW_DTYPE, mapped."""
        if not self.num_documents:
            return np.zeros(0, dtype=ROW_DTYPE)
        return np.memmap(self.rows_path, dtype=ROW_DTYPE, mode="r")

    @property
    def rows_path(self) -> Path:
        """Where they are."""
        return self.task.folder / f"{self.task.stem}.rows"

    @property
    def documents(self) -> slice:
        """Its documents among all."""
        return slice(self.first, self.first + self.num_documents)


@dataclass(frozen=True)
class Survey:
    """All parts in order, and the names of all domains, sorted."""

    parts: tuple[Surveyed, ...]
    domains: tuple[str, ...]

    @property
    def num_documents(self) -> int:
        return sum(part.num_documents for part in self.parts)

    def digests(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The texts' hashes, part by part."""
        for part in self.parts:
            rows = part.rows
            yield rows["high"], rows["low"]

    def blocks(self, member_D: np.ndarray, *, purpose: str) -> Blocks:
        """What selection.py reads; member_D marks the documents that count."""

        def read() -> Iterator[Block]:
            number_of = {name: number for number, name in enumerate(self.domains)}
            for part in self.parts:
                rows = part.rows
                # a name that no kept document has is not among the domains
                numbers = np.array([number_of.get(n, 0) for n in part.names] or [0], dtype=np.int64)
                yield Block(
                    member_D[part.documents], rows[purpose], numbers[rows["domain"]],
                    rows["bytes"].astype(np.int64), rows["group"],
                )  # fmt: skip

        return read

    def domains_of(self, member_D: np.ndarray) -> tuple[str, ...]:
        """The names that members have, sorted."""
        names: set[str] = set()
        for part in self.parts:
            used = np.unique(part.rows["domain"][member_D[part.documents]])
            names |= {part.names[number] for number in used}
        return tuple(sorted(names))

    def num_bytes(self, member_D: np.ndarray) -> int:
        """Bytes of the members' text."""
        return sum(int(p.rows["bytes"][member_D[p.documents]].sum()) for p in self.parts)

    def smallest(self, member_D: np.ndarray) -> int:
        """Bytes of the smallest member."""
        sizes = (part.rows["bytes"][member_D[part.documents]] for part in self.parts)
        return min(int(size_M.min()) for size_M in sizes if len(size_M))


def collect(tasks: Sequence[SurveyTask], *, skips: Skips) -> Survey:
    """The survey of parts that are all kept. Raises DataError for too many bad records."""
    parts, first, num_bad, bad = [], 0, 0, list[str]()
    names: set[str] = set()
    for task in tasks:
        found = read_json(task.folder / f"{task.stem}.json")
        parts.append(Surveyed(task, first, found["num_documents"], tuple(found["domains"])))
        first += found["num_documents"]
        names |= set(found["domains"])
        skips.merge(found["skipped"])
        num_bad, bad = num_bad + found["num_bad"], [*bad, *found["bad"]][:1]
        if num_bad > task.max_bad_lines:
            raise too_many_bad(bad[0], task.max_bad_lines)
    return Survey(tuple(parts), tuple(sorted(names)))


def chosen_texts(
    part: Surveyed, chosen_D: np.ndarray, *, on_change: Callable[[], None]
) -> Iterator[tuple[int, str]]:
    """Read a part again: (place in it, text) of the documents that chosen_D, (documents,), marks.

    on_change is called, to raise, where a text is not the one that was surveyed.
    """
    rows = part.rows
    wanted = np.flatnonzero(chosen_D)
    if not len(wanted):
        return
    last, place = int(wanted[-1]), -1
    documents = documents_of(
        part.task.part, on_skip=lambda *_: None, on_bad=lambda _: None, text_key=part.task.text_key
    )
    for place, document in enumerate(itertools.islice(documents, last + 1)):
        if chosen_D[place]:
            row = rows[place]
            if text_digest(document.text) != (row["high"], row["low"], row["bytes"]):
                on_change()
            yield place, document.text
    if place != last:
        on_change()


def _row(document: Document, *, seed: int, domains: dict[str, int]) -> tuple[object, ...]:
    high, low, size = text_digest(document.text)
    group = document.group
    digest = hashlib.sha256(group.encode()).digest()
    draws = [draw(group, seed=seed, purpose=purpose) for purpose in PURPOSES]
    domain = domains.setdefault(document.domain, len(domains))
    return (high, low, int.from_bytes(digest[:8], "big"), *draws, size, domain)
