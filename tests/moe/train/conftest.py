"""Plain modules of this folder are importable by its tests; the mark of its longest tests."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

# importlib mode puts no folder of tests on the path
sys.path.insert(0, str(Path(__file__).parent))


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "long: about a minute in all, left out of make test")
