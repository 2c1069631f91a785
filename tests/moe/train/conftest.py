"""Plain modules of this folder and of parallel/ are importable; checkpoints to damage."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

# importlib mode puts no folder of tests on the path
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "parallel")]


@pytest.fixture
def root(template: Path, tmp_path: Path) -> Path:
    """A copy of the test file's `template`, which holds the steps 100 and 200."""
    return shutil.copytree(template, tmp_path / "checkpoints")


@pytest.fixture
def newest(root: Path) -> Path:
    return root / "step_00000200"
