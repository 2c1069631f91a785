"""A new folder that appears whole or not at all: built beside its place, renamed at the end."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from moe.errors import CheckpointError, ConfigError
from moe.train.atomic_files import make_folder, remove_anyway, sync_folder


def check_target(target: Path, *, needed_bytes: int) -> None:
    """Raise ConfigError where target holds something already, or its disk has too little room."""
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise ConfigError(f"target: {str(target)!r} is a file or a link; give a new folder.")
    if target.is_dir() and any(target.iterdir()):
        raise ConfigError(
            f"target: {str(target)!r} holds files already; nothing is overwritten. Give a folder "
            "that does not exist yet, or an empty one."
        )
    existing = target.absolute()
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        raise ConfigError(f"target: {str(existing)!r} is a file; no folder can be made in it.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(
            f"target: {str(existing)!r} may not be written to; give a folder in a place of yours."
        )
    free = shutil.disk_usage(existing).free
    if needed_bytes > free:
        raise ConfigError(
            f"target: {str(target)!r} needs {_gb(needed_bytes)} and its disk has {_gb(free)} free. "
            "Free some space, or give a folder on another disk."
        )


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yield a folder to fill, which becomes target when the block ends without an exception.

    After any exception, Ctrl-C included, nothing is left: no folder, and no parents made for it.
    Raises CheckpointError where the disk refuses (full, read-only, a file-size limit).
    """
    target = target.absolute()
    made = [path for path in target.parents if not path.exists()]  # innermost first
    temporary = target.parent / f".tmp-{target.name}-{os.getpid()}-{secrets.token_hex(4)}"
    is_done = False
    try:
        make_folder(target.parent)
        temporary.mkdir()
        yield temporary
        sync_folder(temporary)
        os.rename(temporary, target)  # replaces an empty folder
        is_done = True
        sync_folder(target.parent)
    except OSError as error:
        raise CheckpointError(_refused(error, target)) from error
    finally:
        remove_anyway(temporary)
        for folder in () if is_done else made:
            with contextlib.suppress(OSError):
                folder.rmdir()


def _refused(error: OSError, target: Path) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"{target}: cannot be written: the disk is full. Nothing is left behind; free some "
            "space, or set target to another disk."
        )
    if error.errno == errno.EFBIG:
        return (
            f"{target}: cannot be written: a file would be larger than allowed here. Raise the "
            "limit (ulimit -f), or use another file system."
        )
    return (
        f"{target}: cannot be written: {error.strerror or error}. Nothing is left behind; set "
        "target to a place that can be written to."
    )


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:,.2f} GB"
