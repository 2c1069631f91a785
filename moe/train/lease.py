"""Whose is a run folder now: one living run holds a lease on it, and a dead one's counts nothing.

The lease is a file in the folder. The kernel's lock on it answers where the file system has locks:
it ends with its process, also by kill -9. What is written in it (host, process, when that began)
names the holder in messages, and answers where there are no locks. Standard library only.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from moe.config_from_dict import from_dict
from moe.errors import ConfigError
from moe.parallel.process_life import began, is_alive, machine_of_processes

LEASE_NAME = "running.json"
_RENEW_SECONDS = 5.0
_OUTDATED_SECONDS = 30.0  # a holder on another host that did not renew for so long is dead
_WRITING_SECONDS = 2.0  # between making the file and writing one's name into it
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


@dataclass(frozen=True)
class Holder:
    """The run that holds a folder; machine: where its process number means something."""

    host: str
    machine: str
    pid: int
    began: str
    since: str
    job: str  # the scheduler's number of the job, "" without one
    job_start: str  # how often the scheduler has started that job again
    token: str

    @property
    def is_here(self) -> bool:
        return self.machine == machine_of_processes()

    @property
    def is_alive_here(self) -> bool:
        return self.is_here and is_alive(self.pid, began_at=self.began)


@contextlib.contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Hold the lease on an existing folder until the block ends; ConfigError where another does.

    A lease whose holder is dead on this machine, or belonged to an earlier start of this
    scheduler's job, is taken over at once; one of another host after it was not renewed for
    half a minute.
    """
    path = folder / LEASE_NAME
    descriptor = _acquire(path)
    ended = threading.Event()

    def renew() -> None:
        while not ended.wait(_RENEW_SECONDS):
            with contextlib.suppress(OSError):
                os.utime(descriptor)

    thread = threading.Thread(target=renew, name="lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        with contextlib.suppress(OSError):
            if _is_at(path, descriptor):
                path.unlink()
        os.close(descriptor)


def refuse_if_held(folder: Path) -> None:
    """Raise ConfigError where a living process of this machine holds folder; takes nothing."""
    with contextlib.suppress(OSError):
        holder = _parse((folder / LEASE_NAME).read_bytes())
        if holder is not None and holder.is_alive_here and holder.pid != os.getpid():
            raise _taken(folder, holder)


def _acquire(path: Path) -> int:
    began_waiting = time.monotonic()
    while True:
        descriptor, is_new = _open(path)
        try:
            has_lock = _try_lock(descriptor)
            if _is_at(path, descriptor):  # else its holder removed it meanwhile
                holder = _parse(os.pread(descriptor, 4096, 0))
                waited = time.monotonic() - began_waiting
                if _may_take(path, holder, has_lock=has_lock, is_new=is_new, waited=waited):
                    if has_lock or is_new or holder is None:
                        _write(descriptor)
                        taken, descriptor = descriptor, -1
                        return taken
                    _set_aside(path, holder)
        finally:
            if descriptor >= 0:
                os.close(descriptor)
        time.sleep(0.02)


def _may_take(
    path: Path, holder: Holder | None, *, has_lock: bool | None, is_new: bool, waited: float
) -> bool:
    """Whether the lease is free for this process; False: look again; ConfigError: it is not.

    has_lock: None where the file system has no locks.
    """
    if holder is not None and holder.is_alive_here and holder.pid != os.getpid():
        raise _taken(path.parent, holder)
    if has_lock is False:  # its holder lives on another host, or is just writing its name
        if waited < _WRITING_SECONDS and (holder is None or holder.is_here):
            return False
        raise _taken(path.parent, holder)
    if holder is None:
        return bool(has_lock) or is_new or waited > _WRITING_SECONDS
    if not (holder.is_here or _is_earlier_start(holder)) and _is_renewed(path):
        raise _taken(path.parent, holder)
    return True


def _is_earlier_start(holder: Holder) -> bool:
    """Whether the scheduler has ended it and queued its job again: as this start."""
    job, start = _own_job()
    return bool(job) and holder.job == job and holder.job_start != start


def _own_job() -> tuple[str, str]:
    environ = os.environ
    return environ.get("SLURM_JOB_ID", ""), environ.get("SLURM_RESTART_COUNT", "0")


def _is_renewed(path: Path) -> bool:
    """Whether somebody renews it: its own clock alone is compared, hosts may differ."""
    before, until = _modified(path), time.monotonic() + _OUTDATED_SECONDS
    while time.monotonic() < until:
        time.sleep(1.0)
        if _modified(path) != before:
            return True
    return False


def _modified(path: Path) -> int | None:
    # opened each time: network file systems ask the server then
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return os.fstat(descriptor).st_mtime_ns
        finally:
            os.close(descriptor)
    return None


def _open(path: Path) -> tuple[int, bool]:
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
    while True:
        with contextlib.suppress(FileExistsError):
            return os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o644), True
        with contextlib.suppress(FileNotFoundError):
            return os.open(path, flags), False


def _try_lock(descriptor: int) -> bool | None:
    try:
        # of the process, not of the open file: reader processes that outlive a killed rank must
        # not keep it
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return None
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        raise
    return True


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        there, opened = os.stat(path, follow_symlinks=False), os.fstat(descriptor)
    except FileNotFoundError:
        return False
    return (there.st_dev, there.st_ino) == (opened.st_dev, opened.st_ino)


def _write(descriptor: int) -> None:
    job, start = _own_job()
    holder = Holder(
        host=socket.gethostname(),
        machine=machine_of_processes(),
        pid=os.getpid(),
        began=began(os.getpid()),
        since=time.strftime("%Y-%m-%d %H:%M:%S"),
        job=job,
        job_start=start,
        token=secrets.token_hex(8),
    )
    content = json.dumps(asdict(holder), indent=1).encode() + b"\n"
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, content, 0)
    os.fsync(descriptor)


def _set_aside(path: Path, dead: Holder) -> None:
    """Without locks: remove a dead holder's file, and put back one that somebody just made."""
    aside = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    with contextlib.suppress(FileNotFoundError):
        os.rename(path, aside)
        if _parse(aside.read_bytes()) == dead:
            aside.unlink()
        else:
            os.rename(aside, path)


def _parse(content: bytes) -> Holder | None:
    try:
        return from_dict(Holder, json.loads(content))
    except (ValueError, TypeError, RecursionError):
        return None


def _taken(folder: Path, holder: Holder | None) -> ConfigError:
    who = "another process"
    if holder is not None:
        job = f", job {holder.job}" if holder.job else ""
        who = f"process {holder.pid} on {holder.host}{job}, since {holder.since}"
    gone = "" if holder is None or holder.is_here else (
        f" If that host is gone for good, remove {folder / LEASE_NAME}."
    )  # fmt: skip
    return ConfigError(
        f"paths.run_dir: another run trains in {folder} now ({who}). Wait until it has ended, or "
        f"give another paths.run_dir.{gone}"
    )
