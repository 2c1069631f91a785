"""A process killed at any moment, a full disk and a size limit leave a good checkpoint behind."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

PROGRAMS = Path(__file__).with_name("checkpoint_crashes.py")
REPOSITORY = PROGRAMS.parents[3]


def run_program(*arguments: str, before: tuple[str, ...] = ()) -> dict[str, Any]:
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*before, sys.executable, str(PROGRAMS), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_a_kill_at_every_single_event_of_a_save_leaves_a_good_checkpoint() -> None:
    # a kill cannot tell memory from a disk, and a disk waits at some thousand flushes here
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder:
        num_events = run_program("kill_at_every_event", f"{folder}/c")
    # at least a write in two halves, an open and a flush of five files, and the renames
    assert set(num_events) == {"first", "next", "again"}
    assert min(num_events.values()) >= 25


def test_kills_at_random_moments_never_lose_a_finished_save(tmp_path: Path) -> None:
    report = run_program("kill_at_random_moments", str(tmp_path / "c"), "24")
    assert report["inside"] >= 15
    assert report["torn"] >= 5  # half-built folders were really left behind
    assert report["steps"] >= 1  # a slow disk finishes few between the kills


def test_a_file_size_limit_is_one_message_and_the_previous_checkpoint_stays(tmp_path: Path) -> None:
    report = run_program("file_size_limit", str(tmp_path / "c"))
    assert "Raise the file-size limit (ulimit -f)" in report["message"]


def test_a_full_or_read_only_disk_is_one_message_and_the_previous_checkpoint_stays(
    tmp_path: Path,
) -> None:
    own_namespace = ("unshare", "--map-root-user", "--mount")
    mount = ("mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(tmp_path))
    if shutil.which("unshare") is None or shutil.which("mount") is None:
        pytest.skip("this system has no unshare or no mount command to make a small disk with")
    trial = subprocess.run(
        [*own_namespace, *mount], capture_output=True, text=True, timeout=30, check=False
    )
    if trial.returncode != 0:
        pytest.skip(f"this user may not mount a small disk: {trial.stderr.strip()}")
    script = 'mount -t tmpfs -o size=3m tmpfs "$0" && exec "$@"'
    before = (*own_namespace, "sh", "-c", script, str(tmp_path))
    report = run_program("full_disk", str(tmp_path / "c"), before=before)
    assert "Free some space on this disk (" in report["message"]
    assert report["refused"] >= 3
    assert report["saved"] >= 3
    assert report["read_only"]
