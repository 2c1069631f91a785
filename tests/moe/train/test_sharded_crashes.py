"""Ranks killed at any moment of a common save leave a good checkpoint and nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("checkpoint_ranks.py")
REPOSITORY = PROGRAM.parents[3]


def kill_at_every_event(mode: str, ranks: str) -> dict[str, int]:
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    # a kill cannot tell memory from a disk, and a disk waits at some thousand flushes here
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder:
        result = subprocess.run(
            [sys.executable, str(PROGRAM), folder, mode, ranks],
            env=environment,
            capture_output=True,
            text=True,
            timeout=250,
            check=False,
        )
    assert result.returncode == 0, result.stdout + result.stderr[-4000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.slow
def test_the_first_rank_killed_at_every_event_of_a_save_leaves_a_good_checkpoint() -> None:
    report = kill_at_every_event("foreground", "0")
    # it opens, writes in two halves and flushes seven files, and renames two folders and one file
    assert report["events"] >= 40
    assert report["old"] >= 30
    assert report["new"] >= 3


def test_another_rank_killed_at_every_event_of_a_save_leaves_the_checkpoint_before() -> None:
    report = kill_at_every_event("foreground", "1")
    assert report["events"] >= 12
    # nothing is published without it; its last event is the note, to the test, that it is done
    assert report["old"] == report["events"] - 1


@pytest.mark.long
@pytest.mark.parametrize("ranks", ["0", "1", "01"])
def test_ranks_killed_at_every_event_of_a_save_in_the_background(ranks: str) -> None:
    report = kill_at_every_event("background", ranks)
    assert report["events"] >= 12
    assert report["old"] >= 12


@pytest.mark.long
def test_both_ranks_killed_at_every_event_of_a_save() -> None:
    report = kill_at_every_event("foreground", "01")
    assert report["events"] >= 40
    assert report["old"] >= 30
