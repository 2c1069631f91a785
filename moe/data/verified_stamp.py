"""What was verified in a prepared folder, and when it need not be again: verified.json.

A file whose size, times and expected hash are those of the stamp was not written since it was
hashed. What the disk itself forgets is found by whoever deletes the stamp. It lies in the folder,
or in the user's cache where the folder cannot be written.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from moe.data.manifest import FileEntry, require_file
from moe.train.atomic_files import replace_file

STAMP_NAME = "verified.json"
_VERSION = 1
# a file written this short before may be written again within one tick of its file system's clock
_SETTLED_SECONDS = 2.0


class FileState(NamedTuple):
    """A file as it lies there, and the hash that it was written with."""

    size: int
    modified_ns: int
    changed_ns: int
    sha256: str


def state_of(folder: Path, entry: FileEntry) -> FileState:
    """The state now; raises DataError for a missing file, a link, or another size."""
    status = require_file(folder, entry)
    return FileState(status.st_size, status.st_mtime_ns, status.st_ctime_ns, entry.sha256)


def read_stamp(folder: Path) -> dict[str, FileState]:
    """The states in which files were verified, by name; a stamp that cannot be read is none."""
    states: dict[str, FileState] = {}
    for path in _places(folder):
        with contextlib.suppress(OSError, ValueError, TypeError, AttributeError, RecursionError):
            content: Any = json.loads(path.read_bytes())
            if content["version"] == _VERSION:
                states |= {name: FileState(*state) for name, state in content["files"].items()}
    return states


def write_stamp(folder: Path, states: Mapping[str, FileState]) -> Path | None:
    """Add these states to the stamp; returns where it lies, None where there is no room for one.

    States that are a moment old only are left out.
    """
    settled_ns = time.time_ns() - int(_SETTLED_SECONDS * 1e9)
    settled = {
        name: state
        for name, state in states.items()
        if max(state.modified_ns, state.changed_ns) < settled_ns
    }
    if not settled:
        return None
    content = {"version": _VERSION, "files": read_stamp(folder) | settled}
    for path in _places(folder):
        with contextlib.suppress(OSError):
            replace_file(path, json.dumps(content, indent=0).encode() + b"\n")
            return path
    return None


def _places(folder: Path) -> list[Path]:
    places = [folder / STAMP_NAME]
    cache = os.environ.get("XDG_CACHE_HOME", "")
    with contextlib.suppress(RuntimeError):  # a user without a home folder
        root = Path(cache) if os.path.isabs(cache) else Path("~/.cache").expanduser()
        name = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:32]
        places.append(root / "phimoe" / "verified" / f"{name}.json")
    return places
