"""Plain modules of this folder are importable by its tests; one thread, as in tests of moe."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

# importlib mode puts no folder of tests on the path
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """The models are tiny: on a busy machine several threads only wait for each other."""
    torch.set_num_threads(1)
