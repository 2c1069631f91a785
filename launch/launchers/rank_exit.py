"""Why each rank ended: ranks write it down for their launcher, which then speaks once for all.

Launchers know only exit codes, make one of many, and end all ranks as soon as one does not end
with 0. So a rank under a launcher of ours says its message and code in a file, and one that ends
for a signal leaves with 0, so that nobody ends the others in the middle of their last lines.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NoReturn

from moe.train.stop_request import STOP_SIGNALS, is_kept_ignored

FOLDER_VARIABLE = "PHIMOE_EXIT_FOLDER"
DONE, MISTAKE, GAVE_UP, FAILED, SAVED, INTERRUPTED = 0, 2, 3, 70, 75, 130
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class RankExit:
    """Why one rank ended, in its own words."""

    rank: int
    code: int
    message: str


@dataclass(frozen=True)
class Verdict:
    """How a launch ended: the exit code of the launcher, and what to tell the user."""

    code: int
    message: str

    @property
    def is_final(self) -> bool:
        """Whether starting the ranks again would end in the same way."""
        return self.code in (MISTAKE, GAVE_UP, INTERRUPTED)


def is_rank() -> bool:
    """Whether a launcher of ours started this process as one of its ranks."""
    return FOLDER_VARIABLE in os.environ


def write_exit(code: int, message: str) -> None:
    """Write down why this rank ends; what it said first stays."""
    folder, rank = Path(os.environ[FOLDER_VARIABLE]), os.environ.get("RANK", "0")
    path = folder / f"rank_{rank}.json"
    if path.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}")
    unfinished.write_text(json.dumps({"rank": int(rank), "code": code, "message": message}))
    unfinished.replace(path)


def read_exits(folder: Path) -> list[RankExit]:
    """What the ranks wrote, in their order."""
    values = [json.loads(path.read_text()) for path in folder.glob("rank_*.json")]
    return sorted((RankExit(**value) for value in values), key=lambda told: told.rank)


def clear_exits(folder: Path) -> None:
    """Forget what the ranks of an earlier start wrote."""
    for path in folder.glob("rank_*"):
        path.unlink()


def verdict(exits: list[RankExit], *, failed: str) -> Verdict:
    """The one answer to what all ranks said; failed tells of ranks that ended without a word.

    A mistake outweighs all: the other ranks may have ended only because that one did.
    """
    for code in (MISTAKE, GAVE_UP, INTERRUPTED):
        for told in exits:
            if told.code == code:
                return Verdict(code, told.message)
    others = [told for told in exits if told.code not in (DONE, SAVED)]
    if others or failed:
        message = failed or f"rank {others[0].rank} ended with exit code {others[0].code}"
        said = next((told.message for told in others if told.message), "")
        return Verdict(FAILED, f"{message}: {said}".rstrip(": ."))
    saved = [told.message for told in exits if told.code == SAVED]
    # some ranks only heard of the signal: the one that got it can name it
    said = sorted(filter(None, saved), key=lambda message: "SIG" not in message)
    return Verdict(SAVED, next(iter(said), _SAVED)) if saved else Verdict(DONE, "")


_SAVED = "saved after a signal. The same command goes on from there."


@contextlib.contextmanager
def as_rank() -> Iterator[None]:
    """What launch/train.py runs in: as a rank of ours, ends with its launcher and tells it why."""
    if not is_rank():
        yield
        return
    _end_with_parent()
    for number in STOP_SIGNALS:
        if not is_kept_ignored(number):
            signal.signal(number, _stop_before_training)  # until the training loop has its own
    try:
        yield
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
        if code not in (DONE, 1):  # 1 comes with a traceback that says all
            write_exit(code, "")
        sys.stdout.flush()
        sys.exit(DONE if code in (SAVED, INTERRUPTED) else code)


def _stop_before_training(number: int, _: FrameType | None) -> NoReturn:
    name = signal.Signals(number).name
    write_exit(SAVED, f"stopped by {name} outside training. The same command goes on.")
    sys.exit(SAVED)


def _end_with_parent() -> None:
    """Ask the kernel for SIGTERM when the launcher dies, so that no rank is left alone."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def describe_code(code: int) -> str:
    """An exit code as Popen has it (negative: a signal), in words."""
    if code >= 0:
        return f"exit code {code}"
    with contextlib.suppress(ValueError):
        return f"signal {-code} ({signal.Signals(-code).name})"
    return f"signal {-code}"


def environment_of_ranks(folder: Path, *, num_ranks: int) -> Mapping[str, str]:
    """What the ranks of one host get besides the launcher's own environment."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (cores or 1) // num_ranks))
    return {FOLDER_VARIABLE: str(folder), "OMP_NUM_THREADS": threads}
