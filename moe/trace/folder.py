"""How a document trace's folder is begun, goes on after an interruption, and ends.

part-00000.parquet, ...   whole parts, each of whole batches
progress.json             which parts are whole; replaced after every part
vocabulary.json           the text of every token id
trace.json                the same and no more to come; written last, progress.json then goes
.lock, .<name>.<process>  held by the writing process; unfinished files, never read
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from moe.data.manifest import FileEntry
from moe.errors import ConfigError, DataError
from moe.trace.info import (
    PROGRESS_NAME,
    TRACE_NAME,
    VOCABULARY_NAME,
    PartEntry,
    TraceInfo,
    read_info,
    write_info,
)
from moe.train.atomic_files import hash_file, make_folder, remove_anyway, replace_file, sync_folder

_LOCK_NAME = ".lock"
_PART = re.compile(r"part-([0-9]{5,})\.parquet")
_LEFTOVER = re.compile(
    r"\.(part-[0-9]{5,}\.parquet|progress\.json|trace\.json|vocabulary\.json)\.[0-9]+"
)
# settings that only say where things lie: a moved model or text is the same
_PLACES = ("run", "checkpoint", "data_dir")


def part_name(number: int) -> str:
    """The file name of a part; numbers begin with 0."""
    return f"part-{number:05d}.parquet"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make the folder if it is missing, and hold it: ConfigError where another process does."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"target: {str(folder)!r} is a file; give a new folder.")
    make_folder(folder)
    with (folder / _LOCK_NAME).open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"target: another process is writing the trace in {str(folder)!r} now. Wait for "
                "it, or give another folder."
            ) from None
        yield


def begin(
    folder: Path, wanted: TraceInfo, *, vocabulary: bytes | None, on_note: Callable[[str], None]
) -> TraceInfo:
    """Return how far the trace in a locked folder is: wanted with the parts that are whole.

    A new folder gets its first progress.json and the vocabulary. In one of an interrupted trace,
    every part is hashed: those from the first damaged or missing one on are made again, which
    on_note is told. Raises ConfigError where the folder holds something else or another trace,
    DataError for a damaged progress.json.
    """
    for path in folder.iterdir():
        if _LEFTOVER.fullmatch(path.name):
            remove_anyway(path)
    found = _find(folder / PROGRESS_NAME)
    if found is None:
        strange = sorted(p.name for p in folder.iterdir() if p.name != _LOCK_NAME)
        if strange:
            raise ConfigError(
                f"target: {str(folder)!r} is not empty ({strange[0]}) and holds no trace; give a "
                "new folder."
            )
        # before any other file: a folder without it is taken for something else's
        write_info(folder / PROGRESS_NAME, wanted)
        if vocabulary is not None:
            entry = _write_vocabulary(folder, vocabulary)
            wanted = dataclasses.replace(wanted, vocabulary=entry)
            write_info(folder / PROGRESS_NAME, wanted)
        return wanted
    _refuse_other(found, wanted, folder)
    whole = _whole_parts(folder, found, on_note=on_note)
    if vocabulary is not None:
        found = dataclasses.replace(found, vocabulary=_write_vocabulary(folder, vocabulary))
    found = dataclasses.replace(found, parts=whole)
    write_info(folder / PROGRESS_NAME, found)
    known = {part.name for part in whole}
    for path in folder.iterdir():
        if _PART.fullmatch(path.name) and path.name not in known:
            remove_anyway(path)
    sync_folder(folder)
    return found


def find_finished(folder: Path, wanted: TraceInfo) -> TraceInfo | None:
    """The wanted trace, if the folder holds all of it; ConfigError where it holds another."""
    found = _find(folder / TRACE_NAME)
    if found is not None:
        _refuse_other(found, wanted, folder)
    return found


def add_part(folder: Path, info: TraceInfo, part: PartEntry) -> TraceInfo:
    """Note a part that has become whole; returns info with it."""
    info = dataclasses.replace(info, parts=(*info.parts, part))
    write_info(folder / PROGRESS_NAME, info)
    return info


def end(folder: Path, info: TraceInfo) -> None:
    """Give the trace its trace.json: nothing more will come."""
    write_info(folder / TRACE_NAME, info)
    remove_anyway(folder / PROGRESS_NAME)
    sync_folder(folder)


def _find(path: Path) -> TraceInfo | None:
    try:
        return read_info(path)
    except FileNotFoundError:
        return None


def _write_vocabulary(folder: Path, content: bytes) -> FileEntry:
    path = folder / VOCABULARY_NAME
    replace_file(path, content)
    written, _ = hash_file(path)
    return FileEntry(VOCABULARY_NAME, written.size, written.sha256)


def _whole_parts(
    folder: Path, info: TraceInfo, *, on_note: Callable[[str], None]
) -> tuple[PartEntry, ...]:
    for number, part in enumerate(info.parts):
        try:
            written, _ = hash_file(folder / part.name)
            problem = "" if tuple(written) == (part.num_bytes, part.sha256) else "is damaged"
        except FileNotFoundError:
            problem = "is missing"
        except (OSError, ValueError) as error:
            problem = f"cannot be read ({error})"
        if problem:
            again = len(info.parts) - number
            on_note(f"{folder / part.name}: {problem}; {again} part(s) are made again from there.")
            return info.parts[:number]
    return info.parts


def _refuse_other(found: TraceInfo, wanted: TraceInfo, folder: Path) -> None:
    """Raise ConfigError naming the first thing in which another trace differs."""
    where = f"target: {str(folder)!r} holds a trace"
    if found.kind != wanted.kind:
        raise ConfigError(f"{where} of a training run; give another folder.")
    for name, what in (("model_sha256", "model"), ("data_fingerprint", "text")):
        old, new = getattr(found, name), getattr(wanted, name)
        if old != new:
            raise ConfigError(
                f"{where} of another {what} (SHA-256 {old[:12]}..., this one has {new[:12]}...). "
                "Give another folder."
            )
    old, new = json.loads(found.settings), json.loads(wanted.settings)
    for key in (key for key in new if key not in _PLACES and old.get(key) != new[key]):
        raise ConfigError(
            f"{where} with {key}={json.dumps(old.get(key))}; this one has {json.dumps(new[key])}. "
            f"Give the same value to go on with it, or another folder."
        )
    if found.layout != wanted.layout or found.domains != wanted.domains:
        raise DataError(f"{where} of another shape; give another folder.")
