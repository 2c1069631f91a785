"""Is this rank alive: what its page and the kernel say of it. Standard library only.

A sign of life is a pulse, CPU time, or wanting a CPU. So a long call that holds the interpreter's
lock does not count as silence, a stopped process does, and on an overloaded machine nobody is
ended for being slow.
"""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass

from moe.parallel.watch_page import Page, Place


@dataclass(frozen=True)
class Seen:
    """One look at the rank."""

    place: Place
    stuck_seconds: float
    silent_seconds: float
    is_stopped: bool
    parent: int  # process id; 0 where the kernel does not say


class RankMonitor:
    """Looks at one process, the guardian's parent; call look at every tick."""

    def __init__(self, pid: int, page: Page, *, now: float) -> None:
        self.pid = pid
        self.pidfd = _open_pidfd(pid)  # None where there is none
        self._page = page
        self._signs: tuple[int, int] = (0, 0)
        self._moved: tuple[int, int] = (0, 0)
        self._alive_at = now
        self._changed_at = now

    def is_gone(self) -> bool:
        """Whether the process has ended; a child whose parent ends gets another parent."""
        return os.getppid() != self.pid

    def look(self, now: float) -> Seen:
        """Read the page and the kernel's numbers."""
        place = self._page.place()
        moved = (place.changes, self._page.progress())
        if moved != self._moved:
            self._moved = moved
            self._changed_at = now
        state, parent, cpu_ticks = _kernel_says(self.pid)
        signs = (self._page.num_beats(), cpu_ticks)
        if signs != self._signs or state == "R":
            self._signs = signs
            self._alive_at = now
        return Seen(
            place,
            stuck_seconds=now - self._changed_at,
            silent_seconds=now - self._alive_at,
            is_stopped=state in ("T", "t"),
            parent=parent,
        )

    def restart(self, now: float) -> None:
        """Count from now on."""
        self._alive_at = self._changed_at = now

    def forgive(self, seconds: float) -> None:
        """The guardian itself was stopped for so long: that time does not count."""
        self._alive_at += seconds
        self._changed_at += seconds

    def kill(self) -> None:
        """End the process with SIGKILL, which a stopped one obeys too."""
        try:
            if self.pidfd is not None:
                signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
            elif not self.is_gone():
                os.kill(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass  # it has ended by itself, which is what was wanted


def _open_pidfd(pid: int) -> int | None:
    try:
        return os.pidfd_open(pid)
    except (AttributeError, OSError):
        return None


def _kernel_says(pid: int) -> tuple[str, int, int]:
    """State letter, parent and CPU time in ticks of 10 ms; empty and zeros where /proc is not."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            # the program's name stands in brackets and may hold anything
            fields = file.read().rpartition(b")")[2].split()
        return fields[0].decode(), int(fields[1]), int(fields[11]) + int(fields[12])
    except (OSError, ValueError, IndexError):
        return "", 0, 0
