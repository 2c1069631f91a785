"""A live line where a terminal can draw it, plain and few lines everywhere else."""

from __future__ import annotations

import fcntl
import io
import itertools
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from moe.train.progress import ConsoleSink, can_draw, duration, progress_bar, training_fields

TRAIN = {
    "kind": "train", "loss": 2.34567, "lr": 3e-4, "tokens_per_second": 8412.0, "mfu": 0.3121,
    "memory_gib": 1.234, "grad_norm": 0.987, "skipped": False, "router/dead_experts": 0,
}  # fmt: skip
VALIDATION = {
    "kind": "validation", "validation/loss": 4.0, "validation/unigram_entropy": 6.25,
    "validation/bits_per_byte": 2.0123, "validation/loss/code": 3.9, "validation/loss/prose": 4.2,
    "validation/bits_per_byte/code": 1.9,
}  # fmt: skip


class FakeTime:
    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def plain_run(
    total: int, *, log_every: int = 1, evaluate_every: int = 10**9, seconds: float = 0.01
) -> list[str]:
    """The lines of a run whose steps take seconds."""
    stream, now = io.StringIO(), FakeTime()
    sink = ConsoleSink(total, stream=stream, now=now)
    for step in range(1, total + 1):
        now.seconds += seconds
        if step % log_every == 0:
            sink.write(step, TRAIN)
        if step % evaluate_every == 0:
            sink.write(step, VALIDATION)
    sink.close()
    assert "\r" not in stream.getvalue()
    assert "\x1b" not in stream.getvalue()
    return stream.getvalue().splitlines()


@pytest.mark.parametrize("total", [40, 100, 300, 1000, 12_345])
def test_a_plain_run_has_between_twenty_and_forty_training_lines(total: int) -> None:
    lines = plain_run(total)
    assert 20 <= len(lines) <= 40
    assert lines[0].startswith(f"step {1:>{len(str(total))}}/{total}")
    assert lines[-1].startswith(f"step {total}/{total}")


def test_a_slow_run_has_a_line_every_half_a_minute() -> None:
    lines = plain_run(12_000, seconds=7.0)
    steps = [int(re.findall(r"\d+", line)[0]) for line in lines]
    assert all(after - before <= 5 for before, after in itertools.pairwise(steps))


def test_steps_that_become_slow_are_told_above_the_others() -> None:
    stream, now = io.StringIO(), FakeTime()
    sink = ConsoleSink(100, stream=stream, now=now)
    for step, seconds in enumerate([0.5, 0.5, 5.0, 5.0, 5.0], start=1):
        now.seconds += seconds
        sink.write(step, TRAIN | {"step_seconds": seconds})
    assert "step   5/100  steps take 10 times the fastest one (5.00 s, 0.50 s): " in (
        stream.getvalue()
    )


def test_a_sparse_log_loses_no_line_to_the_interval() -> None:
    assert len(plain_run(1000, log_every=50)) == 20


def test_a_run_of_one_step_has_its_line() -> None:
    assert plain_run(1) == [
        "step 1/1  loss 2.3457  lr 3.00e-04  tok/s 8.41k  mfu 31.2%  mem 1.23 GiB  grad 0.99"
    ]


def test_the_remaining_time_is_that_of_the_steps_to_come() -> None:
    lines = plain_run(300, seconds=2.0)
    line = next(line for line in lines if line.startswith("step 144/"))
    assert line.endswith("eta 5m 12s")  # 156 steps of 2 seconds
    assert lines[-1].endswith("eta 0s")


def test_a_resumed_run_counts_time_from_its_own_first_step() -> None:
    stream, now = io.StringIO(), FakeTime()
    sink = ConsoleSink(100, stream=stream, first_step=50, now=now)
    for step in range(51, 61):
        now.seconds += 3.0
        sink.write(step, TRAIN)
    last = stream.getvalue().splitlines()[-1]
    assert last.startswith("step  60/100")
    assert last.endswith("eta 2m 00s")


def test_every_validation_is_shown_with_its_domains_and_its_gain_on_the_unigram() -> None:
    lines = plain_run(100, evaluate_every=10)
    totals = [line for line in lines if "validation" in line]
    assert len(totals) == 10
    assert totals[0] == (
        "step  10/100  validation  loss 4.0000  unigram entropy 6.2500  (-36.0%)  "
        "bits per byte 2.012"
    )
    at = lines.index(totals[0])
    assert lines[at + 1] == "    code   loss 3.9000  bits per byte 1.9000"
    assert lines[at + 2] == "    prose  loss 4.2000"


def test_a_save_is_told_with_what_it_cost() -> None:
    stream = io.StringIO()
    sink = ConsoleSink(100, stream=stream)
    record = {
        "kind": "checkpoint", "step": 12, "checkpoint/step": 10, "checkpoint/bytes": 3 * 2**20,
        "checkpoint/write_seconds": 1.234, "checkpoint/stall_seconds": 0.056,
        "checkpoint/waited_seconds": 0.0,
    }  # fmt: skip
    sink.write(12, record)
    assert stream.getvalue() == (
        "step  12/100  saved step 10, 3.0 MiB in 1.23 s; training stood still 0.06 s\n"
    )


def test_a_skipped_step_is_always_told() -> None:
    stream = io.StringIO()
    sink = ConsoleSink(10_000, stream=stream)
    for step in (1, 2, 3, 4):
        sink.write(step, {**TRAIN, "skipped": step == 3, "loss": float("nan")})
    told = [line for line in stream.getvalue().splitlines() if "skipped" in line]
    assert told == ["step     3/10000  skipped: the loss or the gradient is not finite (loss nan)"]


def test_a_record_with_few_keys_is_shown_too() -> None:
    stream = io.StringIO()
    sink = ConsoleSink(3, stream=stream)
    sink.write(1, {"kind": "train", "loss": 1.0})
    sink.write(1, {"kind": "sample", "sample/length": 3, "text": "x"})
    assert stream.getvalue().splitlines() == ["step 1/3  loss 1.0000", "step 1/3  sample  length 3"]


def test_dead_experts_are_told_only_if_there_are_any() -> None:
    assert ("dead", "2") in training_fields({"router/dead_experts": 2})
    assert training_fields({"router/dead_experts": 0}) == []


def test_durations_are_short_words() -> None:
    seconds = [0, 7.4, 59.6, 185, 9660, 273_600, -1]
    words = ["0s", "7s", "1m 00s", "3m 05s", "2h 41m", "3d 04h", "0s"]
    assert [duration(s) for s in seconds] == words


def test_plain_progress_has_a_line_at_each_end_and_one_every_ten_seconds() -> None:
    stream, now = io.StringIO(), FakeTime()
    with progress_bar("prepare", stream=stream, now=now) as on_progress:
        for done in range(101):
            on_progress("tokenise", done, 100)
            now.seconds += 0.25
        for done in range(0, 400, 10):
            on_progress("scan", done, 0)
            now.seconds += 1
    lines = stream.getvalue().splitlines()
    assert "prepare: tokenise 100 of 100 (100%), 25s" in lines
    assert len([line for line in lines if "tokenise" in line]) == 3
    assert 3 <= len([line for line in lines if "scan" in line]) <= 4
    assert "\r" not in stream.getvalue()
    assert "\x1b" not in stream.getvalue()


def in_terminal(program: str, *, width: int, environ: dict[str, str]) -> str:
    """Run python code in a real pseudo-terminal and return all that it wrote."""
    controller, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
    inherited = {
        k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "NO_COLOR", "TERM")
    }
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdin=terminal, stdout=terminal, stderr=terminal,
        env={**inherited, "TERM": "xterm-256color", **environ},
    )  # fmt: skip
    os.close(terminal)
    written = b""
    while True:
        try:
            part = os.read(controller, 65536)
        except OSError:  # Linux: the other side is closed
            break
        if not part:
            break
        written += part
    os.close(controller)
    assert process.wait(timeout=30) == 0, written.decode()
    return written.decode()


RUN = f"""
import sys
from moe.train.progress import ConsoleSink, progress_bar
sink = ConsoleSink(40, stream=sys.stdout)
for step in range(1, 41):
    sink.write(step, {TRAIN!r})
    if step == 20:
        sink.write(step, {VALIDATION!r})
        print("from elsewhere")
sink.close()
with progress_bar("prepare") as on_progress:
    for done in range(11):
        on_progress("tokenise", done, 10)
    on_progress("scan", 5, 0)
"""


def test_a_terminal_gets_one_live_line_with_validation_above_it() -> None:
    written = in_terminal(RUN, width=100, environ={})
    assert "\x1b[?25l" in written
    assert written.rfind("\x1b[?25h") > written.rfind("\x1b[?25l"), "the cursor stays hidden"
    lines = screen_lines(written)
    assert lines[0].startswith("step 20/40  validation  loss 4.0000")
    assert lines[1].split() == ["code", "loss", "3.9000", "bits", "per", "byte", "1.9000"]
    assert lines[3] == "from elsewhere"
    assert lines[4].startswith("40/40")
    assert re.search(r"━.*loss 2\.3457 .*tok/s 8\.41k .*mfu 31\.2% .*eta 0s", lines[4])
    assert "prepare: tokenise" in lines[5]
    assert "100%" in lines[5]
    assert "10/10" in lines[5]
    assert len(lines) == 7


@pytest.mark.parametrize("width", [20, 40, 60, 80, 200])
def test_the_live_line_never_wraps(width: int) -> None:
    written = in_terminal(RUN, width=width, environ={})
    lines = [line for line in screen_lines(written) if line.startswith("40/40")]
    assert len(lines) == 1
    assert len(lines[0]) <= width


def test_no_color_takes_away_colours_and_keeps_the_line_live() -> None:
    colour = re.compile(r"\x1b\[[0-9;]*?(3[0-9]|9[0-7])(;[0-9;]*)?m")
    assert colour.search(in_terminal(RUN, width=100, environ={}))
    written = in_terminal(RUN, width=100, environ={"NO_COLOR": "1"})
    assert not colour.search(written)
    assert "\x1b[2K" in written


def test_a_dumb_terminal_gets_plain_lines() -> None:
    written = in_terminal(RUN, width=100, environ={"TERM": "dumb"})
    assert "\x1b" not in written
    assert "\r" not in written.replace("\r\n", "\n")
    assert written.count("loss 2.3457") >= 20


def test_a_pipe_and_a_closed_stream_are_not_terminals(tmp_path: Path) -> None:
    with open(tmp_path / "log", "w") as file:
        assert not can_draw(file)
    assert not can_draw(file)


def test_without_rich_a_terminal_gets_plain_lines() -> None:
    hidden = "import sys; sys.modules['rich'] = None\n" + RUN
    written = in_terminal(hidden, width=100, environ={})
    assert "\x1b" not in written
    assert "step 40/40  loss 2.3457" in written


def screen_lines(written: str) -> list[str]:
    """What stays on the screen: a carriage return or an erase starts the line anew."""
    lines: list[list[str]] = [[]]
    row = 0
    pattern = r"\x1b\[([0-9;?]*)([A-Za-z])|(\r\n|\r|\n)|([^\x1b\r\n]+)"
    for digits, letter, control, text in re.findall(pattern, written):
        if letter == "A":
            row -= int(digits or 1)
        elif letter == "K":
            lines[row] = []
        elif "\n" in control:
            row += 1
            if row == len(lines):
                lines.append([])
        elif control == "\r":
            lines[row] = []
        elif text:
            lines[row].append(text)
    return [line for line in ("".join(parts).rstrip() for parts in lines) if line]
