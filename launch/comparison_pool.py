"""Train planned runs in processes of their own, several at once, and be told how far they are."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from comparison_plan import PlannedRun, run_key
from sigterm import sigterm_as_interrupt

from moe.errors import UserError
from moe.train.atomic_files import replace_file
from moe.train.metrics import METRICS_FILE
from moe.train.redact import redact_texts

_ROOT = Path(__file__).resolve().parent.parent
RECORD_NAME, LOG_NAME = "comparison.json", "train.log"
_LOCK_NAME = "comparison.lock"
_SECONDS_TO_SAVE = 60.0
_LAST_LINES = 15


class RunsFailed(UserError):
    """Some runs did not end well; the message has their last lines."""

    exit_code = 1


@dataclass(frozen=True)
class State:
    """How far all runs are; where says step and newest validation loss of those under way."""

    done: int
    total: int
    share: float  # of the FLOPs of all runs
    where: list[str]


@dataclass
class _Child:
    run: PlannedRun
    process: subprocess.Popen[bytes]
    files: list[IO[Any]]  # the log, and the lock, which the process holds too


def train_all(
    runs: Sequence[PlannedRun],
    *,
    jobs: int,
    flags: Sequence[str],
    provenance: dict[str, Any],
    data_fingerprint: str,
    show: Callable[[State], None],
    say: Callable[[str], None],
) -> None:
    """Train what is not finished; runs of one folder are one run.

    A run that another process is training is waited for. On Ctrl-C or SIGTERM every run saves and
    ends; a runner that is killed outright leaves its runs going, and they are waited for, too.
    flags come first on each command line. Raises RunsFailed, after all others have ended, naming
    each run that failed with its last lines.
    """
    waiting = list({run.folder: run for run in runs}.values())
    for run in waiting:
        refuse_other_settings(run)
    unique, children, failed = list(waiting), list[_Child](), dict[Path, str]()
    with _ending(children), sigterm_as_interrupt():
        while waiting or children:
            for child in [c for c in children if c.process.poll() is not None]:
                children.remove(child)
                _close(child)
                if child.process.returncode == 0:
                    _write_record(child.run, {"is_finished": True})
                else:
                    failed[child.run.folder] = _failure(child)
                    say(failed[child.run.folder])
            waiting = [run for run in waiting if not is_finished(run)]
            for run in list(waiting):
                if run.starts_from is not None and run.starts_from.folder in failed:
                    waiting.remove(run)
                    failed[run.folder] = f"{_name(run)}: not started, for {run.starts_from.arm} is"
                    failed[run.folder] += " what it starts from."
                elif len(children) < jobs and _is_ready(run):
                    child = _start(run, flags, provenance, data_fingerprint)
                    if child is not None:  # else another process has it
                        waiting.remove(run)
                        children.append(child)
            show(_state(unique, failed))
            if waiting or children:
                time.sleep(1.0)
    if failed:
        raise RunsFailed(
            f"{len(failed)} of {len(unique)} runs failed:\n" + "\n".join(failed.values()) + "\n"
            "The others are done. Mend it, and start the same command again: it trains what is "
            "left."
        )


def refuse_other_settings(run: PlannedRun) -> None:
    """Refuse a folder with a run that this one would not be."""
    settings = run.folder / "config.json"
    key = _record(run.folder).get("key")
    if key is None and not settings.is_file():
        return
    found = key
    if settings.is_file():
        start = run.starts_from.key if run.starts_from else None
        found = run_key(json.loads(settings.read_text()), starts_from=start)
    if key != run.key or found != run.key:
        raise UserError(
            f"{run.folder}: it holds a run of other settings than {_name(run)} has (key "
            f"{key if key != run.key else found}, wanted {run.key}). Move that folder away, or "
            "give another paths.runs."
        )


def is_finished(run: PlannedRun) -> bool:
    """Whether its process has ended well."""
    return _record(run.folder).get("is_finished") is True


def _is_ready(run: PlannedRun) -> bool:
    return run.starts_from is None or is_finished(run.starts_from)


def read_record(run: PlannedRun) -> dict[str, Any]:
    """What the runner wrote down: key, commits, machine, data_fingerprint, is_finished."""
    return _record(run.folder)


def _record(folder: Path) -> dict[str, Any]:
    path = folder / RECORD_NAME
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text())
    except ValueError:
        raise UserError(f"{path}: is damaged. Move {folder} away: its run is made again.") from None


def _write_record(run: PlannedRun, change: dict[str, Any]) -> None:
    text = json.dumps(_record(run.folder) | change, indent=1) + "\n"
    replace_file(run.folder / RECORD_NAME, text.encode())


def _start(
    run: PlannedRun, flags: Sequence[str], provenance: dict[str, Any], data_fingerprint: str
) -> _Child | None:
    """None where another process trains it."""
    run.folder.mkdir(parents=True, exist_ok=True)
    lock = (run.folder / _LOCK_NAME).open("ab")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        return None
    if is_finished(run):  # by that other process, just now
        lock.close()
        return None
    before = _record(run.folder)
    commits = [*before.get("commits", [])]
    if provenance["commit"] not in commits:
        commits.append(provenance["commit"])
    _write_record(
        run,
        {"key": run.key, "overrides": redact_texts(run.overrides, os.environ), "commits": commits,
         "machine": provenance, "data_fingerprint": data_fingerprint, "is_finished": False},
    )  # fmt: skip
    log = (run.folder / LOG_NAME).open("ab")
    process = subprocess.Popen(
        [sys.executable, str(_ROOT / "launch/train.py"), *flags, *run.arguments],
        env=environment(), stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
        pass_fds=[lock.fileno()],  # the lock lasts as long as the process, whoever ends first
        start_new_session=True,  # Ctrl-C comes from here alone, and once
    )  # fmt: skip
    return _Child(run, process, [log, lock])


def environment() -> dict[str, str]:
    """The user's, for a process of one thread with this checkout on its path."""
    left_out = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    kept = {name: value for name, value in os.environ.items() if name not in left_out}
    paths = [str(_ROOT), str(_ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    return kept | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}


def _failure(child: _Child) -> str:
    lines = (child.run.folder / LOG_NAME).read_text(errors="replace").splitlines()
    said = "\n".join(f"    {line}" for line in lines[-_LAST_LINES:])
    log = child.run.folder / LOG_NAME
    return f"{_name(child.run)} ended with {child.process.returncode}, last lines of {log}:\n{said}"


def _close(child: _Child) -> None:
    for file in child.files:
        file.close()


@contextlib.contextmanager
def _ending(children: list[_Child]) -> Iterator[None]:
    """Whatever happens inside, no process is left when the block is."""
    try:
        yield
    finally:
        for child in children:
            child.process.send_signal(signal.SIGTERM)  # it saves
        until = time.monotonic() + _SECONDS_TO_SAVE
        for child in children:
            try:
                child.process.wait(timeout=max(0.1, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.process.kill()
                child.process.wait()
            _close(child)


def _state(runs: Sequence[PlannedRun], failed: dict[Path, str]) -> State:
    done, flops, where = 0, 0.0, []
    for run in runs:
        if is_finished(run):
            done, flops = done + 1, flops + run.flops
            continue
        step, loss = _newest(run.folder / METRICS_FILE)
        flops += run.flops * step / run.config.train.steps
        if step and run.folder not in failed:
            shown = "" if loss is None else f" {loss:.3f}"
            where.append(f"{_name(run)} {step}/{run.config.train.steps}{shown}")
    return State(done, len(runs), flops / sum(run.flops for run in runs), where)


def _newest(path: Path) -> tuple[int, float | None]:
    """The last step in a metrics.jsonl that is being written, and the last validation loss."""
    step, loss = 0, None
    with contextlib.suppress(OSError):
        for line in path.read_bytes().split(b"\n")[:-1]:
            is_validation = b'"kind": "validation"' in line[:80]
            with contextlib.suppress(ValueError, KeyError):
                if is_validation:
                    loss = float(json.loads(line)["validation/loss"])
                step = int(line.split(b",", 1)[0].rpartition(b" ")[2])
    return step, loss


def _name(run: PlannedRun) -> str:
    return f"{run.arm}/{run.seed}"
