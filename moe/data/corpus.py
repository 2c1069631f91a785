"""Which documents there are: those of folders, text files, records and builtin:python, in order.

A document carries its domain (what losses are reported by) and its group: documents of one group
always stay on the same side of the train/validation split.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

from moe.data.record_rows import (
    NoTextColumnError,
    OnBad,
    is_array,
    looks_like_json_lines,
    row_group_sizes,
    rows_of,
)
from moe.data.source_bytes import lines_between, opened_source
from moe.data.source_files import BUILTIN_PYTHON, OnSkip, SourceFile, source_files
from moe.data.text_pieces import PIECE_BYTES, decoded, num_pieces, pieces
from moe.errors import DataError

LEAST_PART_BYTES, MOST_PART_BYTES = 2**20, 64 * 2**20


@dataclass(frozen=True)
class Document:
    """One text; origin says where it came from and group what must not be torn apart."""

    text: str
    domain: str
    origin: str
    group: str


@dataclass(frozen=True)
class Span:
    """Some of a file: bytes of JSON lines, pieces of a text, row groups of Parquet, or all."""

    file: SourceFile
    start: int = 0
    stop: int | None = None  # None: to the end
    num_bytes: int = 0  # on disk, about


@dataclass(frozen=True)
class Part:
    """Consecutive documents of the sources that are worked on at once: small files, or a span."""

    spans: tuple[Span, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes on disk, about."""
        return sum(span.num_bytes for span in self.spans)

    def key(self) -> str:
        """What the documents depend on, as text: names, sizes and times of the files."""
        return json.dumps([asdict(span) for span in self.spans], sort_keys=True)


def read_documents(
    sources: Sequence[str], *, on_skip: OnSkip, text_key: str = "text"
) -> Iterator[Document]:
    """Yield the documents of every source in order; files of a folder are sorted by path.

    - a folder, with its sub-folders: text files by their suffixes, and files of records. The domain
      is the first sub-folder's name, or the folder's own for files directly in it.
    - a text file: one document, or several of one group if it is longer than PIECE_BYTES; the
      domain is the file's name without suffix.
    - JSON lines, a JSON array, .csv, .tsv or .parquet: each record has a text, and optionally
      domain and id. All but Parquet may be packed as .gz, .bz2, .xz or .zst.
    - builtin:python: see moe/data/python_corpus.py.

    Files that are binary, not UTF-8 or empty are passed to on_skip and left out. A missing source
    or a bad record raises DataError.
    """
    for source in sources:
        if source == BUILTIN_PYTHON:
            from moe.data.python_corpus import python_documents

            yield from python_documents(on_skip=on_skip)
            continue
        for file in source_files([source], on_skip=on_skip):
            yield from documents_of(
                Part((Span(file),)), on_skip=on_skip, on_bad=_raise, text_key=text_key
            )


def parts_of(files: Sequence[SourceFile]) -> list[Part]:
    """Cut the files into parts of some MiB: a function of the files alone."""
    total = sum(file.num_bytes for file in files)
    most = min(max(total // 64, LEAST_PART_BYTES), MOST_PART_BYTES)
    parts: list[Part] = []
    waiting: list[Span] = []  # small files, until they are a part
    for file in files:
        spans = _spans_of(file, most=most)
        if len(spans) > 1:
            if waiting:
                parts.append(Part(tuple(waiting)))
            parts += [Part((span,)) for span in spans]
            waiting = []
            continue
        waiting += spans
        if sum(span.num_bytes for span in waiting) >= most:
            parts.append(Part(tuple(waiting)))
            waiting = []
    return [*parts, Part(tuple(waiting))] if waiting else parts


def own_line(document: Document) -> bytes:
    """A document as a line of a file of kind "documents", which parts can be cut from."""
    return (
        json.dumps([document.text, document.domain, document.origin, document.group]).encode()
        + b"\n"
    )


def documents_of(
    part: Part, *, on_skip: OnSkip, on_bad: OnBad, text_key: str
) -> Iterator[Document]:
    """Yield the documents of a part in order."""
    for span in part.spans:
        file = span.file
        if file.kind == "text":
            yield from _text_documents(span, on_skip=on_skip, text_key=text_key)
        elif file.kind == "documents":
            yield from _own_documents(span)
        else:
            yield from _record_documents(span, on_skip=on_skip, on_bad=on_bad, text_key=text_key)


def _text_documents(span: Span, *, on_skip: OnSkip, text_key: str) -> Iterator[Document]:
    file = span.file
    is_long = bool(file.compression) or file.num_bytes > PIECE_BYTES
    number = span.start
    with opened_source(file) as stream:
        for raw in pieces(stream, first=span.start, stop=span.stop):
            origin = f"{file.origin}, piece {number + 1}" if is_long else file.origin
            if number == 0 and file.is_named and looks_like_json_lines(raw, text_key=text_key):
                raise DataError(
                    f"data.sources: {file.path} holds a JSON record in its first line, but its "
                    "name says text; name it .jsonl to have its records read."
                )
            number += 1
            text, reason = decoded(raw)
            if text is None:
                on_skip(origin, reason)
            else:
                yield Document(text, domain=file.domain, origin=origin, group=file.origin)
    if number == 0:
        on_skip(file.origin, "empty")


def _record_documents(
    span: Span, *, on_skip: OnSkip, on_bad: OnBad, text_key: str
) -> Iterator[Document]:
    file = span.file
    try:
        rows = rows_of(file, start=span.start, stop=span.stop, text_key=text_key, on_bad=on_bad)
        for row in rows:
            if row is None:
                on_skip(file.origin, "empty")
                continue
            text, domain, key = row
            domain = domain or file.domain
            yield Document(text, domain, file.origin, f"{file.origin}/{domain}/{key}")
    except NoTextColumnError:
        if file.is_named:
            raise
        on_skip(file.origin, f"without texts: no {text_key!r} in its records")


def _own_documents(span: Span) -> Iterator[Document]:
    with opened_source(span.file) as stream:
        lines = lines_between(stream, start=span.start, stop=span.stop, most_bytes=MOST_PART_BYTES)
        for line in lines:
            yield Document(*json.loads(line))


def _spans_of(file: SourceFile, *, most: int) -> list[Span]:
    """The whole file as one span, or spans of about most bytes where it can be cut."""
    whole = [Span(file, num_bytes=file.num_bytes)]
    if file.compression or file.num_bytes <= most:
        return whole
    if file.kind == "text":
        count, each = num_pieces(file.num_bytes), max(1, most // PIECE_BYTES)
        firsts = range(0, count, each)
        sizes = [(min(n + each, count) - n) * PIECE_BYTES for n in firsts]
    elif file.kind in ("lines", "documents") and not is_array(file):
        firsts = range(0, file.num_bytes, most)
        sizes = [min(most, file.num_bytes - n) for n in firsts]
    elif file.kind == "parquet":
        return _row_group_spans(file, most=most)
    else:
        return whole
    stops: list[int | None] = [*list(firsts)[1:], None]
    return [
        Span(file, start, stop, min(size, file.num_bytes))
        for start, stop, size in zip(firsts, stops, sizes, strict=True)
    ]


def _row_group_spans(file: SourceFile, *, most: int) -> list[Span]:
    spans: list[Span] = []
    start, size = 0, 0
    sizes = row_group_sizes(file)
    for number, group_bytes in enumerate(sizes):
        size += group_bytes
        if size >= most or number == len(sizes) - 1:
            spans.append(Span(file, start, number + 1, size))
            start, size = number + 1, 0
    return spans or [Span(file, num_bytes=file.num_bytes)]


def _raise(error: DataError) -> None:
    raise error
