"""Modules of this folder and of tests/kernels are importable; poisoned memory; memory given back.

Needs torch, triton, numpy and pytest alone.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    # before any kernel is defined: Triton then interprets them on CPU tensors
    os.environ.setdefault("TRITON_INTERPRET", "1")

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
# importlib mode puts no folder of tests on the path
for folder in (HERE, HERE.parent / "kernels", ROOT, ROOT / "kernels"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

from poisoned_memory import poison  # noqa: E402 the path comes first


def pytest_addoption(parser: pytest.Parser) -> None:
    """--part 0/4: every fourth test, so that several processes compile kernels at once."""
    parser.addoption("--part", default="0/1", help="N/M: the tests N, N + M, N + 2M, ...")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the tests of the other parts, visibly: they count as deselected."""
    part, parts = (int(number) for number in config.getoption("--part", "0/1").split("/"))
    others = [item for index, item in enumerate(items) if index % parts != part]
    if others:
        config.hook.pytest_deselected(items=others)
        items[:] = items[part::parts]


@pytest.fixture(scope="session")
def dynamo_knows_torch() -> None:
    """torch.compile lists torch's functions once, by identity: before any of them is replaced."""
    torch.compile(torch.neg, backend="eager")(torch.ones(1))


@pytest.fixture
def poisoned(dynamo_knows_torch: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that is never written shows as NaN, or as a number that is no index."""
    poison(monkeypatch)


@pytest.fixture
def gives_memory_back() -> Iterator[None]:
    """For tests of many gigabytes: what they held is free for the next one, and for others."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    yield
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
