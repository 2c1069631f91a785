"""Which documents there are: folders, text files, JSONL and builtin:python, in a fixed order.

A document carries its domain (what losses are reported by) and its group: documents of one group
always stay on the same side of the train/validation split.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe.errors import DataError, nearest

BUILTIN_PYTHON = "builtin:python"
# fmt: off
TEXT_SUFFIXES = frozenset((
    ".txt", ".text", ".md", ".rst", ".adoc", ".org", ".tex", ".html", ".htm", ".css", ".xml",
    ".yaml", ".yml", ".toml", ".ini", ".cfg", ".sql", ".sh", ".py", ".pyi", ".pyx", ".c", ".h",
    ".cc", ".cpp", ".cxx", ".hh", ".hpp", ".cu", ".cuh", ".m", ".rs", ".go", ".java", ".kt",
    ".scala", ".swift", ".js", ".jsx", ".ts", ".tsx", ".rb", ".php", ".pl", ".lua", ".r", ".jl",
    ".hs", ".ml", ".ex", ".erl", ".clj", ".el", ".vim", ".cmake", ".proto", ".f90",
))
# fmt: on
TEXT_NAMES = frozenset({"readme", "license", "licence", "copying", "notice", "makefile"})
LEFT_OUT_FOLDERS = frozenset({"__pycache__", "node_modules"})  # besides those that begin with "."

OnSkip = Callable[[str, str], None]  # (origin, reason)


@dataclass(frozen=True)
class Document:
    """One text; origin says where it came from and group what must not be torn apart."""

    text: str
    domain: str
    origin: str
    group: str


def read_documents(sources: Sequence[str], *, on_skip: OnSkip) -> Iterator[Document]:
    """Yield the documents of every source in order; files of a folder are sorted by path.

    - a folder, with its sub-folders: files with a known text suffix, and JSONL files. The domain is
      the first sub-folder's name, or the folder's own for files directly in it.
    - a text file: one document; the domain is the file's name without suffix.
    - a .jsonl file: each line an object with text, and optionally domain and id.
    - builtin:python: see moe/data/python_corpus.py.

    Files that are binary, not UTF-8 or empty are passed to on_skip and left out. A missing source
    or a bad JSONL line raises DataError. A document must fit in memory.
    """
    for source in sources:
        if source == BUILTIN_PYTHON:
            from moe.data.python_corpus import python_documents

            yield from python_documents(on_skip=on_skip)
            continue
        for path, origin, domain in _files(source, on_skip=on_skip):
            if path.suffix.lower() == ".jsonl":
                yield from _jsonl_documents(path, origin=origin, domain=domain, on_skip=on_skip)
            else:
                text = read_text(path, origin=origin, on_skip=on_skip)
                if text is not None:
                    yield Document(text, domain=domain, origin=origin, group=origin)


def sources_signature(sources: Sequence[str]) -> str:
    """A hash of the paths, sizes and times of the sources' files, to see that they changed.

    builtin:python counts by name only: installing a package must not make prepared data stale.
    """
    entries: list[list[object]] = []
    for source in sources:
        if source == BUILTIN_PYTHON:
            entries.append([source])
            continue
        for path, origin, _ in _files(source, on_skip=lambda origin, reason: None):
            try:
                status = path.stat()
            except OSError as error:
                raise DataError(f"{path}: cannot be read ({error.strerror}).") from None
            entries.append([origin, status.st_size, status.st_mtime_ns])
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()


def read_text(path: Path, *, origin: str, on_skip: OnSkip) -> str | None:
    """The text of a UTF-8 file with its line ends as they are, or None after on_skip."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from None
    if b"\0" in raw:
        on_skip(origin, "binary")
        return None
    try:
        text = raw.removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError:
        on_skip(origin, "not UTF-8")
        return None
    if not text.strip():
        on_skip(origin, "empty")
        return None
    return text


def walk_files(folder: Path, *, left_out: frozenset[str]) -> Iterator[Path]:
    """Files under folder, sorted by relative path, without hidden and left-out sub-folders.

    Links to folders are not followed, so that a loop of links ends.
    """

    def fail(error: OSError) -> None:
        raise DataError(f"{error.filename}: cannot be read ({error.strerror}).")

    found = []
    for parent, folders, names in os.walk(folder, onerror=fail):
        folders[:] = [n for n in folders if n not in left_out and not n.startswith(".")]
        found += [Path(parent, name) for name in names if not name.startswith(".")]
    return iter(sorted(found, key=lambda path: path.relative_to(folder).parts))


def _files(source: str, *, on_skip: OnSkip) -> Iterator[tuple[Path, str, str]]:
    """Yield (path, origin, domain); the origin does not depend on where the source lies."""
    root = Path(source).expanduser()
    if root.is_file():
        yield root, root.name, root.stem
        return
    if not root.is_dir():
        raise DataError(
            f"data.sources: {source!r} does not exist (working directory {Path.cwd()}). "
            f"Give a folder, a text file, a .jsonl file, or {BUILTIN_PYTHON}."
            + nearest(source, [BUILTIN_PYTHON])
        )
    name = root.resolve().name
    for path in walk_files(root, left_out=LEFT_OUT_FOLDERS):
        inner = path.relative_to(root)
        origin = f"{name}/{inner.as_posix()}"
        if not path.is_file():
            on_skip(origin, "not a file")
        elif not _is_text_name(path):
            on_skip(origin, "not a known text suffix")
        else:
            yield path, origin, inner.parts[0] if len(inner.parts) > 1 else name


def _is_text_name(path: Path) -> bool:
    suffix = path.suffix.lower()
    return suffix in TEXT_SUFFIXES or suffix == ".jsonl" or path.name.lower() in TEXT_NAMES


def _jsonl_documents(
    path: Path, *, origin: str, domain: str, on_skip: OnSkip
) -> Iterator[Document]:
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    where = f"{origin}:{number}"
                    document = _jsonl_document(line, place=f"{path}, line {number}", domain=domain)
                    if document is None:
                        on_skip(where, "empty")
                        continue
                    text, own_domain, key = document
                    yield Document(text, own_domain, where, f"{origin}/{own_domain}/{key}")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from None


def _jsonl_document(line: bytes, *, place: str, domain: str) -> tuple[str, str, str] | None:
    """(text, domain, key) of a line; without an id the key is the text's hash."""
    try:
        fields: Any = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise DataError(f"{place}: is not UTF-8; save the file as UTF-8.") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: is not JSON ({error}); each line must be one object.") from None
    if not isinstance(fields, dict) or not isinstance(fields.get("text"), str):
        got = sorted(fields) if isinstance(fields, dict) else type(fields).__name__
        raise DataError(
            f'{place}: has no "text" that is a string (found {got}); each line must be '
            'like {"text": "...", "domain": "news", "id": "7"}; domain and id may be left out.'
        )
    text, own_domain = fields["text"], fields.get("domain")
    if own_domain is None:
        own_domain = domain
    if not isinstance(own_domain, str) or not own_domain:
        raise DataError(f'{place}: "domain" is {own_domain!r}; it must be a string, not empty.')
    key = fields.get("id")
    if key is not None and not isinstance(key, str | int):
        raise DataError(f'{place}: "id" is {key!r}; it must be a string or a whole number.')
    if not text.strip():
        return None
    try:
        digest = hashlib.sha256(text.encode()).hexdigest()
        (own_domain + str(key)).encode()
    except UnicodeEncodeError:
        raise DataError(
            f"{place}: has half of a surrogate pair (such as \\ud800), which is not text; "
            "remove it or replace it by \\ufffd."
        ) from None
    return text, own_domain, digest if key is None else str(key)
