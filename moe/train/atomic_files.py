"""Write, read and hash single files so that a crash or a full disk never leaves half a result.

A new file is written once, hashed on the way, and flushed to the disk before its size and hash are
returned; a folder's entries are flushed by `sync_folder`. Reading refuses anything that is not an
ordinary file: a symbolic link could lead out of the folder, a named pipe would wait for ever.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from moe.progress_call import ProgressCall, no_progress

CHUNK_BYTES = 4 * 2**20
# no flush has more than this before it, so a slow disk's progress shows; 0.1 s at 2 GB/s
_FLUSH_BYTES = 256 * 2**20

Buffer = bytes | bytearray | memoryview


class Written(NamedTuple):
    """What was written: length in bytes and SHA-256 in hexadecimal."""

    size: int
    sha256: str


class Identity(NamedTuple):
    """Which file was read, in which state: a later change at the same path changes a field."""

    device: int
    inode: int
    size: int
    modified_ns: int


def write_new_file(
    path: Path, chunks: Iterable[Buffer], *, progress: ProgressCall = no_progress
) -> Written:
    """Write chunks to path, which must not exist, flush it to the disk, and hash it on the way.

    progress is told of the bytes. The hash is of the bytes in memory, so a byte that the disk
    stores wrongly is found when the file is read. Raises OSError, and then a part of the file
    may be left.
    """
    digest = hashlib.sha256()
    size = flushed = 0
    with open(path, "xb", buffering=0) as file:
        for chunk in chunks:
            view = memoryview(chunk).cast("B")
            for start in range(0, len(view), CHUNK_BYTES):
                piece = view[start : start + CHUNK_BYTES]
                digest.update(piece)
                size += len(piece)
                _write_all(file.fileno(), piece)
                if size - flushed >= _FLUSH_BYTES:
                    os.fsync(file.fileno())
                    flushed = size
                progress(len(piece))
        os.fsync(file.fileno())
        progress(1)
    return Written(size, digest.hexdigest())


def replace_file(path: Path, content: bytes) -> None:
    """Give path this content, whole or not at all: a reader or a crash never sees half of it."""
    make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write_new_file(temporary, [content])
        os.replace(temporary, path)
    except OSError:
        remove_anyway(temporary)
        raise
    sync_folder(path.parent)


def _write_all(descriptor: int, piece: memoryview) -> None:
    # a write stops early at a file-size limit or a full disk; the next one then says why
    while piece:
        piece = piece[os.write(descriptor, piece) :]


def read_chunks(path: Path) -> Iterator[bytes]:
    """Yield the bytes of path, which may be reached through links, in pieces of a few MiB."""
    with open(path, "rb", buffering=0) as file:
        while piece := file.read(CHUNK_BYTES):
            yield piece


def read_small_file(path: Path, *, limit_bytes: int) -> bytes:
    """Read all of an ordinary file of at most limit_bytes. Raises OSError or ValueError."""
    with opened_without_links(path) as descriptor:
        size = os.fstat(descriptor).st_size
        if size > limit_bytes:
            raise ValueError(f"it has {size:,} bytes; at most {limit_bytes:,} are allowed")
        with open(descriptor, "rb", closefd=False) as file:
            return file.read(limit_bytes)


def hash_file(path: Path, *, progress: ProgressCall = no_progress) -> tuple[Written, Identity]:
    """Size, SHA-256 and identity of an ordinary file. Raises OSError or ValueError (a link).

    progress is told of the bytes. About 0.9 s for each GiB on one core that has SHA instructions;
    threads scale, as hashing lets other threads run.
    """
    digest = hashlib.sha256()
    size = 0
    buffer = memoryview(bytearray(CHUNK_BYTES))
    with (
        opened_without_links(path) as descriptor,
        open(descriptor, "rb", 0, closefd=False) as file,
    ):
        identity = _identity(os.fstat(descriptor))
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            size += count
            progress(count)
    return Written(size, digest.hexdigest()), identity


def file_identity(path: Path) -> Identity:
    """Identity of the ordinary file at path now. Raises OSError or ValueError (a link)."""
    status = os.lstat(path)
    _require_ordinary(status)
    return _identity(status)


@contextlib.contextmanager
def opened_without_links(path: Path) -> Iterator[int]:
    """A descriptor for reading an ordinary file. Raises OSError, or ValueError for a link."""
    # O_NONBLOCK: opening a named pipe would otherwise wait for somebody to write into it
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise ValueError("it is a symbolic link; only ordinary files are read") from error
        raise
    try:
        _require_ordinary(os.fstat(descriptor))
        yield descriptor
    finally:
        os.close(descriptor)


def _require_ordinary(status: os.stat_result) -> None:
    if stat.S_ISLNK(status.st_mode):
        raise ValueError("it is a symbolic link; only ordinary files are read")
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("it is not an ordinary file")


def _identity(status: os.stat_result) -> Identity:
    return Identity(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def make_folder(path: Path) -> None:
    """Create path and its missing parents, and flush each new entry to the disk.

    Raises OSError; PermissionError also for a file system like /proc, which answers ENOENT.
    """
    missing = []
    while not path.exists():
        missing.append(path)
        path = path.parent
    for folder in reversed(missing):
        try:
            folder.mkdir(exist_ok=True)
        except FileNotFoundError:
            reason = "its file system takes no new folder"
            raise PermissionError(errno.EPERM, reason, str(folder)) from None
        sync_folder(folder.parent)
    if not missing and not path.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))


def sync_folder(path: Path) -> None:
    """Flush a folder's entries, so that a rename or a new file in it survives a loss of power."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # some network file systems flush folders by themselves and answer "invalid argument"
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(descriptor)


def remove_anyway(path: Path) -> None:
    """Remove a folder, file or link if that is possible; a link's target is left alone."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()
