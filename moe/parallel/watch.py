"""A watch over all ranks: a dead, stopped or hung one is named, and every rank ends.

Every rank has a guardian beside it (moe/parallel/guardian.py); rank 0's guardian hears them all,
says on stderr which rank is at fault and in which phase, and appends it to run_dir/faults.jsonl.
Then every rank ends and none exits with 0: with 70 where its threads can run, by SIGKILL where
they cannot, and a rank that raised keeps the exit code of its own error.

Cost, measured on an AMD EPYC: a call of `phase` takes 0.4 microseconds and no system call; every
silent_seconds / 4 (at most 5 s) a pulse takes 0.2 ms of CPU time beside the main thread, and the
guardian 0.4 ms.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import select
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist

import moe
from moe.errors import UserError
from moe.parallel.guardian import CONNECT_SECONDS, tick_seconds
from moe.parallel.launcher import LAUNCHER_VARIABLES
from moe.parallel.processes import Processes
from moe.parallel.watch_lines import Lines, Message, append_fault, say
from moe.parallel.watch_page import Page, make_page
from moe.parallel.watch_verdict import ECHO_SECONDS
from moe.train.redact import redact
from moe.watch_config import WatchConfig

# a rank that raises waits so long to hear that all do, for then its guardian ends before it
_AGREEMENT_SECONDS = 0.5
_MOST_ERROR_LETTERS = 300
_MOST_FRAMES = 40
# what a collective says when another rank has ended
_ECHOES = ("gloo", "nccl", "connection closed by peer", "connection reset by peer", "broken pipe")


class RankFault(UserError):
    """This rank ends because the watch found a rank dead, stopped, hung or failed."""

    exit_code = 70


class WatchError(UserError):
    """The watch could not be set up."""


class Watch:
    """What a rank tells of itself. All ranks call the same phases in the same order."""

    def __init__(self, page: Page) -> None:
        self._page = page

    def phase(self, name: str, step: int | None = None) -> None:
        """Say what this rank does from now on; a step of None is the step of the call before.

        0.4 microseconds and no system call; only from the main thread.
        """
        self._page.set_place(name, step)

    def progress(self, amount: int = 1) -> None:
        """Say that the work of this phase moves on: bytes, rows, batches.

        A phase that says so for every piece may last as long as it likes: hung is what does nothing
        for stuck_seconds. A microsecond and no system call; from any thread.
        """
        self._page.add_progress(amount)

    def tell(self, error: BaseException) -> None:
        """Say at once that this rank fails with error, before a slow clean-up; the first counts."""

    @contextlib.contextmanager
    def telling(self) -> Iterator[None]:
        """Tell an error of the body before the contexts around this one close.

        Ranks that stop for one reason must say so within seconds of each other, and closing a log
        can take minutes on one of them.
        """
        try:
            yield
        except BaseException as error:
            self.tell(error)
            raise


class _GuardedWatch(Watch):
    def __init__(self, page: Page, *, rank: int, run_dir: Path, silent: float) -> None:
        super().__init__(page)
        self._rank = rank
        self._run_dir = run_dir
        self._silent = silent
        self._tick = tick_seconds(silent)
        self._main_thread = threading.get_ident()
        self._own, self._other = socket.socketpair()
        self._lock = threading.Lock()
        self._is_leaving = False
        self._outcome = ""  # "over" or "fault"
        self._has_outcome = threading.Event()
        self._guardian: subprocess.Popen[bytes] | None = None
        self._lines = Lines(self._own)
        self._pulse = threading.Thread(target=self._give_pulse, name="watch pulse", daemon=True)

    def start(self, start: Message, listener: socket.socket | None) -> str:
        """Start the guardian and wait until it has joined; return what is wrong, or ""."""
        try:
            self._guardian = _start_guardian(self._other, self._page, listener)
        except OSError as error:
            return f"its guardian could not be started: {error}"
        finally:
            self._other.close()
            self._page.close_descriptor()
        self._send(start)
        waiting = select.poll()
        waiting.register(self._own, select.POLLIN)
        waiting.poll(int(1000 * (2 * CONNECT_SECONDS + 5)))
        answer = self._lines.receive()
        if answer and answer[0]["kind"] == "ready":
            return ""
        return str(answer[0].get("error")) if answer else "its guardian ended at once"

    def go(self) -> None:
        """Begin: all guardians have joined."""
        self._send({"kind": "go"})
        self._pulse.start()

    def tell(self, error: BaseException) -> None:
        self._is_leaving = True
        # the text is hidden whole where it holds a secret; of which type the error was stays
        text = redact({"error": " ".join(str(error).split())}, os.environ)["error"]
        shown = f"{type(error).__name__}: {text}" if text else type(error).__name__
        shown = shown[:_MOST_ERROR_LETTERS]
        self._send({"kind": "raised", "error": shown, "is_echo": _can_be_an_echo(error)})

    def leave_with(self, error: BaseException) -> None:
        """Tell the error; raise RankFault if it is only the effect of another rank's end."""
        self.tell(error)
        is_echo = _can_be_an_echo(error)
        self._has_outcome.wait(ECHO_SECONDS + 2.0 if is_echo else _AGREEMENT_SECONDS)
        self._wait_for_guardian()
        if is_echo and self._outcome == "fault":
            raise RankFault(_ENDED) from error

    def leave_done(self) -> None:
        """Say "done" and wait for all ranks. Raises RankFault if one fails until then."""
        self._is_leaving = True
        self._send({"kind": "done"})
        self._has_outcome.wait()
        self._wait_for_guardian()
        if self._outcome == "fault":
            raise RankFault(_ENDED)

    def stop_guardian(self) -> None:
        """End the guardian of a watch that never began."""
        if self._guardian is not None:
            self._guardian.kill()
            self._guardian.wait()
        self._own.close()

    def _wait_for_guardian(self) -> None:
        # one that is not needed any more ends by itself; one that ends this rank does not
        if self._guardian is not None and self._outcome == "over":
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._guardian.wait(timeout=5.0)
            self._pulse.join(timeout=5.0)

    def _send(self, message: Message) -> None:
        with self._lock:
            self._lines.send(message)

    def _give_pulse(self) -> None:
        waiting = select.poll()
        waiting.register(self._own, select.POLLIN)
        heard_at = last = time.monotonic()
        while self._lines.is_open:
            self._page.beat()
            waiting.poll(int(1000 * self._tick))
            now = time.monotonic()
            if now - last > 2 * self._tick + 1.0:
                heard_at = now  # this process was stopped, so it could not hear
            last = now
            for message in self._lines.receive():
                heard_at = now
                if message["kind"] == "where":
                    self._send({"kind": "frames", "frames": self._main_frames()})
                elif message["kind"] in ("over", "fault"):
                    self._take(message["kind"])
            if not self._outcome and (not self._lines.is_open or now - heard_at >= self._silent):
                self._say_guardian_is_gone()
                self._take("fault")
        self._own.close()

    def _take(self, outcome: str) -> None:
        self._outcome = self._outcome or outcome
        self._has_outcome.set()
        if outcome == "fault" and not self._is_leaving:
            # the main thread may wait in a collective for ever: nothing but this ends it
            _flush_for_a_moment()
            os._exit(RankFault.exit_code)

    def _say_guardian_is_gone(self) -> None:
        place = self._page.place()
        step = f"of step {place.step}" if place.step >= 0 else "before the first step"
        line = (
            f"rank {self._rank} (host {socket.gethostname()}, process {os.getpid()}) lost its "
            f"guardian in phase '{place.phase}' {step}; ending it"
        )
        say(line)
        if self._rank == 0:
            fault = {"rank": 0, "pid": os.getpid(), "step": place.step, "phase": place.phase}
            append_fault(str(self._run_dir), {"kind": "vanished", "line": line, "ranks": [fault]})

    def _main_frames(self) -> list[str]:
        frame = sys._current_frames().get(self._main_thread)
        if frame is None:
            return []
        # without the lines of source, which would be read from the disk
        stack = traceback.StackSummary.extract(
            traceback.walk_stack(frame), limit=_MOST_FRAMES, lookup_lines=False
        )
        return [f"{entry.filename}:{entry.lineno} in {entry.name}" for entry in reversed(stack)]


@contextlib.contextmanager
def watch_over(processes: Processes, config: WatchConfig, *, run_dir: Path) -> Iterator[Watch]:
    """Watch over the ranks while the body runs; all ranks enter it together.

    An error of the body that is only the effect of another rank's end becomes RankFault, whose exit
    code is 70. At a clean end every rank waits here until all are done. Raises WatchError on every
    rank when one of them cannot join.
    """
    page = make_page()
    page.set_place("starting", None)
    if not config.enabled:
        page.close_descriptor()
        yield Watch(page)
        return
    silent = config.silent_seconds
    watch = _GuardedWatch(page, rank=processes.rank, run_dir=run_dir, silent=silent)
    _start_all(watch, processes, config, run_dir=run_dir)
    watch.go()
    try:
        yield watch
    except BaseException as error:
        if isinstance(error, SystemExit) and error.code in (None, 0):
            watch.leave_done()
        else:
            watch.leave_with(error)
        raise
    watch.leave_done()


def _start_all(
    watch: _GuardedWatch, processes: Processes, config: WatchConfig, *, run_dir: Path
) -> None:
    listener = None
    hub: Message = {"hub_host": "", "hub_port": 0, "token": secrets.token_hex(16)}
    if processes.world_size > 1:
        problem = ""
        if processes.is_first:
            try:
                listener = _listen(os.environ["MASTER_ADDR"])
                hub["hub_port"] = listener.getsockname()[1]
            except OSError as error:
                problem = f"rank 0 cannot open a port: {error}"
            hub["hub_host"] = os.environ["MASTER_ADDR"]
        hub = json.loads(processes.from_first(json.dumps({**hub, "problem": problem})))
    start = {
        **hub,
        "kind": "start",
        "rank": processes.rank,
        "world_size": processes.world_size,
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "launcher": os.getppid() if any(n in os.environ for n in LAUNCHER_VARIABLES) else 0,
        "silent_seconds": config.silent_seconds,
        "stuck_seconds": config.stuck_seconds,
        "run_dir": str(run_dir.absolute()),
    }
    problem = hub.get("problem") or watch.start(start, listener)
    if listener is not None:
        listener.close()
    problems = processes.all_texts(problem)
    if any(problems):
        watch.stop_guardian()
        rank = next(rank for rank, text in enumerate(problems) if text)
        raise WatchError(
            f"watch: rank {rank} cannot take part: {problems[rank]}. Every rank must reach rank 0 "
            f"at {hub['hub_host'] or 'its own machine'}, port {hub['hub_port']} (any free port is "
            "taken): open the ports between the machines, or set watch.enabled=false."
        )


def _listen(host: str) -> socket.socket:
    """Open a free port where the other ranks reach this one."""
    if host in ("localhost", "127.0.0.1"):
        return socket.create_server(("127.0.0.1", 0), backlog=1024)
    # a host's own name often leads to a loop-back address on that host: listen on all of them
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):
            return socket.create_server(
                ("", 0), family=socket.AF_INET6, backlog=1024, dualstack_ipv6=True
            )
    return socket.create_server(("", 0), backlog=1024)


def _start_guardian(
    rank_socket: socket.socket, page: Page, listener: socket.socket | None
) -> subprocess.Popen[bytes]:
    given = [rank_socket.fileno(), page.descriptor]
    # -S and -P: neither site-packages nor the working directory have a say in what it imports
    command = [sys.executable, "-S", "-P", "-m", "moe.parallel.guardian"]
    if listener is not None:
        given.append(listener.fileno())
    root = str(Path(moe.__file__).resolve().parent.parent)
    # where a standard stream is closed one of them may have its number, and the null device, which
    # the guardian gets there, would hide it
    passed = [fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, 3) for number in given]
    try:
        return subprocess.Popen(
            [*command, *map(str, passed)],
            env={**os.environ, "PYTHONPATH": root},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=None if _is_open(2) else subprocess.DEVNULL,
            pass_fds=passed,
        )
    finally:
        for number in passed:
            os.close(number)


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


def _can_be_an_echo(error: BaseException) -> bool:
    """Whether another rank's end can be the cause: collectives fail like this."""
    if isinstance(error, dist.DistError):
        return True
    # not OSError: a pipe or socket of ours that breaks is this rank's own trouble
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(echo in text for echo in _ECHOES)


def _flush_for_a_moment() -> None:
    # the main thread may hold the lock of stdout, so another thread tries, and is not waited for
    def flush() -> None:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:  # closed when this process began
                stream.flush()

    trying = threading.Thread(target=flush, daemon=True)
    trying.start()
    trying.join(0.5)


_ENDED = "the watch ended this rank; rank 0's output and faults.jsonl in the run folder say why."
