"""launch/measure_preparation.py: two MB of text, killed in every stage, to the same bytes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

COMMAND = Path(__file__).parents[2] / "launch/measure_preparation.py"


@pytest.mark.slow
def test_a_preparation_killed_in_every_stage_has_the_same_bytes(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(COMMAND), "--megabytes", "2", "--folder", str(tmp_path),
         "--processes", "1"],
        capture_output=True, text=True, timeout=250,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "the same bytes"
    assert done.stdout.count("killed: killed") >= 5
    assert list(tmp_path.iterdir()) == []
