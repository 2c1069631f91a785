"""Plain modules of this folder are importable by its tests; one thread; poisoned memory."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

# importlib mode puts no folder of tests on the path
sys.path.insert(0, str(Path(__file__).parent))

from poisoned_memory import poison


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """The tensors are tiny: on a busy machine several threads only wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    """Every test draws the same numbers in whatever order they run: bounds are of roundings."""
    torch.manual_seed(0)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that is never written shows as NaN, or as a number that is no index."""
    poison(monkeypatch)
