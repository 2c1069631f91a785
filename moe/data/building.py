"""Where a prepared folder is built: beside its target, by one process, each result kept.

A result is written under another name, flushed and renamed, so that one that is there is whole. Its
name holds a hash of all that it depends on; so whoever builds next, after a kill too, takes what
fits and removes the rest.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from moe.errors import DataError
from moe.train.atomic_files import remove_anyway

OWNER_NAME = "owner.json"


def building_folder(target: Path) -> Path:
    """The one folder in which target is built."""
    return target.with_name(f".{target.name}.building")


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Make the folder and hold it while in the block. DataError names another holder."""
    with _claimed(folder):
        for path in folder.iterdir():
            if path.name.startswith("."):  # half a result of a builder that was killed
                remove_anyway(path)
        try:
            yield
        finally:
            if folder.exists() and {path.name for path in folder.iterdir()} == {OWNER_NAME}:
                remove_building(folder)  # nothing was done


def remove_building(folder: Path) -> None:
    """Remove the folder; its holder is still named in it, so that goes last."""
    for path in list(folder.iterdir()):
        if path.name != OWNER_NAME:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.rmtree(folder)


def key_of(*parts: object) -> str:
    """A name for a result: the hash of all that it depends on."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


@contextmanager
def kept_file(path: Path) -> Iterator[BinaryIO]:
    """A new file that has its name only when it is whole and on the disk."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        remove_anyway(temporary)
        raise


def keep_json(path: Path, value: Any) -> None:
    """Keep a small result; beside larger files, the last one, which says that they are whole."""
    with kept_file(path) as file:
        file.write(json.dumps(value).encode())


def read_json(path: Path) -> Any:
    """A result that keep_json kept, or None."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None


def remove_others(folder: Path, *, prefix: str, wanted: Iterable[str]) -> None:
    """Remove results of other text or settings: names that begin with prefix and no wanted stem."""
    stems = set(wanted)
    for path in folder.iterdir():
        if path.name.startswith(prefix) and path.name.split(".")[0] not in stems:
            path.unlink()


@contextmanager
def _claimed(folder: Path) -> Iterator[None]:
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            file = (folder / OWNER_NAME).open("a+b")
        except FileNotFoundError:
            continue  # its holder has just removed it
        with file:
            if not _lock(file, folder):
                continue
            file.truncate(0)
            file.write(
                json.dumps(
                    {
                        "host": socket.gethostname(),
                        "pid": os.getpid(),
                        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
                    }
                ).encode()
            )
            file.flush()
            yield
            return


def _lock(file: BinaryIO, folder: Path) -> bool:
    """Lock the owner's file; False if it was removed meanwhile. DataError names who has it."""
    file.seek(0)
    try:
        owner = json.loads(file.read())
    except ValueError:
        owner = {}
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _is_held(folder, owner, "Wait for it, or give another paths.data_dir.") from None
    except OSError:
        # a file system without locks: then the owner's own words are what is known
        if owner and (owner.get("host") != socket.gethostname() or _lives(owner.get("pid"))):
            raise _is_held(
                folder, owner, f"If that process is gone, remove {folder / OWNER_NAME}."
            ) from None
    try:
        return os.path.samestat(os.fstat(file.fileno()), (folder / OWNER_NAME).stat())
    except FileNotFoundError:
        return False


def _is_held(folder: Path, owner: dict[str, Any], way_out: str) -> DataError:
    who = "another process"
    if owner:
        who = f"process {owner.get('pid')} on {owner.get('host')}, since {owner.get('since')},"
    return DataError(f"paths.data_dir: {who} is preparing this folder (in {folder}). {way_out}")


def _lives(pid: object) -> bool:
    try:
        os.kill(int(str(pid)), 0)
    except (ProcessLookupError, ValueError):
        return False
    except PermissionError:
        return True
    return int(str(pid)) != os.getpid()
