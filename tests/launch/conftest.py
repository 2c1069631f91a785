"""Plain modules of this folder and the launchers are importable by its tests."""

from __future__ import annotations

import sys
from pathlib import Path

_HERE = Path(__file__).parent
# importlib mode puts no folder of tests on the path
sys.path += [str(_HERE), str(_HERE / "two_node_slurm"), str(_HERE.parents[1] / "launch")]
