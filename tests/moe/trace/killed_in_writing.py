"""The program that runs commands of launch/ by fork, each killed at a chosen place of its writing.

python killed_in_writing.py, in the folder where they shall run. It reads one JSON object a line
(see `Life`), runs it to its end, and answers with its exit code. A command is a process of its own
from the fork on, that runs all of launch/<name>.py; torch alone is imported before.
"""

from __future__ import annotations

import ctypes
import json
import os
import runpy
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

LAUNCH = Path(__file__).parents[3] / "launch"
# in the order in which a part is written; the last three are of a checkpoint and of a trace's end
PLACES = (
    "part opened", "half a write", "part written", "part named", "noted",
    "checkpoint named", "about to be finished", "finished",
)  # fmt: skip
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG


@dataclass(frozen=True)
class Life:
    """One start of launch/<name>.py, killed at the n-th time that it comes to place, if any."""

    name: str
    arguments: list[str]
    log: str
    place: str = ""
    occurrence: int = 1
    delay_seconds: float = 0.0  # of each finished part: a disk slower than the model

    def __post_init__(self) -> None:
        assert self.place in ("", *PLACES)


def main() -> None:
    """Import what takes long, then live."""
    sys.path.insert(0, str(LAUNCH))
    import hydra  # noqa: F401
    import matplotlib.pyplot  # noqa: F401
    import sentencepiece  # noqa: F401
    import torch

    import moe.train.run

    torch.set_num_threads(1)
    # a second of each start, for a number (mfu) that no test here reads
    moe.train.run.measure_peak_flops = lambda device, dtype, **_: 1e11
    assert len(os.listdir("/proc/self/task")) == 1  # threads do not survive a fork
    print("ready", flush=True)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            _live(Life(**json.loads(line)))
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


def _live(life: Life) -> NoReturn:
    ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    log = os.open(life.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor, target in ((os.open(os.devnull, os.O_RDONLY), 0), (log, 1), (log, 2)):
        os.dup2(descriptor, target)
    _set_trap(life)
    program = LAUNCH / f"{life.name}.py"
    sys.argv = [str(program), *life.arguments]
    runpy.run_path(str(program), run_name="__main__")
    sys.exit(0)


def _set_trap(life: Life) -> None:
    from moe.trace import parquet

    real_write, real_finish, num_seen = parquet._HashedFile.write, parquet._HashedFile.finish, 0

    def seen(place: str) -> None:
        nonlocal num_seen
        if place and place == life.place:
            num_seen += 1
            if num_seen == life.occurrence:
                os.kill(os.getpid(), signal.SIGKILL)

    def write(self: Any, content: Any) -> int:
        view = memoryview(content).cast("B")
        half = real_write(self, view[: len(view) // 2])
        seen("half a write")
        return half + real_write(self, view[len(view) // 2 :])

    def finish(self: Any) -> Any:
        time.sleep(life.delay_seconds)
        return real_finish(self)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("open", "os.rename", "os.remove"):
            seen(_place_of(event, arguments))

    parquet._HashedFile.write, parquet._HashedFile.finish = write, finish
    sys.addaudithook(hook)


def _place_of(event: str, arguments: tuple[Any, ...]) -> str:
    """Which of PLACES is about to be passed; events come just before they happen."""
    name = _name(arguments[0])
    is_part, is_note = ".parquet." in name, name.startswith((".trace.rank_", ".progress.json"))
    if event == "open" and is_part:
        return "part opened"
    if event == "os.rename":
        if is_part:
            return "part written"
        if is_note:
            return "noted"
        if (
            _name(arguments[1]) == "latest"
        ):  # a checkpoint has its name, and nobody points to it yet
            return "checkpoint named"
        return "about to be finished" if name.startswith(".trace.json") else ""
    if event == "open" and is_note:
        return "part named"
    return "finished" if event == "os.remove" and name == "progress.json" else ""


def _name(path: Any) -> str:
    is_path = isinstance(path, (str, bytes, os.PathLike))
    return os.path.basename(os.fsdecode(path)) if is_path else ""


if __name__ == "__main__":
    main()
