"""Where a rank is killed: a trap springs at a chosen place of a chosen rank and kills processes.

Installed in the rank's own process by who starts it (rank_pool.py, or sitecustomize.py under a
launcher), so that product code needs to know nothing of it. A sprung trap first writes down where
it really was.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, ItemsView, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# phases of moe/train/run.py and loop.py
STEP_PHASES = ("forward", "backward", "update")
RECOVERY_PHASES = ("build model", "load parameters")
PHASES = (*STEP_PHASES, *RECOVERY_PHASES, "write sample")
# dealings with files
FILE_PLACES = ("writing a file", "before the rename", "after the rename", "removing an old one",
               "removing leftovers", "reading a checkpoint", "mending metrics.jsonl",
               "replacing sample.txt")  # fmt: skip
PLACES = (*PHASES, *FILE_PLACES, "copying tensors")
# only rank 0 does these
OF_FIRST = ("before the rename", "after the rename", "removing an old one", "removing leftovers",
            "mending metrics.jsonl", "replacing sample.txt")  # fmt: skip
NOTES = "sprung.jsonl"
VICTIMS = ("self", "other", "both", "guardian", "launcher")


@dataclass(frozen=True)
class Trap:
    """Springs once in rank, at the n-th time that it comes to place."""

    place: str
    rank: int
    occurrence: int = 1
    fraction: float = 0.0  # of the phase, as long as the shortest one before took
    victim: str = "self"

    def __post_init__(self) -> None:
        assert self.place in PLACES
        assert self.victim in VICTIMS
        assert self.rank == 0 or self.place not in OF_FIRST


def as_text(trap: Trap) -> str:
    """For an environment variable."""
    return json.dumps(asdict(trap))


def install(text: str, folder: Path) -> None:
    """Set the trap of `as_text` in this process if it is the rank meant; all ranks must call it."""
    trap = Trap(**json.loads(text))
    rank = int(os.environ["RANK"])
    (folder / f"rank{rank}.pid").write_text(str(os.getpid()))
    if rank != trap.rank:
        return
    set_trap = _Set(trap, folder)
    if trap.place in PHASES:
        _watch_phases(set_trap)
    elif trap.place == "copying tensors":
        _watch_copies(set_trap)
    elif trap.place == "writing a file":
        _watch_writes(set_trap)
    else:
        _watch_events(set_trap)


class _Set:
    """A trap that is set: counts, and springs once."""

    def __init__(self, trap: Trap, folder: Path) -> None:
        self.trap = trap
        self._folder = folder
        self._count = 0
        self._lock = threading.Lock()  # a background writer comes here, too
        self.is_sprung = False

    def count(self, detail: str) -> None:
        """This is the place, once more."""
        with self._lock:
            self._count += 1
            if self._count < self.trap.occurrence or self.is_sprung:
                return
            self.is_sprung = True
        self.spring(detail)

    def is_due(self) -> bool:
        """Count without springing: whether this is the time."""
        self._count += 1
        return self._count >= self.trap.occurrence and not self.is_sprung

    def spring(self, detail: str) -> None:
        """Write down where this is, and kill."""
        self.is_sprung = True
        is_main = threading.current_thread() is threading.main_thread()
        note = {"detail": detail, "thread": "main" if is_main else "other", "time": time.time()}
        victims = self._victims()
        with (self._folder / NOTES).open("a") as file:
            file.write(json.dumps(asdict(self.trap) | note) + "\n")
        for pid in victims:
            os.kill(pid, signal.SIGKILL)

    def _victims(self) -> list[int]:
        own, victim = os.getpid(), self.trap.victim
        if victim == "launcher":
            return [os.getppid()]
        if victim == "guardian":
            return [_guardian_of(own)]
        other = int((self._folder / f"rank{1 - self.trap.rank}.pid").read_text())
        return {"self": [own], "other": [other], "both": [other, own]}[victim]


def _guardian_of(rank_pid: int) -> int:
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "cmdline").read_bytes()
            stat = (entry / "stat").read_bytes().rpartition(b")")[2].split()
        except OSError:
            continue
        if b"moe.parallel.guardian" in words and int(stat[1]) == rank_pid:
            return int(entry.name)
    raise AssertionError("this rank has no guardian")


def _watch_phases(trap: _Set) -> None:
    """Spring within a phase: a thread waits for a fraction of what the phase took before."""
    from moe.parallel.watch import Watch

    real = Watch.phase
    place, began, shortest = "", 0.0, 0.01
    has_taken, at_step = False, 0

    def spring_later(number: float, seconds: float) -> None:
        time.sleep(seconds)
        if (place, began) == (trap.trap.place, number) and not trap.is_sprung:
            trap.spring(f"step {at_step}, {1000 * seconds:.1f} ms after its beginning")

    def phase(self: Watch, name: str, step: int | None = None) -> None:
        nonlocal place, began, shortest, has_taken, at_step
        real(self, name, step)
        at_step = at_step if step is None else step
        now = time.perf_counter()
        if place == trap.trap.place:
            shortest = min(shortest, now - began) if has_taken else now - began
            has_taken = True
        place, began = name, now
        if name != trap.trap.place or not trap.is_due():
            return
        seconds = trap.trap.fraction * shortest
        shortest /= 2  # if the phase is over too soon, earlier in the next one
        threading.Thread(target=spring_later, args=(now, seconds), daemon=True).start()

    Watch.phase = phase  # type: ignore[method-assign]


def _watch_copies(trap: _Set) -> None:
    """Spring between two tensors of a copy."""
    from moe.train.host_copy import HostCopies

    real = HostCopies.copy

    class CountedItems(ItemsView[str, Any]):
        def __iter__(self) -> Iterator[tuple[str, Any]]:
            for name in self._mapping:
                trap.count(name)
                yield name, self._mapping[name]

    class Counted(dict[str, Any]):
        def items(self) -> ItemsView[str, Any]:
            return CountedItems(self)

    def copy(self: HostCopies, tensors: Mapping[str, Mapping[str, Any]]) -> Any:
        return real(self, {stem: Counted(table) for stem, table in tensors.items()})

    HostCopies.copy = copy  # type: ignore[method-assign]


def _watch_writes(trap: _Set) -> None:
    """Spring when half of a piece of a checkpoint's file is written."""
    real = os.write

    def write(descriptor: int, data: memoryview) -> int:
        path = _path_of(descriptor)
        if "/.tmp-step_" not in path:
            return real(descriptor, data)
        half = real(descriptor, data[: len(data) // 2])
        trap.count(path.rpartition("/")[2])
        return half + real(descriptor, data[half:])

    os.write = write


def _watch_events(trap: _Set) -> None:
    """Spring just before a dealing with files."""
    is_place = _IS_PLACE[trap.trap.place]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in _EVENTS and not trap.is_sprung:
            paths = _paths(event, arguments)
            if is_place(event, *paths):
                trap.count(" -> ".join("/".join(path.split("/")[-2:]) for path in paths))

    sys.addaudithook(hook)


_EVENTS = ("open", "os.rename", "os.remove", "os.rmdir", "os.truncate")


def _paths(event: str, arguments: tuple[Any, ...]) -> tuple[str, str]:
    """Source and target of a rename; else the path, and "w" where an open is to write."""
    if event == "os.rename":
        return str(arguments[0]), str(arguments[1])
    path = arguments[0]
    if event == "os.truncate":
        return str(path), ""
    if event == "open":
        flags = arguments[2] if isinstance(arguments[2], int) else 0
        is_name = isinstance(path, (str, os.PathLike))
        return str(path) if is_name else "", "w" if flags & (os.O_WRONLY | os.O_RDWR) else ""
    in_folder = arguments[1]
    if isinstance(in_folder, int) and in_folder >= 0 and not os.path.isabs(path):
        path = f"{_path_of(in_folder)}/{path}"
    return str(path), ""


def _path_of(descriptor: int) -> str:
    return os.readlink(f"/proc/self/fd/{descriptor}")


def _is_named(path: str, start: str) -> bool:
    return path.rpartition("/")[2].startswith(start)


_IS_PLACE: Mapping[str, Callable[[str, str, str], bool]] = {
    "before the rename": lambda event, source, target: (
        event == "os.rename" and _is_named(source, ".tmp-step_") and _is_named(target, "step_")
    ),
    "after the rename": lambda event, _, target: (
        event == "os.rename" and _is_named(target, "latest")
    ),
    "removing an old one": lambda event, path, _: (
        event in ("os.remove", "os.rmdir") and "/.trash-step_" in path
    ),
    "removing leftovers": lambda event, path, _: (
        event in ("os.remove", "os.rmdir") and "/.tmp-step_" in path
    ),
    "reading a checkpoint": lambda event, path, target: (
        event == "open" and "/checkpoints/step_" in path and target != "w"
    ),
    "mending metrics.jsonl": lambda event, path, _: (
        event == "os.truncate" and _is_named(path, "metrics.jsonl")
    ),
    "replacing sample.txt": lambda event, _, target: (
        event == "os.rename" and _is_named(target, "sample.txt")
    ),
}
