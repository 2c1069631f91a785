"""Which files the sources hold, in a fixed order: what each is read as, and what is left out.

Links are followed inside a source only. A linked folder is never entered, because a loop would not
end, and a linked file outside could be anything of this machine.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

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
RECORD_KINDS = {
    ".jsonl": "lines", ".ndjson": "lines", ".json": "array", ".csv": "csv", ".tsv": "tsv",
    ".parquet": "parquet", ".pq": "parquet",
}  # fmt: skip
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
READABLE = (
    "text files, .jsonl, .ndjson, .json, .csv, .tsv (each also as .gz, .bz2, .xz or .zst) and "
    ".parquet"
)
# what holds text for other programs: (what it is, what to do with it)
_ARCHIVE = ("an archive", "unpack it")
_OTHER_TABLE = ("a table that is not read here", "write it as Parquet or JSON lines")
_DOCUMENT = ("a formatted document", "save it as plain text")
_PYTHON = ("a file of Python or NumPy objects", "it is never opened; write the text as JSON lines")
NOT_READ = {
    **dict.fromkeys((".zip", ".tar", ".tgz", ".tbz", ".txz", ".7z", ".rar"), _ARCHIVE),
    **dict.fromkeys(
        (".arrow", ".feather", ".ipc", ".avro", ".orc", ".tfrecord", ".h5", ".hdf5", ".lance",
         ".db", ".sqlite", ".sqlite3", ".xls", ".xlsx", ".ods", ".warc", ".mds", ".msgpack"),
        _OTHER_TABLE,
    ),
    **dict.fromkeys((".epub", ".pdf", ".doc", ".docx", ".odt", ".rtf", ".mobi"), _DOCUMENT),
    **dict.fromkeys((".pkl", ".pickle", ".pt", ".pth", ".bin", ".npy", ".npz", ".idx"), _PYTHON),
}  # fmt: skip
LEFT_OUT_FOLDERS = frozenset({"__pycache__", "node_modules"})  # besides those that begin with "."
LINKED_FOLDER = "link to a folder: give its target as a source of its own"
LINK_OUTSIDE = "link that leaves the source: copy the file to have it read"

OnSkip = Callable[[str, str], None]  # (origin, reason)


@dataclass(frozen=True)
class SourceFile:
    """A file to read; origin names it and does not depend on where the source lies."""

    path: str
    origin: str
    domain: str
    kind: str  # text, lines, array, csv, tsv, parquet; documents: of our own making
    compression: str  # "" or one of COMPRESSED
    is_named: bool  # given as a source itself, so that nothing in it may be passed over
    num_bytes: int
    modified_ns: int


def source_files(sources: Sequence[str], *, on_skip: OnSkip) -> Iterator[SourceFile]:
    """Yield the files of every source but builtin:python; those of a folder are sorted by path.

    Raises DataError for a source that is missing or, being a file, of a kind that is not read.
    """
    for source in sources:
        if source != BUILTIN_PYTHON:
            yield from _files_of(source, on_skip=on_skip)


def sources_signature(sources: Sequence[str]) -> str:
    """A hash of the paths, sizes and times of the sources' files, to see that they changed.

    builtin:python counts by name only: installing a package must not make prepared data stale.
    """
    entries: list[list[object]] = []
    for source in sources:
        if source == BUILTIN_PYTHON:
            entries.append([source])
            continue
        for file in source_files([source], on_skip=lambda origin, reason: None):
            entries.append([file.origin, file.num_bytes, file.modified_ns])
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()


def walk_files(
    folder: Path,
    *,
    left_out: frozenset[str],
    on_linked_folder: Callable[[Path], None] | None = None,
) -> Iterator[Path]:
    """Files under folder, sorted by relative path, without hidden and left-out sub-folders."""

    def fail(error: OSError) -> None:
        raise DataError(f"{error.filename}: cannot be read ({error.strerror}).")

    found = []
    for parent, folders, names in os.walk(folder, onerror=fail):
        folders[:] = [n for n in folders if n not in left_out and not n.startswith(".")]
        if on_linked_folder is not None:
            for name in sorted(folders):
                if os.path.islink(os.path.join(parent, name)):
                    on_linked_folder(Path(parent, name))
        found += [Path(parent, name) for name in names if not name.startswith(".")]
    return iter(sorted(found, key=lambda path: path.relative_to(folder).parts))


def _files_of(source: str, *, on_skip: OnSkip) -> Iterator[SourceFile]:
    root = Path(source).expanduser()
    if root.is_file():
        yield _named_file(root)
        return
    if not root.is_dir():
        raise DataError(
            f"data.sources: {source!r} does not exist (working directory {Path.cwd()}). "
            f"Give a folder, a file ({READABLE}), or {BUILTIN_PYTHON}."
            + nearest(source, [BUILTIN_PYTHON])
        )
    name, whole = root.resolve().name, os.path.realpath(root)

    def on_linked_folder(path: Path) -> None:
        on_skip(f"{name}/{path.relative_to(root).as_posix()}", LINKED_FOLDER)

    for path in walk_files(root, left_out=LEFT_OUT_FOLDERS, on_linked_folder=on_linked_folder):
        inner = path.relative_to(root)
        origin = f"{name}/{inner.as_posix()}"
        kind, compression, reason = _kind_of(path.name)
        if not path.is_file():
            on_skip(origin, "not a file")
        elif not kind:
            on_skip(origin, reason)
        elif path.is_symlink() and not os.path.realpath(path).startswith(f"{whole}{os.sep}"):
            on_skip(origin, LINK_OUTSIDE)
        else:
            domain = inner.parts[0] if len(inner.parts) > 1 else name
            yield _file(path, origin, domain, kind, compression, is_named=False)


def _named_file(path: Path) -> SourceFile:
    kind, compression, _ = _kind_of(path.name)
    stem = path.name[: -len(compression)] if compression else path.name
    suffix = Path(stem).suffix.lower()
    what, instead = NOT_READ.get(suffix, ("", ""))
    if what:
        raise DataError(
            f"data.sources: {path} is {what}; {instead}. Files that are read: {READABLE}."
        )
    if not kind and compression == "":
        kind = "text"  # whoever names a file means its text
    if kind == "parquet" and compression:
        raise DataError(f"data.sources: {path}: Parquet compresses by itself; unpack the file.")
    return _file(path, path.name, Path(stem).stem, kind or "text", compression, is_named=True)


def _kind_of(name: str) -> tuple[str, str, str]:
    """(kind, compression, "") of a file's name, or ("", compression, why it is left out)."""
    suffix = Path(name).suffix.lower()
    compression = suffix if suffix in COMPRESSED else ""
    inner = name[: -len(compression)] if compression else name
    suffix = Path(inner).suffix.lower()
    kind = RECORD_KINDS.get(suffix, "")
    if kind == "parquet" and compression:
        return "", compression, "Parquet inside another compression, which is not read"
    if kind:
        return kind, compression, ""
    if suffix in TEXT_SUFFIXES or inner.lower() in TEXT_NAMES:
        return "text", compression, ""
    if suffix in NOT_READ:
        return "", compression, f"{NOT_READ[suffix][0]}, which is not read"
    return "", compression, "not a known text suffix"


def _file(
    path: Path, origin: str, domain: str, kind: str, compression: str, *, is_named: bool
) -> SourceFile:
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from None
    return SourceFile(
        str(path), origin, domain, kind, compression, is_named, status.st_size, status.st_mtime_ns
    )
