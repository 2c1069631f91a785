"""The program that starts ranks of launch/train.py by fork, so that torch is imported once.

It reads one JSON object a line (see `Life`), runs it to its end, and answers with one. A rank is a
process of its own from the fork on: it runs all of launch/train.py, and ends as a program does.
"""

from __future__ import annotations

import ctypes
import json
import os
import runpy
import signal
import socket
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

import traps

REPOSITORY = Path(__file__).parents[3]
TRAIN = REPOSITORY / "launch/train.py"
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG


@dataclass(frozen=True)
class Life:
    """One start of all ranks with one command."""

    arguments: list[str]  # of launch/train.py
    folder: str  # where the ranks run and where the trap leaves its notes
    log: str
    mark: str  # NAME=value in the environment of every process of it
    trap: str = ""  # traps.as_text
    write_delay_seconds: float = 0.0  # of each write into a checkpoint: a disk slower than a step
    world_size: int = 2
    limit_seconds: float = 120.0  # then all are killed


@dataclass(frozen=True)
class Ended:
    """Exit codes by rank, negative for signals; when the last one ended, in time.time()."""

    codes: list[int]
    ended_at: float
    is_late: bool


def main() -> None:
    """Import what takes long, then live."""
    _import_all()
    assert len(os.listdir("/proc/self/task")) == 1  # threads do not survive a fork
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(asdict(_live(Life(**json.loads(line))))), flush=True)


def _import_all() -> None:
    sys.path.insert(0, str(TRAIN.parent))
    import deepspeed  # noqa: F401
    import hydra  # noqa: F401
    import matplotlib.pyplot  # noqa: F401
    import sentencepiece  # noqa: F401
    import torch

    import moe.parallel.deepspeed_engine
    import moe.train.run

    torch.set_num_threads(1)
    # a second of each start, for a number (mfu) that is measured anew anyway
    moe.train.run.measure_peak_flops = lambda device, dtype, **_: 1e11


def _live(life: Life) -> Ended:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pids = []
    for rank in range(life.world_size):
        pid = os.fork()
        if pid == 0:
            _be_rank(life, rank, port)
        pids.append(pid)
    return _wait(pids, life.limit_seconds)


def _be_rank(life: Life, rank: int, port: int) -> NoReturn:
    ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    log = os.open(life.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for descriptor, target in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(descriptor, target)
    os.chdir(life.folder)
    name, _, value = life.mark.partition("=")
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(life.world_size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), name: value,
    }  # fmt: skip
    _slow_down_writes(life.write_delay_seconds)
    if life.trap:
        traps.install(life.trap, Path(life.folder))
    sys.argv = [str(TRAIN), *life.arguments]
    runpy.run_path(str(TRAIN), run_name="__main__")
    sys.exit(0)


def _slow_down_writes(seconds: float) -> None:
    real = os.write

    def write(descriptor: int, data: memoryview) -> int:
        if "/.tmp-step_" in os.readlink(f"/proc/self/fd/{descriptor}"):
            time.sleep(seconds)
        return real(descriptor, data)

    if seconds > 0:
        os.write = write


def _wait(pids: list[int], limit_seconds: float) -> Ended:
    codes: dict[int, int] = {}
    deadline = time.monotonic() + limit_seconds
    is_late = False
    while len(codes) < len(pids):
        for pid in pids:
            if pid not in codes and (status := os.waitpid(pid, os.WNOHANG))[0]:
                codes[pid] = os.waitstatus_to_exitcode(status[1])
            elif pid not in codes and time.monotonic() > deadline:
                is_late = True
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)
    return Ended([codes[pid] for pid in pids], time.time(), is_late)


if __name__ == "__main__":
    main()
