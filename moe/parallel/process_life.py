"""Whether a process is still the one that it was: its number alone is given out again."""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path


def began(pid: int) -> str:
    """When the process began, as the kernel counts, or "" where that is not told."""
    return _status(pid)[1]


def is_alive(pid: int, *, began_at: str) -> bool:
    """Whether the process that began then still runs; a zombie does not."""
    state, since = _status(pid)
    if since:
        return state not in "ZX" and since == began_at
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return not Path("/proc/self/stat").exists()


def was_alive(pid: int, *, at: float) -> bool:
    """Whether the process that has this number now also had it then, in seconds since 1970.

    False where the machine does not tell when processes began.
    """
    state, since = _status(pid)
    with contextlib.suppress(OSError, ValueError, IndexError):
        boot = Path("/proc/stat").read_text().partition("\nbtime ")[2].split()[0]
        began_at = int(boot) + int(since) / os.sysconf("SC_CLK_TCK")
        return state not in "ZX" and began_at <= at
    return False


def machine_of_processes() -> str:
    """A name of what numbers processes: this boot of this host, and the container's own numbers."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    with contextlib.suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _status(pid: int) -> tuple[str, str]:
    """State and start time of a process; empty where there is none, or no /proc."""
    with contextlib.suppress(OSError, IndexError):
        # the name in parentheses may itself hold spaces and parentheses
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return fields[0], fields[19]
    return "", ""
