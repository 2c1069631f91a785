"""What counts as a sign of life of a real process; the clock is given, so nothing waits for it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from moe.parallel.watch_page import Page, make_page
from moe.parallel.watch_rank import RankMonitor

Start = Callable[[str], subprocess.Popen[bytes]]


@pytest.fixture
def child() -> Iterator[Start]:
    """Call child(program): a running Python process that has printed a line."""
    children = []

    def start(program: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-S", "-c", f"print(flush=True); {program}"]
        children.append(subprocess.Popen(command, stdout=subprocess.PIPE))
        assert children[-1].stdout.readline() == b"\n"
        return children[-1]

    yield start
    for process in children:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture
def page() -> Iterator[Page]:
    made = make_page()
    yield made
    made.close_descriptor()


def _asleep(child: Start, page: Page) -> RankMonitor:
    """A monitor of a process that sleeps, looked at once at time 0."""
    process = child("import time; time.sleep(600)")
    time.sleep(0.3)  # until it does sleep
    monitor = RankMonitor(process.pid, page, now=0.0)
    monitor.look(0.0)
    return monitor


def test_a_pulse_is_a_sign_of_life(child: Start, page: Page) -> None:
    monitor = _asleep(child, page)
    assert monitor.look(5.0).silent_seconds == 5.0
    page.beat()
    assert monitor.look(6.0).silent_seconds == 0.0
    assert monitor.look(8.0).silent_seconds == 2.0


def test_computing_without_a_pulse_is_a_sign_of_life(child: Start, page: Page) -> None:
    process = child("\nwhile True: pass")
    monitor = RankMonitor(process.pid, page, now=0.0)
    for now in (1.0, 2.0, 3.0):
        time.sleep(0.05)
        assert monitor.look(now).silent_seconds == 0.0


def test_a_stopped_process_gives_none(child: Start, page: Page) -> None:
    process = child("\nwhile True: pass")
    monitor = RankMonitor(process.pid, page, now=0.0)
    os.kill(process.pid, signal.SIGSTOP)
    time.sleep(0.1)
    monitor.look(1.0)
    seen = monitor.look(4.0)
    assert seen.silent_seconds >= 3.0
    assert (seen.is_stopped, seen.parent) == (True, os.getpid())
    os.kill(process.pid, signal.SIGCONT)
    time.sleep(0.1)
    assert not monitor.look(5.0).is_stopped


def test_a_change_of_phase_ends_a_stand_still(child: Start, page: Page) -> None:
    monitor = _asleep(child, page)
    page.set_place("forward", 7)
    assert monitor.look(1.0).stuck_seconds == 0.0
    seen = monitor.look(3.0)
    assert (seen.stuck_seconds, seen.place.phase, seen.place.step) == (2.0, "forward", 7)
    page.set_place("forward", None)  # the same name again: the next micro-batch
    assert monitor.look(4.0).stuck_seconds == 0.0


def test_progress_from_any_thread_ends_a_stand_still(child: Start, page: Page) -> None:
    monitor = _asleep(child, page)
    assert monitor.look(3.0).stuck_seconds == 3.0
    worker = threading.Thread(target=page.add_progress, args=(4096,))
    worker.start()
    worker.join()
    assert monitor.look(4.0).stuck_seconds == 0.0
    assert monitor.look(6.0).stuck_seconds == 2.0


def test_time_in_which_nobody_looked_is_forgiven(child: Start, page: Page) -> None:
    monitor = _asleep(child, page)
    monitor.forgive(60.0)
    seen = monitor.look(61.0)
    assert (seen.silent_seconds, seen.stuck_seconds) == (1.0, 1.0)


def test_a_restart_counts_from_then_on(child: Start, page: Page) -> None:
    monitor = _asleep(child, page)
    monitor.restart(50.0)
    seen = monitor.look(52.0)
    assert (seen.silent_seconds, seen.stuck_seconds) == (2.0, 2.0)


def test_kill_ends_a_stopped_process(child: Start, page: Page) -> None:
    process = child("import time; time.sleep(600)")
    monitor = RankMonitor(process.pid, page, now=0.0)
    os.kill(process.pid, signal.SIGSTOP)
    monitor.kill()
    assert process.wait(5) == -signal.SIGKILL
    monitor.kill()  # one that is gone is no error


def test_a_place_is_read_as_it_was_written(page: Page) -> None:
    page.set_place("starting", None)
    assert page.place() == (1, -1, 0, "starting")
    page.set_place("forward", 0)
    page.set_place("backward", None)
    assert page.place() == (3, 0, 1, "backward")
    page.set_place("forward", 1)
    assert page.place() == (4, 1, 0, "forward")
    page.set_place("x" + "é" * 100, None)  # cut in the middle of a letter
    assert page.place().phase.startswith("x" + "é" * 31)


def test_the_place_is_shared_through_the_descriptor(page: Page) -> None:
    other = Page(os.dup(page.descriptor))
    page.set_place("save", 3)
    page.beat()
    assert (other.place().phase, other.num_beats()) == ("save", 1)
    other.close_descriptor()


def test_saying_a_phase_costs_microseconds(page: Page) -> None:
    best = min(_seconds_of_a_thousand(page) for _ in range(20))
    assert best / 1000 < 10e-6  # 0.4 microseconds on a quiet machine


def _seconds_of_a_thousand(page: Page) -> float:
    before = time.perf_counter()
    for step in range(1000):
        page.set_place("forward", step)
    return time.perf_counter() - before
