"""Real ranks over gloo, each fault once: found in time, named once, and nobody is left."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from moe.parallel.processes import Processes
from moe.parallel.watch import RankFault, _can_be_an_echo, watch_over
from moe.watch_config import WatchConfig

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
MARK = "PHIMOE_TEST_RUN"
FOUND_SECONDS = 10.0
ENDED_SECONDS = 5.0


@dataclass
class Job:
    """Some ranks that were started together, and how to find what they leave."""

    folder: Path
    mark: str
    ranks: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def there(self, rank: int) -> int:
        """Wait until rank is where its fault happens; return its process id."""
        path = self.folder / f"rank{rank}.there"
        _wait_until(lambda: path.exists() and path.read_text() != "", seconds=60)
        return int(path.read_text())

    def guardian(self, rank: int) -> int:
        """The process id of the guardian of rank."""
        children = [pid for pid, parent in self._processes() if parent == self.ranks[rank].pid]
        assert len(children) == 1
        return children[0]

    def wait(self, *, seconds: float = 60.0) -> list[int]:
        """Wait for all ranks; return their exit codes, negative for signals."""
        until = time.monotonic() + seconds
        return [rank.wait(max(0.1, until - time.monotonic())) for rank in self.ranks]

    def left(self) -> list[int]:
        """Processes of this job that still run."""
        return [pid for pid, _ in self._processes()]

    def output(self, rank: int) -> str:
        return (self.folder / f"rank{rank}.log").read_text()

    def watch_lines(self, rank: int) -> list[str]:
        """What the watch said on a rank's stderr."""
        return [line for line in self.output(rank).splitlines() if line.startswith("watch: ")]

    def fault(self) -> dict:
        """The one line of the file of faults."""
        (line,) = (self.folder / "faults.jsonl").read_text().splitlines()
        return json.loads(line)

    def _processes(self) -> Iterator[tuple[int, int]]:
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and self.mark.encode() in (entry / "environ").read_bytes():
                    stat = (entry / "stat").read_bytes().rpartition(b")")[2].split()
                    if stat[0] != b"Z":
                        yield int(entry.name), int(stat[1])


Start = Callable[..., Job]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Call start(fault, victim, world_size=2, **environment): a running Job."""
    job = Job(tmp_path, f"{MARK}={uuid.uuid4().hex}")

    def begin(fault: str, victim: int = 1, world_size: int = 2, **more: str) -> Job:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        kept = {k: v for k, v in os.environ.items() if not k.startswith("TORCHELASTIC")}
        shared = {
            **kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", MARK: job.mark[-32:],
            "WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **more,
        }  # fmt: skip
        command = [sys.executable, str(HERE / "watched_rank.py"), str(tmp_path), fault, str(victim)]
        for rank in range(world_size):
            place = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            with (tmp_path / f"rank{rank}.log").open("wb") as log:
                job.ranks.append(
                    subprocess.Popen(
                        command, env=place, stdout=log, stderr=log, start_new_session=True
                    )
                )
        return job

    yield begin
    for pid in job.left():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    for rank in job.ranks:
        rank.wait()


def _wait_until(is_so: Callable[[], bool], *, seconds: float) -> None:
    until = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < until, "it did not come to pass in time"
        time.sleep(0.05)


def _check_clean(job: Job) -> None:
    assert job.wait() == [0] * len(job.ranks), job.output(0)
    assert job.left() == []
    assert [job.output(rank) for rank in range(len(job.ranks))] == [""] * len(job.ranks)
    assert not (job.folder / "faults.jsonl").exists()


def _check_ended(
    job: Job, kind: str, victim: int, *, since: float, words: str, codes: list[int]
) -> None:
    """The fault is found in time and named once; every rank ends soon after; nobody is left."""
    ended = job.wait()
    seconds = time.time() - since
    assert ended == codes, [job.output(rank) for rank in range(len(job.ranks))]
    fault = job.fault()
    assert fault["time"] - since < FOUND_SECONDS
    assert seconds < FOUND_SECONDS + ENDED_SECONDS
    assert (fault["kind"], [r["rank"] for r in fault["ranks"]]) == (kind, [victim])
    assert (fault["ranks"][0]["phase"], fault["ranks"][0]["step"]) == ("backward", 3)
    assert fault["ranks"][0]["pid"] == job.ranks[victim].pid
    _wait_until(lambda: job.left() == [], seconds=2.0)
    (line,) = job.watch_lines(0)
    assert line == f"watch: {fault['line']}"
    assert line.startswith(f"watch: rank {victim} (host {socket.gethostname()}, process ")
    assert words in line
    assert line.count("in phase 'backward' of step 3") == 1
    assert job.output(0).count("in phase") == 1
    for rank in range(1, len(job.ranks)):
        if rank == victim and kind == "died":
            continue  # its guardian ended with it
        (said,) = job.watch_lines(rank)
        who = "this rank" if rank == victim else f"rank {victim}"
        assert said.startswith(f"watch: ending rank {rank}: {who} is at fault")


def test_a_clean_run_says_nothing_and_leaves_nobody(start: Start) -> None:
    # one guardian comes later than a rank may be silent: nobody is blamed before all are there
    _check_clean(start("late_guardian", 1))


@pytest.mark.parametrize("victim", [0, 1])
def test_a_stopped_rank_is_found_and_ended(start: Start, victim: int) -> None:
    job = start("wait", victim, STUCK_SECONDS="60")
    os.kill(job.there(victim), signal.SIGSTOP)
    codes = [-9 if rank == victim else 70 for rank in (0, 1)]
    words = "is stopped (a signal or a debugger) and gave no sign of life for "
    _check_ended(job, "stopped", victim, since=time.time(), words=words, codes=codes)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_is_found_at_once(start: Start, victim: int) -> None:
    job = start("wait", victim)
    os.kill(job.there(victim), signal.SIGKILL)
    since = time.time()
    codes = [-9 if rank == victim else 70 for rank in (0, 1)]
    _check_ended(job, "died", victim, since=since, words=" died in phase", codes=codes)
    assert job.fault()["time"] - since < 1.0
    # the rank that waited for it tells no story of its own
    assert "Traceback" not in job.output(1 - victim)
    assert "Connection closed" not in job.output(1 - victim)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_raises_is_named_and_keeps_its_own_traceback(start: Start, victim: int) -> None:
    job = start("raise", victim)
    job.there(victim)
    codes = [1 if rank == victim else 70 for rank in (0, 1)]
    words = "raised ValueError: the numbers do not add up in phase"
    _check_ended(job, "raised", victim, since=time.time(), words=words, codes=codes)
    assert "Traceback" in job.output(victim)
    assert "Traceback" not in job.output(1 - victim)


def test_an_error_that_quotes_a_secret_reaches_the_file_of_faults_without_it(start: Start) -> None:
    secret = "q9Zr" * 10
    job = start("raise_with_secret", WANDB_API_KEY=secret)
    job.wait()
    assert "raised ValueError: <redacted> in phase" in job.fault()["line"]
    assert secret not in str(job.fault())
    assert not any(secret in line for rank in range(2) for line in job.watch_lines(rank))


def test_an_endless_loop_of_python_is_found_with_its_line_of_code(start: Start) -> None:
    job = start("loop", 1)
    job.there(1)
    words = "watched_rank.py:"
    _check_ended(job, "hung", 1, since=time.time(), words=words, codes=[70, 70])
    assert job.fault()["ranks"][0]["frames"][-1].endswith("in loop_for_ever")
    assert "1 other rank waits" in job.fault()["line"]


def test_a_rank_that_sleeps_is_found_whatever_signals_the_group_got(start: Start) -> None:
    job = start("sleep", 0)
    job.there(0)
    since = time.time()
    for rank in (0, 1):
        for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2", "SIGHUP", "SIGQUIT"):
            os.kill(job.guardian(rank), getattr(signal, name))
    _check_ended(job, "hung", 0, since=since, words="hangs for ", codes=[70, 70])


def test_a_call_that_never_frees_the_interpreter_is_hung_and_not_silent(start: Start) -> None:
    job = start("compute_with_the_lock", 0, world_size=1)
    job.there(0)
    words = "runs no Python code: a call holds the interpreter"
    _check_ended(job, "hung", 0, since=time.time(), words=words, codes=[-9])


def test_a_slow_call_that_holds_the_interpreter_is_no_fault(start: Start) -> None:
    job = start("slow_with_the_lock", 0, world_size=1, STUCK_SECONDS="60")
    _check_clean(job)
    assert float((job.folder / "longest").read_text()) > 2 + 0.5


def test_a_hang_of_all_ranks_in_one_phase_says_so(start: Start) -> None:
    job = start("all_sleep", 1)
    job.there(1)
    assert job.wait() == [70, 70]
    fault = job.fault()
    assert (fault["kind"], [r["rank"] for r in fault["ranks"]]) == ("hung", [0, 1])
    (line,) = job.watch_lines(0)
    assert line.startswith("watch: all 2 running ranks hang in phase 'backward' of step 3 for ")
    assert line.count("_stop_together") == 2
    _wait_until(lambda: job.left() == [], seconds=2.0)


@pytest.mark.slow
def test_ranks_that_stop_for_one_reason_are_left_to_close_their_logs(start: Start) -> None:
    job = start("agree")
    assert job.wait() == [3, 3]
    assert [job.output(rank) for rank in (0, 1)] == ["error: the loss is not a number\n"] * 2
    assert not (job.folder / "faults.jsonl").exists()
    _wait_until(lambda: job.left() == [], seconds=2.0)


def test_slow_work_that_moves_on_is_no_hang(start: Start) -> None:
    _check_clean(start("slow_work", 1, STUCK_SECONDS="2"))


def test_a_slow_finish_is_no_hang(start: Start) -> None:
    _check_clean(start("slow_finish", 0, world_size=1, STUCK_SECONDS="2"))


@pytest.mark.parametrize(
    ("name", "victim"), [("SIGKILL", 0), ("SIGKILL", 1), ("SIGSTOP", 0), ("SIGSTOP", 1)]
)
def test_a_lost_guardian_ends_the_run(start: Start, name: str, victim: int) -> None:
    # a guardian that is killed is missed at once, and not for its silence
    job = start("sleep", 1, STUCK_SECONDS="60", SILENT_SECONDS="2" if name == "SIGSTOP" else "40")
    job.there(1)
    guardian = job.guardian(victim)
    os.kill(guardian, getattr(signal, name))
    since = time.time()
    assert job.wait() == [70, 70]
    assert time.time() - since < FOUND_SECONDS
    if name == "SIGSTOP":
        os.kill(guardian, signal.SIGCONT)
    _wait_until(lambda: job.left() == [], seconds=2.0)
    assert "lost its guardian in phase" in "".join(job.watch_lines(victim))
    faults = (job.folder / "faults.jsonl").read_text().splitlines()
    assert json.loads(faults[0])["kind"] == "vanished"
    assert json.loads(faults[0])["ranks"][0]["rank"] == victim


def test_a_kill_of_all_ranks_leaves_no_guardian(start: Start) -> None:
    job = start("sleep", 1)
    job.there(1)
    assert len(job.left()) == 4
    for rank in job.ranks:
        os.kill(rank.pid, signal.SIGKILL)
    assert job.wait() == [-9, -9]
    _wait_until(lambda: job.left() == [], seconds=2.0)


def test_a_guardian_that_cannot_join_is_one_message_on_every_rank(start: Start) -> None:
    began = time.monotonic()
    job = start("unreachable")
    assert job.wait() == [2, 2]
    assert time.monotonic() - began < 15 + 10  # torch is imported first, on a busy machine
    message = "error: watch: rank 1 cannot take part: "
    for rank in (0, 1):
        assert job.output(rank).startswith(message), job.output(rank)
        assert "at 0.0.0.1, port " in job.output(rank)
        assert len(job.output(rank).splitlines()) == 1
    _wait_until(lambda: job.left() == [], seconds=2.0)


def test_ranks_end_with_the_launcher_that_started_them(start: Start, tmp_path: Path) -> None:
    program = (
        "import subprocess, sys\n"
        "child = subprocess.Popen(sys.argv[1:])\n"
        "open('child', 'w').write(str(child.pid))\n"
        "child.wait()\n"
    )
    mark = uuid.uuid4().hex
    job = Job(tmp_path, f"{MARK}={mark}")
    environment = {
        **os.environ, "PYTHONPATH": str(ROOT), MARK: mark, "PHIMOE_LAUNCHER": "1", "RANK": "0",
        "WORLD_SIZE": "1", "STUCK_SECONDS": "60",
    }  # fmt: skip
    rank = [sys.executable, str(HERE / "watched_rank.py"), str(tmp_path), "sleep", "0"]
    with (tmp_path / "rank0.log").open("wb") as log:
        launcher = subprocess.Popen(
            [sys.executable, "-c", program, *rank], env=environment, cwd=tmp_path, stderr=log
        )
    job.there(0)
    launcher.kill()
    launcher.wait()
    _wait_until(lambda: job.left() == [], seconds=FOUND_SECONDS)
    assert job.fault()["kind"] == "orphaned"
    assert "lost the launcher that started it, in phase 'backward'" in job.watch_lines(0)[0]


@pytest.mark.slow
def test_a_job_suspended_with_its_guardians_goes_on_afterwards(start: Start) -> None:
    job = start("short_sleep", 0, world_size=1, SILENT_SECONDS="4", STUCK_SECONDS="60")
    rank, guardian = job.there(0), job.guardian(0)
    os.kill(rank, signal.SIGSTOP)
    time.sleep(1.5)  # so that the guardian has looked at a stopped rank
    os.kill(guardian, signal.SIGSTOP)
    time.sleep(5.0)
    os.kill(guardian, signal.SIGCONT)
    time.sleep(0.3)
    os.kill(rank, signal.SIGCONT)
    _check_clean(job)


ONE = Processes(0, 1, torch.device("cpu"))


def test_one_process_opens_and_closes_a_watch_without_a_trace(tmp_path: Path) -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    with watch_over(ONE, WatchConfig(), run_dir=tmp_path / "run") as watch:
        watch.phase("forward", 1)
        assert len(os.listdir("/proc/self/fd")) > len(before)
    del watch  # it holds the page
    with contextlib.suppress(KeyError), watch_over(ONE, WatchConfig(), run_dir=tmp_path):
        raise KeyError("mine")
    assert sorted(os.listdir("/proc/self/fd")) == before
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_guardian_joins_where_standard_streams_are_closed(closed: str, tmp_path: Path) -> None:
    program = (
        "import pathlib, sys; sys.path[:0] = [sys.argv[2]]; import test_watch as t\n"
        "with t.watch_over(t.ONE, t.WatchConfig(), run_dir=pathlib.Path(sys.argv[1])): pass\n"
        "pathlib.Path(sys.argv[1], 'done').touch()"
    )
    words = ["sh", "-c", f'exec "$@" {closed}', "sh", sys.executable, "-c", program]
    subprocess.run([*words, str(tmp_path), str(HERE)], env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["done"]


def test_a_pipe_that_breaks_is_no_echo_of_another_rank() -> None:
    assert not _can_be_an_echo(BrokenPipeError(errno.EPIPE, "Broken pipe"))
    assert _can_be_an_echo(RuntimeError("gloo/transport/tcp/pair.cc writev: Broken pipe"))


def test_the_watch_can_be_switched_off(tmp_path: Path) -> None:
    config, threads, children = WatchConfig(enabled=False), threading.active_count(), _children()
    with watch_over(ONE, config, run_dir=tmp_path) as watch:
        watch.phase("forward", 1)
        watch.tell(KeyError("mine"))
        assert threading.active_count() == threads
        assert _children() == children  # those of other tests of this process


def _children() -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit():
                stat = (entry / "stat").read_bytes().rpartition(b")")[2].split()
                found += [int(entry.name)] if int(stat[1]) == os.getpid() else []
    return found


def test_the_guardian_imports_the_standard_library_only() -> None:
    program = (
        "import sys; before = set(sys.modules); import moe.parallel.guardian\n"
        "print(*sorted({m.partition('.')[0] for m in set(sys.modules) - before}))"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-P", "-c", program],
        env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    imported = set(done.stdout.split())
    assert "moe" in imported
    assert imported - {"moe"} <= sys.stdlib_module_names | set(sys.builtin_module_names)


def test_the_fault_that_ends_a_rank_has_an_exit_code_of_its_own() -> None:
    assert RankFault.exit_code == 70
