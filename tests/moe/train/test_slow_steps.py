"""Slow steps are told once they last, with their cause as far as the kernel knows it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from moe.train.slow_steps import SlowSteps


def lines(seconds: list[float], *, waiting: float | None) -> list[str]:
    """What is said over steps of these seconds, of which threads wait this part for a core."""
    now, said = 0.0, []
    slow = SlowSteps(now=lambda: now, waited=lambda: None if waiting is None else waiting * now)
    for each in seconds:
        now += each
        if line := slow.line(each):
            said.append(line)
    return said


def test_steps_many_times_the_fastest_are_told_once_in_ten_minutes() -> None:
    said = lines([2.0, 0.5, 0.5, *[5.0] * 100], waiting=0.6)
    assert said == [
        "steps take 10 times the fastest one (5.00 s, 0.50 s): cores are shared: other programs "
        "keep them busy"
    ]
    assert len(lines([0.5, *[5.0] * 140], waiting=0.6)) == 2


@pytest.mark.parametrize("seconds", [[9.0, *[0.5] * 9], [0.5, 5.0] * 9, [0.01, *[0.2] * 9]])
def test_a_slow_first_step_single_slow_ones_and_short_ones_are_not(seconds: list[float]) -> None:
    assert lines(seconds, waiting=0.6) == []


@pytest.mark.parametrize(
    ("waiting", "words"), [(0.0, "not for want of cores"), (None, "other programs on this machine")]
)
def test_shared_cores_are_not_named_where_the_kernel_does_not_say_so(
    waiting: float | None, words: str
) -> None:
    (line,) = lines([0.5, *[5.0] * 5], waiting=waiting)
    assert words in line


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel's count is Linux's")
def test_the_kernel_counts_the_wait_for_a_core_that_three_processes_share() -> None:
    code = """
import os, time
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
for _ in range(2):
    if os.fork() == 0:
        end = time.monotonic() + 1.0
        while time.monotonic() < end: pass
        os._exit(0)
from moe.train.slow_steps import seconds_without_a_core
end = time.monotonic() + 0.6
while time.monotonic() < end: pass
print(seconds_without_a_core())
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert float(done.stdout) > 0.1
