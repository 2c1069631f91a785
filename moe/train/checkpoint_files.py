"""In which order a checkpoint's files are written, renamed and removed, so that none is ever torn.

Names under a checkpoint root, and what a process killed at any moment can leave:

    step_00000100              a whole checkpoint, always
    latest                     the name of the one saved last
    .replaced-step_00000100    a whole one, for the instant in which the same step is replaced
    .tmp-*                     being built, or left by a killed save; never read
    .trash-*                   being removed; never read
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import os
import platform
import re
import secrets
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import safetensors
import torch

from moe.errors import CheckpointError
from moe.parallel.process_life import was_alive
from moe.progress_call import ProgressCall, no_progress
from moe.run_folder import checkpoint_name, step_of_name
from moe.train.atomic_files import (
    Buffer,
    make_folder,
    read_small_file,
    remove_anyway,
    sync_folder,
    write_new_file,
)
from moe.train.checkpoint_manifest import (
    MANIFEST_NAME,
    FileRecord,
    Manifest,
    manifest_bytes,
)
from moe.train.tensor_header import TensorRecord

LATEST_NAME = "latest"

_TEMPORARY = ".tmp-"
_TRASH = ".trash-"
_REPLACED = ".replaced-"
_LATEST_LIMIT_BYTES = 256


def list_checkpoints(root: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every checkpoint under root, newest first, none of them verified.

    A step in the middle of being replaced is listed under its former content too, after the new
    one. Raises OSError where root exists and cannot be read.
    """
    found = []
    for name in os.listdir(root) if root.exists() else ():
        step = step_of_name(name.removeprefix(_REPLACED))
        if step is not None:
            found.append((-step, name.startswith(_REPLACED), root / name))
    return [(-negative, folder) for negative, _, folder in sorted(found)]


def read_latest(root: Path) -> str | None:
    """The name in the file `latest`, or None without one. Raises OSError or ValueError."""
    try:
        raw = read_small_file(root / LATEST_NAME, limit_bytes=_LATEST_LIMIT_BYTES)
    except FileNotFoundError:
        return None
    name = raw.decode("ascii").removesuffix("\n")
    if step_of_name(name) is None:
        raise ValueError(f"it holds {name!r}, which is not the name of a checkpoint")
    return name


def make_temporary_folder(root: Path, step: int) -> Path:
    """Make an empty folder under root for building a checkpoint. Raises OSError."""
    make_folder(root)
    folder = root / f"{_TEMPORARY}{checkpoint_name(step)}-{os.getpid()}-{secrets.token_hex(4)}"
    folder.mkdir()
    return folder


def write_files(
    folder: Path, files: Mapping[str, Iterable[Buffer]], *, progress: ProgressCall = no_progress
) -> list[FileRecord]:
    """Write files, by name, into folder, one after the other, each flushed to the disk."""
    return [
        FileRecord(name, *write_new_file(folder / name, chunks, progress=progress))
        for name, chunks in files.items()
    ]


def write_manifest(
    folder: Path,
    step: int,
    *,
    files: Sequence[FileRecord],
    tables: Mapping[str, Mapping[str, TensorRecord]],
) -> None:
    """Write the manifest, the last file of a checkpoint, and flush the folder to the disk."""
    manifest = Manifest(
        step=step,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
        written_by={
            "python": platform.python_version(),
            "safetensors": safetensors.__version__,
            "torch": str(torch.__version__),
        },
        files=tuple(files),
        tensors=tables,
    )
    write_new_file(folder / MANIFEST_NAME, [manifest_bytes(manifest)])
    sync_folder(folder)


def publish(built: Path, target: Path) -> None:
    """Give a finished folder its final name, then point `latest` at it.

    The new `latest` is on the disk before anything is renamed, so a full disk stops the save while
    all is as it was. A folder that has the name already steps aside, and comes back on failure.
    """
    root = target.parent
    pointer = root / f"{_TEMPORARY}{LATEST_NAME}-{os.getpid()}-{secrets.token_hex(4)}"
    aside = root / (_REPLACED + target.name)
    try:
        write_new_file(pointer, [target.name.encode("ascii") + b"\n"])
        replaces = os.path.lexists(target)
        if replaces:
            os.rename(target, aside)
        try:
            os.rename(built, target)
        except OSError:
            if replaces:
                os.rename(aside, target)
            raise
        sync_folder(root)
        os.replace(pointer, root / LATEST_NAME)
        sync_folder(root)
    finally:
        remove_anyway(pointer)
    if replaces:
        _discard(aside)


def remove_leftovers(root: Path) -> None:
    """Remove what dead processes left; a checkpoint that was set aside gets its name back."""
    for name in os.listdir(root) if root.is_dir() else ():
        if name.startswith((_TEMPORARY, _TRASH)):
            if not _is_being_written(root / name):
                remove_anyway(root / name)
        elif name.startswith(_REPLACED) and step_of_name(name.removeprefix(_REPLACED)) is not None:
            target = root / name.removeprefix(_REPLACED)
            if os.path.lexists(target):
                _discard(root / name)
            else:
                os.rename(root / name, target)


def _is_being_written(path: Path) -> bool:
    """Whether another process of this machine made it and lives; its name has the number."""
    match = re.fullmatch(r"\.tmp-[a-z_0-9]+-([0-9]+)-[0-9a-f]+", path.name)
    if match is None or int(match[1]) == os.getpid():
        return False
    with contextlib.suppress(OSError):
        return was_alive(int(match[1]), at=path.stat().st_mtime)
    return False


def remove_old(
    root: Path, step: int, *, keep_last: int, keep_every: int = 0, best_step: int | None = None
) -> None:
    """Remove checkpoints before step that no rule keeps; step itself stays.

    Kept are the newest keep_last - 1 before it, multiples of keep_every (0: none), and best_step.
    What cannot be removed now (a file in use on a network disk) is tried again at the next save.
    """
    older = [(other, folder) for other, folder in list_checkpoints(root) if other < step]
    for other, folder in older[keep_last - 1 :]:
        if other == best_step or (keep_every and other % keep_every == 0):
            continue
        with contextlib.suppress(OSError):
            _discard(folder)


def _discard(folder: Path) -> None:
    # renamed first: a process killed while removing leaves no half-empty checkpoint
    trash = folder.parent / f"{_TRASH}{folder.name}-{secrets.token_hex(4)}"
    os.rename(folder, trash)
    remove_anyway(trash)


def saving_failed(
    error: Exception, root: Path, step: int, *, rank: int | None = None
) -> CheckpointError:
    """The message for a save that was refused: where, why, what is still there, the fix.

    rank: which of several ranks it happened to.
    """
    if isinstance(error, OSError):
        reason = error.strerror or str(error)
        where = f" ({error.filename})" if error.filename else ""
    else:
        reason, where = f"{type(error).__name__}: {error}", ""
    who = "" if rank is None else f"rank {rank}: "
    before = "No earlier checkpoint is there."
    with contextlib.suppress(OSError):
        found = list_checkpoints(root)
        if found:
            before = (
                f"The newest checkpoint there, {found[0][1].name}, is untouched and still good."
            )
    return CheckpointError(
        f"{root}: cannot save {checkpoint_name(step)}: {who}{reason}{where}. "
        f"{before} {_fix(error, root)}"
    )


def _fix(error: Exception, root: Path) -> str:
    if not isinstance(error, OSError):
        return "This is not the disk's refusal: that rank says more in its own output."
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = ""
        with contextlib.suppress(OSError):
            free = f" ({shutil.disk_usage(root).free / 2**20:,.1f} MiB are free)"
        return f"Free some space on this disk{free}, lower keep_last, or use another run folder."
    if error.errno == errno.EFBIG:
        return "Raise the file-size limit (ulimit -f) or use another file system."
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
        return "Use a run folder that this user can write to."
    if error.errno == errno.ENOENT:
        return (
            "Check that the path exists, that all ranks see the same disk there, and that no other "
            "run saves into the same folder."
        )
    return "Check the disk, or use another run folder."
