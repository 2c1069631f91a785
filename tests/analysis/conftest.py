"""Plain modules of this folder are importable by its tests."""

from __future__ import annotations

import sys
from pathlib import Path

# importlib mode puts no folder of tests on the path
sys.path.insert(0, str(Path(__file__).parent))
