"""How long before its end a run must be told, going by what its steps and saves have taken."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Mapping

# the batch script sets it: seconds between SLURM's signal and the end of the job
NOTICE_VARIABLE = "PHIMOE_NOTICE_SECONDS"
_LAST = 10  # steps and saves that count


class SavePace:
    """The slowest of the last steps and saves of a run's records."""

    def __init__(self) -> None:
        self._steps: deque[float] = deque(maxlen=_LAST)
        self._saves: deque[float] = deque(maxlen=_LAST)

    def add(self, record: Mapping[str, object]) -> None:
        """Take in one record of metrics.jsonl, of any kind."""
        for key, kept in (
            ("step_seconds", self._steps),
            ("checkpoint/write_seconds", self._saves),
        ):
            value = record.get(key)
            if isinstance(value, (int, float)):
                kept.append(float(value))

    @property
    def seconds_needed(self) -> float:
        """A step, the end of a save that has just begun, and the save; 0 before the first."""
        if not self._saves:
            return 0.0
        return max(self._steps, default=0.0) + 2 * max(self._saves)


def pace_of(records: Iterable[Mapping[str, object]]) -> SavePace:
    """The pace at the end of these records."""
    pace = SavePace()
    for record in records:
        pace.add(record)
    return pace


def notice_of_scheduler() -> float:
    """Seconds that the batch script says this run will have; 0 where nobody says it."""
    text = os.environ.get(NOTICE_VARIABLE, "")
    return float(text) if text.isdigit() else 0.0


class NoticeSink:
    """Says once when the scheduler's notice has become too short; a sink of records."""

    may_fail = True

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._pace = SavePace()
        self._has_said = False

    def write(self, step: int, record: Mapping[str, object]) -> None:
        self._pace.add(record)
        needed = self._pace.seconds_needed
        if needed > self._seconds and not self._has_said:
            self._has_said = True
            print(
                f"warning: saving after a signal can take {needed:.0f} s (a step, the end of the "
                f"save before, and the save), and this job is told {self._seconds:.0f} s before "
                f"its end. Submit it with launcher.signal_seconds={round(1.5 * needed) + 1}.",
                flush=True,
            )

    def close(self) -> None: ...
