"""Plain modules of this folder and the launchers are importable by its tests; a place to run."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

_HERE = Path(__file__).parent
# importlib mode puts no folder of tests on the path
sys.path += [str(_HERE), str(_HERE / "two_node_slurm"), str(_HERE.parents[1] / "launch")]


@pytest.fixture
def place(workplace, tmp_path: Path) -> Path:
    """A folder with a copy of the prepared data, to run in."""
    shutil.copytree(workplace.folder / "data", tmp_path / "data")
    return tmp_path
