"""Restored generators continue bitwise, and wrong content changes none of them."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

import numpy
import pytest
import torch

from moe.errors import CheckpointError
from moe.train.random_state import capture_random_state, restore_random_state


def draw() -> list[Any]:
    return [
        [random.random() for _ in range(700)],  # more than the 624 words of the state
        [random.gauss(0, 1) for _ in range(3)],
        numpy.random.random(700).tolist(),
        numpy.random.standard_normal(3).tolist(),
        torch.rand(700).tolist(),
        torch.randn(3).tolist(),
        torch.randperm(50).tolist(),
        torch.nn.functional.dropout(torch.ones(100), 0.5).tolist(),
    ]


def through_json(state: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(state))


@pytest.mark.parametrize("odd", [False, True], ids=["fresh", "half a gaussian pair drawn"])
def test_every_generator_continues_bitwise(odd: bool) -> None:
    random.seed(1)
    numpy.random.seed(2)
    torch.manual_seed(3)
    if odd:  # each of these keeps its pair's other half in the state
        random.gauss(0, 1)
        numpy.random.standard_normal()
        torch.randn(1)
    state = through_json(capture_random_state())
    expected = draw()
    assert draw() != expected
    restore_random_state(state)
    assert draw() == expected


def test_capturing_changes_no_generator() -> None:
    torch.manual_seed(3)
    first = capture_random_state()
    assert capture_random_state() == first


def changed(path: str, value: Any) -> dict[str, Any]:
    state = copy.deepcopy(capture_random_state())
    *folders, last = path.split(".")
    inner: Any = state
    for name in folders:
        inner = inner[name]
    if value is KeyError:
        del inner[last]
    else:
        inner[last] = value
    return state


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("python", KeyError),
        ("python.version", 2),
        ("python.words", [1, 2]),
        ("python.words", [-1] * 625),
        ("python.words", [2**40] * 625),
        ("python.words", [1] * 624 + [999]),
        ("python.words", None),
        ("numpy", None),
        ("numpy.generator", "PCG64"),
        ("numpy.words", [0] * 10),
        ("numpy.words", ["x"] * 624),
        ("numpy.words", [-1] * 624),
        ("numpy.position", 10**6),
        ("numpy.position", -1),
        ("numpy.has_gauss", "no"),
        ("numpy.gauss", "x"),
        ("torch_cpu", "zz"),
        ("torch_cpu", "00"),
        ("torch_cpu", "ff" * 5056),
        ("torch_cpu", ""),
        ("torch_cpu", 5),
        ("torch_cpu", KeyError),
        ("torch_cuda", "zz"),
        ("torch_cuda", 3),
    ],
)
def test_wrong_content_is_one_error_and_changes_no_generator(path: str, value: Any) -> None:
    random.seed(11)
    numpy.random.seed(11)
    torch.manual_seed(11)
    wrong = changed(path, value)
    random.seed(9)
    numpy.random.seed(9)
    torch.manual_seed(9)
    before = capture_random_state()
    with pytest.raises(CheckpointError, match=r"random state: .* resume from another"):
        restore_random_state(wrong)
    assert capture_random_state() == before


@pytest.mark.parametrize("content", [None, [], "text", {}, 3])
def test_something_else_is_refused(content: Any) -> None:
    with pytest.raises(CheckpointError, match="random state"):
        restore_random_state(content)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device")
def test_cuda_generators_continue_bitwise() -> None:
    torch.cuda.manual_seed_all(5)
    state = through_json(capture_random_state())
    expected = torch.rand(1000, device="cuda").cpu()
    restore_random_state(state)
    assert torch.equal(torch.rand(1000, device="cuda").cpu(), expected)
