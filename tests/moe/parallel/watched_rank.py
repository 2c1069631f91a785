"""One rank of test_watch.py: a few steps of all_reduce under the watch, with one fault in it.

python watched_rank.py RUN_DIR FAULT VICTIM, FAULT happens on rank VICTIM in phase "backward" of
step 3. The launcher's environment variables say which rank this is. RUN_DIR/rank<r>.there holds
the victim's process id from then on.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import time
from pathlib import Path

import torch

import moe.parallel.watch as watch_module
from moe.errors import UserError
from moe.parallel.processes import join_processes
from moe.parallel.watch import Watch, watch_over
from moe.watch_config import WatchConfig

STEPS = 6
FAULT_STEP = 3


class Stopped(UserError):
    """All ranks stop for one reason."""

    exit_code = 3


def main(run_dir: Path, fault: str, victim: int) -> None:
    processes = join_processes()
    rank = processes.rank
    config = WatchConfig(
        enabled=fault != "disabled",
        silent_seconds=float(os.environ.get("SILENT_SECONDS", "2")),
        stuck_seconds=float(os.environ.get("STUCK_SECONDS", "3")),
    )
    if fault == "late_guardian" and rank == victim:
        at_once = watch_module._start_guardian
        watch_module._start_guardian = lambda *given: time.sleep(3.5) or at_once(*given)
    if fault == "unreachable":
        os.environ["MASTER_ADDR"] = (
            "0.0.0.1"  # no machine has it; the process group is made already
        )
    with watch_over(processes, config, run_dir=run_dir) as watch:
        for step in range(STEPS):
            watch.phase("forward", step)
            processes.sum(torch.ones(1))
            watch.phase("backward")
            if step == FAULT_STEP and rank == victim:
                _go_wrong(fault, watch, run_dir, rank)
            if step == FAULT_STEP:
                _stop_together(fault, watch, rank)
            watch.phase("update")
            processes.sum(torch.ones(1))
        _finish(fault, watch, rank, victim)
    if fault == "late_guardian":
        # inside the rank, not from outside after its end
        assert _children() == [], _children()


def _go_wrong(fault: str, watch: Watch, run_dir: Path, rank: int) -> None:
    (run_dir / f"rank{rank}.there").write_text(str(os.getpid()))
    if fault == "raise":
        raise ValueError("the numbers do not add up")
    if fault == "raise_with_secret":
        raise ValueError(f"401 for the key {os.environ['WANDB_API_KEY']}")
    if fault == "exit":
        os._exit(0)
    if fault == "loop":
        loop_for_ever()
    if fault == "compute_with_the_lock":
        # one call that lets no other thread of Python run; it would take longer than the universe
        re.match("(a+)+$", "a" * 64 + "b")
    if fault == "slow_with_the_lock":
        _compute_with_the_lock(run_dir)
    if fault in ("sleep", "wait"):
        time.sleep(600)
    if fault == "slow_work":
        for _ in range(8):
            time.sleep(0.5)
            watch.progress()
    if fault == "short_sleep":
        time.sleep(2)


def loop_for_ever() -> None:
    while True:
        pass


def _stop_together(fault: str, watch: Watch, rank: int) -> None:
    if fault == "agree":
        with contextlib.ExitStack() as closing:
            if rank == 0:
                closing.callback(time.sleep, 6.5)  # a log that takes long to close
            with watch.telling():
                time.sleep(0.5 * rank)
                raise Stopped("the loss is not a number")
    if fault == "all_sleep":
        time.sleep(600)


def _finish(fault: str, watch: Watch, rank: int, victim: int) -> None:
    watch.phase("finishing", STEPS)
    if rank == victim and fault == "slow_finish":
        time.sleep(4)


def _compute_with_the_lock(run_dir: Path) -> None:
    """Calls that let no other thread run, the last of at least 3 s."""
    longest, count = 0.0, 2**23
    while longest < 3.0:
        before = time.monotonic()
        sum(range(count))
        longest = time.monotonic() - before
        count = int(count * 3.5 / longest)
    (run_dir / "longest").write_text(str(longest))


def _children() -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_bytes()
            except OSError:
                continue
            if int(stat.rpartition(b")")[2].split()[1]) == os.getpid():
                found.append(int(entry.name))
    return found


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
