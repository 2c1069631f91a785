"""Whose fault it is: from what is known of every rank to one verdict, or none yet.

A pure function of the table and the clock. Standard library only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

# a rank whose peer is gone raises first, often; its peer's end is heard of within milliseconds
ECHO_SECONDS = 1.0
# ranks that stop for the same reason (a mistake, a signal, the loss) do it this close together
AGREE_SECONDS = 5.0
# in which one call may do nothing that is seen for longer than a short limit: W&B gives its last
# uploads 120 s, and its own process an end
_LEAST_SECONDS = {"finishing": 300.0}
_MOST_RANKS_NAMED = 8


@dataclass(frozen=True)
class Limits:
    """What the configuration allows, in seconds."""

    silent: float
    stuck: float


@dataclass
class RankState:
    """What is known of one rank; its guardian's last words."""

    rank: int
    host: str = "unknown host"
    pid: int = 0
    step: int = -1
    order: int = -1
    phase: str = "starting"
    stuck_seconds: float = 0.0  # since it last changed its phase, or its work moved on
    silent_seconds: float = 0.0  # since its process last gave a sign of life
    is_stopped: bool = False  # by a signal or a debugger, says the kernel
    heard_at: float = 0.0  # its guardian
    end: str = ""  # "done", "raised", "died", "vanished" or "orphaned"
    error: str = ""
    is_echo: bool = False  # the error can be the effect of another rank's end
    raised_at: float = 0.0
    frames: list[str] | None = None  # of the main thread, outermost first

    @property
    def place(self) -> tuple[int, int]:
        """Ranks call the same phases in the same order: the lower is behind."""
        return self.step, self.order


@dataclass(frozen=True)
class Verdict:
    """What is the matter: kind, the ranks at fault, and one line that says it.

    "over" and "agreed" are no faults: all are done, or all stop by themselves for one reason.
    """

    kind: str
    ranks: list[int] = field(default_factory=list)
    line: str = ""

    def record(self, table: Sequence[RankState]) -> dict[str, Any]:
        """Return what is written into the file of faults."""
        return {
            "kind": self.kind,
            "line": self.line,
            "ranks": [
                {
                    "rank": state.rank, "host": state.host, "pid": state.pid, "step": state.step,
                    "phase": state.phase, "seconds_still": round(state.stuck_seconds, 1),
                    "frames": state.frames or [],
                }
                for state in table if state.rank in self.ranks
            ],
        }  # fmt: skip


def judge(table: Sequence[RankState], *, now: float, limits: Limits) -> Verdict | None:
    """Return the verdict, or None while nothing is the matter or a cause may still arrive."""
    if all(state.end == "done" for state in table):
        return Verdict("over")
    for end in ("died", "vanished", "orphaned"):
        found = [state for state in table if state.end == end]
        if found:
            return _verdict(end, found, _END_WORDS[end])
    running = [state for state in table if not state.end]
    lost = [state for state in running if now - state.heard_at >= limits.silent]
    # all ranks meet in every step: while the others move on, only the way to hear of it is lost
    is_moving = any(s.stuck_seconds < limits.silent for s in running if s not in lost)
    if lost and not is_moving:
        seconds = now - min(state.heard_at for state in lost)
        return _verdict(
            "vanished",
            lost,
            f"could not be heard of for {seconds:.1f} s (its machine, its network or its guardian "
            "is gone): it was last",
        )
    silent = [state for state in running if state.silent_seconds >= limits.silent]
    if silent:
        why = "is stopped (a signal or a debugger) and " if silent[0].is_stopped else ""
        seconds = max(state.silent_seconds for state in silent)
        return _verdict("stopped", silent, f"{why}gave no sign of life for {seconds:.1f} s")
    return _judge_raised(table, running, now) or _judge_stuck(running, limits)


def _judge_raised(
    table: Sequence[RankState], running: Sequence[RankState], now: float
) -> Verdict | None:
    raised = sorted((s for s in table if s.end == "raised"), key=lambda state: state.raised_at)
    causes = [state for state in raised if not state.is_echo]
    if not raised:
        return None
    if len(causes) == len(table):
        return Verdict("agreed")
    if causes:
        first = causes[0]
        if len(causes) == len(raised) and running and now - first.raised_at < AGREE_SECONDS:
            return None
        return _verdict("raised", [first], f"raised {first.error}")
    first = raised[0]
    if now - first.raised_at < ECHO_SECONDS:
        return None
    behind = [state for state in running if state.place < first.place]
    if behind:
        return _verdict(
            "hung",
            behind,
            f"did not come along, and rank {first.rank} raised {first.error}: it was",
        )
    return _verdict("raised", [first], f"raised {first.error}")


def _judge_stuck(running: Sequence[RankState], limits: Limits) -> Verdict | None:
    """A rank that waits for a slow one is not stuck: those that are behind decide."""
    if not running:
        return None
    last = min(state.place for state in running)
    behind = [state for state in running if state.place == last]
    seconds = min(state.stuck_seconds for state in behind)
    if seconds < max(limits.stuck, _LEAST_SECONDS.get(behind[0].phase, 0.0)):
        return None
    if len(behind) == len(running):
        # in one phase: those that are not waiting inside a collective are what the others wait for
        elsewhere = [state for state in behind if not _waits_for_others(state)]
        behind = elsewhere if any(_waits_for_others(state) for state in behind) else behind
        behind = behind or list(running)
    where = "; ".join(
        f"rank {state.rank} {_code_place(state)}" for state in behind[:_MOST_RANKS_NAMED]
    )
    if len(behind) == len(running) > 1:
        return Verdict(
            "hung",
            [state.rank for state in behind],
            f"all {len(running)} running ranks hang {_where(behind[0])} for {seconds:.1f} s, "
            f"perhaps in the same collective ({where}); ending all ranks",
        )
    waiting = len(running) - len(behind)
    others = f"; {waiting} other ranks wait" if waiting > 1 else "; 1 other rank waits"
    return _verdict(
        "hung", behind, f"hangs for {seconds:.1f} s", after=f" ({where}{others if waiting else ''})"
    )


def _waits_for_others(state: RankState) -> bool:
    return any("torch/distributed/" in frame for frame in state.frames or [])


def _code_place(state: RankState) -> str:
    if state.frames:
        return f"is at {state.frames[-1]}"
    return "runs no Python code: a call holds the interpreter"


def _verdict(kind: str, states: Sequence[RankState], what: str, *, after: str = "") -> Verdict:
    names = [f"rank {s.rank} (host {s.host}, process {s.pid})" for s in states[:_MOST_RANKS_NAMED]]
    more = len(states) - len(names)
    who = " and ".join(names) + (f" and {more} more" if more else "")
    line = f"{who} {what} {_where(states[0])}{after}; ending all ranks"
    return Verdict(kind, [state.rank for state in states], line)


def _where(state: RankState) -> str:
    step = f"of step {state.step}" if state.step >= 0 else "before the first step"
    return f"in phase '{state.phase}' {step}"


_END_WORDS = {
    "died": "died",
    "vanished": "lost its guardian",
    "orphaned": "lost the launcher that started it,",
}
