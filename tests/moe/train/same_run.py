"""Whether a run that was killed and started again is the run that was never killed.

Compared are all numbers of all steps, every bit of the last checkpoint, and the sample.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from moe.train.checkpoint import Checkpoint, find_checkpoint
from moe.train.metrics import Record, read_metrics

MEASURED = {"tokens_per_second", "step_seconds", "memory_gib", "mfu"}  # times and memory


def unfinished_saves(run_dir: Path) -> set[str]:
    """Folders of saves that are going on, or were killed: .tmp-step_00000010-<process>-<random>."""
    return {name for name in _names(run_dir / "checkpoints") if name.startswith(".tmp-step_")}


def finished_saves(run_dir: Path) -> list[str]:
    """Folders of whole checkpoints, oldest first."""
    return sorted(name for name in _names(run_dir / "checkpoints") if name.startswith("step_"))


def _names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()] if folder.exists() else []


def last_recorded_step(run_dir: Path) -> int:
    """How many training records metrics.jsonl holds; quick, to be asked again and again."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_bytes().splitlines() if path.exists() else []
    return len([line for line in lines if b'"kind": "train"' in line])


def recorded_steps(run_dir: Path) -> list[int]:
    """The steps of the training records, in the order of the file."""
    records = read_metrics(run_dir / "metrics.jsonl")
    return [record["step"] for record in records if record["kind"] == "train"]


def deterministic(run_dir: Path) -> list[Record]:
    """The records without what depends on the machine."""
    # when a save in the background is done, and what it cost, depends on the machine
    records = [r for r in read_metrics(run_dir / "metrics.jsonl") if r["kind"] != "checkpoint"]
    return [{k: v for k, v in record.items() if k not in MEASURED} for record in records]


def newest_checkpoint(run_dir: Path) -> Checkpoint:
    """The newest checkpoint; a damaged one, or one beside it, fails the test."""
    checkpoint = find_checkpoint(run_dir / "checkpoints", on_skip=pytest.fail)
    assert checkpoint is not None
    return checkpoint


def assert_same_run(killed: Path, reference: Path, *, num_steps: int) -> None:
    """Every number of every step, and every bit of the last checkpoint."""
    assert recorded_steps(killed) == list(range(1, num_steps + 1))
    assert deterministic(killed) == deterministic(reference)
    mine, other = newest_checkpoint(killed), newest_checkpoint(reference)
    assert mine.step == other.step == num_steps
    for stem in ("model", "optimizer"):
        assert dict(mine.table(stem)) == dict(other.table(stem))
        assert mine.hashes(stem) == other.hashes(stem)
        assert len(mine.hashes(stem)) > 10
    assert _without_run_id(mine.state) == _without_run_id(other.state)
    assert (killed / "sample.txt").read_bytes() == (reference / "sample.txt").read_bytes()


def digest(run_dir: Path) -> str:
    """One SHA-256 of all parameters and moments of the newest checkpoint."""
    checkpoint = newest_checkpoint(run_dir)
    hashes = [sorted(checkpoint.hashes(stem).items()) for stem in ("model", "optimizer")]
    return hashlib.sha256(repr(hashes).encode()).hexdigest()


def _without_run_id(state: dict[str, Any]) -> dict[str, Any]:
    return {**state, "train": {k: v for k, v in state["train"].items() if k != "run_id"}}
