"""Whether steps take many times the fastest one, and whether other programs' work is the cause."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

_TIMES = 3.0  # how much slower than the fastest is worth a word
_IN_A_ROW = 3  # records, so that one slow step says nothing
_LEAST_SECONDS = 0.3  # shorter steps double and halve on a quiet machine, too
_SECONDS_BETWEEN_LINES = 600.0
_SHARED = 0.2  # of the time, threads of ours stood ready and had no core


class SlowSteps:
    """Watches the seconds of steps, and says so when they become slow."""

    def __init__(
        self, *, now: Callable[[], float], waited: Callable[[], float | None] | None = None
    ) -> None:
        """waited() is how long this process's threads stood ready without a core, so far."""
        self._now = now
        self._waited = waited or seconds_without_a_core
        self._fastest = float("inf")
        self._num_slow = 0
        self._told_at = -_SECONDS_BETWEEN_LINES
        self._slow_since: tuple[float, float | None] = (0.0, None)

    def line(self, seconds: object) -> str | None:
        """A line for people, at most every ten minutes; seconds are the newest record's."""
        if not isinstance(seconds, (int, float)) or seconds <= 0:
            return None
        self._fastest = min(self._fastest, seconds)
        if seconds < max(_TIMES * self._fastest, _LEAST_SECONDS):
            self._num_slow = 0
            return None
        if self._num_slow == 0:
            self._slow_since = (self._now(), self._waited())
        self._num_slow += 1
        is_told = self._now() - self._told_at < _SECONDS_BETWEEN_LINES
        if self._num_slow < _IN_A_ROW or is_told:
            return None
        self._told_at = self._now()
        return (
            f"steps take {seconds / self._fastest:.0f} times the fastest one "
            f"({seconds:.2f} s, {self._fastest:.2f} s): {self._cause()}"
        )

    def _cause(self) -> str:
        began, waited_before = self._slow_since
        waited = self._waited()
        if waited is None or waited_before is None:
            return "other programs on this machine may use its cores or its disk"
        if waited - waited_before >= _SHARED * (self._now() - began):
            return "cores are shared: other programs keep them busy"
        return "not for want of cores; look at other ranks, the disk and the processor's clock"


def seconds_without_a_core() -> float | None:
    """How long all threads of this process stood ready to run and had no core; None if unknown."""
    total, is_known = 0, False
    for path in Path("/proc/self/task").glob("*/schedstat"):
        with contextlib.suppress(OSError, ValueError, IndexError):  # the thread has just ended
            total += int(path.read_text().split()[1])  # running, waiting (ns), time slices
            is_known = True
    return total / 1e9 if is_known else None
