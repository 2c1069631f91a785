"""What the terminal shows while something runs: a live line, or plain log lines elsewhere.

In a terminal rich draws one live line and prints what must stay above it. When the output is a
file or a pipe, or TERM is dumb, there are only plain lines, without carriage returns and colour
codes, few enough to read. NO_COLOR takes the colours away and keeps the live line.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from moe.train.metrics import Record
from moe.train.slow_steps import SlowSteps

OnProgress = Callable[[str, int, int], None]  # phase, done, total (0: not known)

_PLAIN_LINES = 26  # training lines over a whole run, which makes 20 to 40 by rounding
_SECONDS_BETWEEN_PLAIN_LINES = 30.0  # more of them where steps are slow
_SECONDS_BETWEEN_PLAIN_PROGRESS = 10.0


class ConsoleSink:
    """Training records as one live line or as plain lines; validation records always stay.

    A step is the number of optimiser steps that are done, 1 to total_steps. Close it (or leave the
    `with Sinks(...)` around it) also after an error, or the terminal keeps its cursor hidden.
    """

    may_fail = True  # a closed pipe (`| head`) must not end a run of days

    def __init__(
        self,
        total_steps: int,
        *,
        stream: TextIO,
        first_step: int = 0,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total = max(total_steps, 1)
        self._stream = stream
        self._now = now
        self._began: tuple[float, int] | None = None
        self._first_step = first_step
        self._last_shown = -1
        self._last_line_at = 0.0
        self._slow_steps = SlowSteps(now=now)
        self._live = _LiveLine(self._total, stream, first_step) if can_draw(stream) else None

    def write(self, step: int, record: Record) -> None:
        """Show a record: kind "train" by its turn, other kinds and skipped steps always."""
        if self._began is None:
            # the first record arrives after the first step, which is slow: time starts after it
            self._began = (self._now(), step)
        if record.get("kind") == "train":
            self._show_training(step, record)
        elif record.get("kind") == "checkpoint":
            self._print(f"{_step_words(step, self._total)}  {_saved_words(record)}")
        else:
            for line in validation_lines(step, self._total, record):
                self._print(line)

    def close(self) -> None:
        """Leave the last state on the screen and give the cursor back."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _show_training(self, step: int, record: Record) -> None:
        eta = self._seconds_left(step)
        if slow := self._slow_steps.line(record.get("step_seconds")):
            self._print(f"{_step_words(step, self._total)}  {slow}")
        if record.get("skipped"):
            self._print(
                f"{_step_words(step, self._total)}  skipped: the loss or the gradient is not "
                f"finite (loss {_number(record.get('loss'), '.4g')})"
            )
        if self._live is not None:
            self._live.update(step, training_fields(record), eta)
            return
        every = max(1, round(self._total / _PLAIN_LINES))
        is_first = self._last_shown < 0
        is_due = step // every > self._last_shown // every or step >= self._total
        is_long_ago = self._now() - self._last_line_at >= _SECONDS_BETWEEN_PLAIN_LINES
        if is_first or is_due or is_long_ago:
            self._last_shown, self._last_line_at = step, self._now()
            fields = [f"{name} {value}" for name, value in training_fields(record)]
            if eta is not None:
                fields.append(f"eta {duration(eta)}")
            self._print("  ".join([_step_words(step, self._total), *fields]))

    def _seconds_left(self, step: int) -> float | None:
        assert self._began is not None
        began, first = self._began
        if step <= first:
            return None
        return (self._now() - began) / (step - first) * max(self._total - step, 0)

    def _print(self, line: str) -> None:
        if self._live is not None:
            self._live.print_above(line)
        else:
            print(line, file=self._stream, flush=True)


@contextlib.contextmanager
def progress_bar(
    title: str,
    *,
    stream: TextIO | None = None,
    now: Callable[[], float] = time.monotonic,
) -> Iterator[OnProgress]:
    """Show phases of a long job; yields the callback on_progress(phase, done, total).

    stream None is standard error. A bar for each phase in a terminal; elsewhere a line when a phase
    ends and one about every 10 seconds within it. A total of 0 means that the end is not known.
    """
    out: TextIO = stream or sys.stderr
    if can_draw(out):
        with _bars(title, out) as draw:
            yield draw
    else:
        yield _plain_progress(title, out, now)


def can_draw(stream: TextIO) -> bool:
    """Whether the stream is a terminal that understands cursor movements, and rich is there."""
    try:
        is_terminal = stream.isatty()
    except (AttributeError, ValueError):  # not a real file, or closed
        return False
    is_dumb = os.environ.get("TERM", "").lower() in ("dumb", "unknown")
    return is_terminal and not is_dumb and importlib.util.find_spec("rich") is not None


def training_fields(record: Record) -> list[tuple[str, str]]:
    """The (name, text) pairs of a training record worth a place on one line, most wanted first."""
    shown = [
        ("loss", _number(record.get("loss"), ".4f")),
        ("lr", _number(record.get("lr"), ".2e")),
        ("tok/s", _thousands(record.get("tokens_per_second"))),
        ("mfu", _number(record.get("mfu"), ".1%")),
        ("mem", _number(record.get("memory_gib"), ".2f", " GiB")),
        ("grad", _number(record.get("grad_norm"), ".2f")),
        (
            "dead",
            "" if not record.get("router/dead_experts") else str(record["router/dead_experts"]),
        ),
    ]
    return [(name, text) for name, text in shown if text]


def _saved_words(record: Record) -> str:
    """A save that has become whole: which, how large, and how long training stood still for it."""
    mebibytes = record["checkpoint/bytes"] / 2**20
    return (
        f"saved step {record['checkpoint/step']}, {mebibytes:,.1f} MiB in "
        f"{record['checkpoint/write_seconds']:.2f} s; training stood still "
        f"{record['checkpoint/stall_seconds']:.2f} s"
    )


def validation_lines(step: int, total_steps: int, record: Record) -> list[str]:
    """Plain lines for a record that is not of training: the totals, then one line a domain."""
    prefix = f"{record.get('kind', 'validation')}/"
    values = {k.removeprefix(prefix): v for k, v in record.items() if _is_number(v) and k != "step"}
    domains = sorted({k.split("/", 1)[1] for k in values if "/" in k})
    words = []
    loss, unigram = values.pop("loss", None), values.pop("unigram_entropy", None)
    if loss is not None:
        words.append(f"loss {_number(loss, '.4f')}")
    if unigram is not None:
        words.append(f"unigram entropy {_number(unigram, '.4f')}")
        if loss is not None and unigram > 0:
            words.append(f"({loss / unigram - 1:+.1%})")
    words += [
        f"{name.replace('_', ' ')} {_number(value, '.4g')}"
        for name, value in values.items()
        if "/" not in name
    ]
    kind = str(record.get("kind", "validation"))
    lines = ["  ".join([_step_words(step, total_steps), kind, *words])]
    width = max((len(domain) for domain in domains), default=0)
    for domain in domains:
        of_domain = [
            f"{name.rsplit('/', 1)[0].replace('_', ' ')} {_number(value, '.4f')}"
            for name, value in values.items()
            if "/" in name and name.split("/", 1)[1] == domain
        ]
        lines.append("  ".join([f"    {domain:<{width}}", *of_domain]))
    return lines


def duration(seconds: float) -> str:
    """Seconds as people say them: 7s, 3m 05s, 2h 41m, 3d 04h."""
    whole = round(max(seconds, 0))
    minutes, hours, days = whole // 60, whole // 3600, whole // 86400
    if days:
        return f"{days}d {hours % 24:02d}h"
    if hours:
        return f"{hours}h {minutes % 60:02d}m"
    return f"{minutes}m {whole % 60:02d}s" if minutes else f"{whole}s"


class _LiveLine:
    """One line at the bottom of the terminal: a bar, the step, as many fields as fit, the time."""

    def __init__(self, total_steps: int, stream: TextIO, first_step: int) -> None:
        from rich.console import Console
        from rich.live import Live
        from rich.progress_bar import ProgressBar

        self._total = total_steps
        self._bar = ProgressBar(total=total_steps, completed=first_step, width=None)
        self._state: tuple[int, list[tuple[str, str]], float | None] = (first_step, [], None)
        self._console = Console(file=stream, force_terminal=True, highlight=False)
        is_standard = stream in (sys.stdout, sys.stderr)  # then other output goes above the line
        self._live = Live(
            console=self._console, get_renderable=self._render, refresh_per_second=4,
            redirect_stdout=is_standard, redirect_stderr=is_standard,
        )  # fmt: skip
        self._live.start()

    def update(self, step: int, fields: list[tuple[str, str]], eta: float | None) -> None:
        self._state = (step, fields, eta)
        self._bar.update(completed=step)

    def print_above(self, line: str) -> None:
        self._live.refresh()
        self._console.print(line, markup=False, soft_wrap=True)

    def stop(self) -> None:
        self._live.stop()

    def _render(self) -> Any:
        from rich.table import Table
        from rich.text import Text

        step, fields, eta = self._state
        head = f"{step:>{len(str(self._total))}}/{self._total}"
        tail = "" if eta is None else f"eta {duration(eta)}"
        room = self._console.width - len(head) - len(tail) - 4
        line, used = Text(no_wrap=True, overflow="crop"), 0
        for name, value in fields:
            if used + len(name) + len(value) + 3 > room:
                break
            line.append(f"{name} ", style="dim").append(f"{value}  ", style="bold")
            used += len(name) + len(value) + 3
        table = Table.grid(padding=(0, 1), expand=False)
        for _ in range(4):
            table.add_column(no_wrap=True)
        bar_width = min(24, room - used - 2)
        self._bar.width = max(bar_width, 0)
        bar = self._bar if bar_width >= 6 else ""
        table.add_row(Text(head, style="bold"), bar, line, Text(tail, style="cyan"))
        return table


def _plain_progress(title: str, stream: TextIO, now: Callable[[], float]) -> OnProgress:
    began: dict[str, float] = {}
    finished: set[str] = set()
    last = now()

    def on_progress(phase: str, done: int, total: int) -> None:
        nonlocal last
        began.setdefault(phase, now())
        is_end = total > 0 and done >= total and phase not in finished
        if not is_end and now() - last < _SECONDS_BETWEEN_PLAIN_PROGRESS:
            return
        last = now()
        if is_end:
            finished.add(phase)
        share = f" of {total:,} ({done / total:.0%})" if total > 0 else ""
        seconds = duration(now() - began[phase])
        print(f"{title}: {phase} {done:,}{share}, {seconds}", file=stream, flush=True)

    return on_progress


@contextlib.contextmanager
def _bars(title: str, stream: TextIO) -> Iterator[OnProgress]:
    from rich import progress
    from rich.console import Console

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(bar_width=None),
        progress.TaskProgressColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
    )
    console = Console(file=stream, force_terminal=True, highlight=False)
    with progress.Progress(*columns, console=console) as bars:
        tasks: dict[str, progress.TaskID] = {}

        def on_progress(phase: str, done: int, total: int) -> None:
            if phase not in tasks:
                tasks[phase] = bars.add_task(f"{title}: {phase}", total=total or None)
            bars.update(tasks[phase], completed=done, total=total or None)

        yield on_progress


def _step_words(step: int, total: int) -> str:
    return f"step {step:>{len(str(total))}}/{total}"


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _number(value: object, form: str, unit: str = "") -> str:
    return f"{value:{form}}{unit}" if isinstance(value, (int, float)) else ""


def _thousands(value: object) -> str:
    if not isinstance(value, (int, float)):
        return ""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return (
                f"{value / size:.3g}{letter}"
                if value < 1000 * size
                else f"{value / size:.0f}{letter}"
            )
    return f"{value:.0f}"
