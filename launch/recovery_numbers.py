"""What a run that was killed again and again lost: from kills, the launcher's lines, and records.

Standard library only; measure_recovery.py observes, this computes.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_RESTART = re.compile(r"launcher: .*\(restart \d+ of \d+\)")
_RESUME = re.compile(r"resume: .* step (\d+) of \d+")
_STARTED = re.compile(r"model: ")  # said by rank 0 after its resume line, if it has one
_STEP = re.compile(r"step +(\d+)/\d+ +loss ")


@dataclass(frozen=True)
class Line:
    """A line of the launcher or of rank 0, and when it came."""

    seconds: float  # since the start of the command
    text: str
    recorded_step: int  # the last one in metrics.jsonl at that moment


@dataclass(frozen=True)
class Kill:
    """A SIGKILL to one rank."""

    seconds: float  # since the start of the command
    rank: int


@dataclass(frozen=True)
class Outcome:
    """What one kill cost. None: another kill came before ranks trained again."""

    kill: Kill
    was_training: bool  # else it hit ranks that were starting
    found_seconds: float | None  # from the kill to the launcher's word that all start again
    recovery_seconds: float | None  # from the kill to the end of the first step after it
    lost_steps: int | None  # trained before and trained again


def is_restart(text: str) -> bool:
    """Whether the launcher says that all ranks start again."""
    return _RESTART.match(text) is not None


def is_step(text: str) -> bool:
    """Whether rank 0 says that it has trained a step."""
    return _STEP.match(text) is not None


def outcomes(kills: Sequence[Kill], lines: Sequence[Line]) -> list[Outcome]:
    """One for each kill. lines: in order of time; each start says its first step in one of them."""
    found = []
    for number, kill in enumerate(kills):
        until = kills[number + 1].seconds if number + 1 < len(kills) else math.inf
        # what came since ranks trained last: a kill before this one may have hit their start
        trained = [
            i for i, ln in enumerate(lines) if is_step(ln.text) and ln.seconds < kill.seconds
        ]
        outage = lines[trained[-1] + 1 if trained else 0 :]
        after = [i for i, line in enumerate(outage) if kill.seconds <= line.seconds < until]
        restart = next((i for i in after if is_restart(outage[i].text)), None)
        first = None
        if restart is not None:
            first = next((i for i in after if i > restart and is_step(outage[i].text)), None)
        found_seconds, recovery, lost = None, None, None
        if restart is not None:
            found_seconds = outage[restart].seconds - kill.seconds
        if restart is not None and first is not None:
            recovery = outage[first].seconds - kill.seconds
            reached = max(ln.recorded_step for ln in outage[:first] if is_restart(ln.text))
            lost = reached - _resumed_step(outage[restart:first])
        found.append(Outcome(kill, _was_training(kill, lines), found_seconds, recovery, lost))
    return found


def _was_training(kill: Kill, lines: Sequence[Line]) -> bool:
    before = [line.text for line in lines if line.seconds < kill.seconds]
    words = [text for text in before if is_restart(text) or is_step(text)]
    return bool(words) and is_step(words[-1])


def _resumed_step(again: Sequence[Line]) -> int:
    for line in again:
        if match := _RESUME.match(line.text):
            return int(match[1])
        if _STARTED.match(line.text):
            break
    return 0


def summary(
    told: Sequence[Outcome], records: Sequence[dict[str, Any]], *, wall_seconds: float
) -> dict[str, Any]:
    """The numbers of a result. records: the training records of the finished run, each step once.

    effective_time: the time of the steps that the finished run consists of, each counted once,
    through the whole time from the start of the command to its end. What is not in it: starting,
    saving, finding the fault, steps that were lost and trained again.
    """
    productive = sum(record["step_seconds"] for record in records)
    searches = [o.found_seconds for o in told if o.found_seconds is not None]
    recoveries = sorted(o.recovery_seconds for o in told if o.recovery_seconds is not None)
    return {
        "kills": len(told),
        "wall_seconds_for_each_kill": wall_seconds / max(1, len(told)),
        "kills_while_starting": sum(not outcome.was_training for outcome in told),
        "kills_before_the_first_step_again": len(told) - len(recoveries),
        "steps": len(records),
        "wall_seconds": wall_seconds,
        "productive_seconds": productive,
        "effective_time": productive / wall_seconds,
        "found_median_seconds": statistics.median(searches) if searches else None,
        "recovery_median_seconds": statistics.median(recoveries) if recoveries else None,
        "recovery_p95_seconds": _nearest_rank(recoveries, 0.95),
        "lost_steps": sum(outcome.lost_steps or 0 for outcome in told),
        "step_median_seconds": statistics.median(record["step_seconds"] for record in records),
    }


def _nearest_rank(ordered: Sequence[float], share: float) -> float | None:
    return ordered[math.ceil(share * len(ordered)) - 1] if ordered else None


def table(row: dict[str, Any]) -> list[str]:
    """A heading and one line."""
    columns = (
        ("kills", f"{row['kills']}"),
        ("steps kept", f"{row['steps']:,}"),
        ("steps lost", f"{row['lost_steps']:,}"),
        ("effective time", f"{row['effective_time']:.1%}"),
        ("recovery median", _seconds(row["recovery_median_seconds"])),
        ("p95", _seconds(row["recovery_p95_seconds"])),
        ("bitwise equal", "yes" if row["is_bitwise_equal"] else "NO"),
    )
    widths = [max(len(head), len(value)) for head, value in columns]
    heads = "  ".join(f"{head:>{w}}" for (head, _), w in zip(columns, widths, strict=True))
    values = "  ".join(f"{value:>{w}}" for (_, value), w in zip(columns, widths, strict=True))
    return [heads, values]


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} s"
