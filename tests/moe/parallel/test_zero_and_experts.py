"""ZeRO 0 to 3 times experts over 1, 2 or 4 processes: the training of one process.

Real processes over gloo, float32, DeepSpeed's engine, with accumulation, clipping, balance and z
losses, sampling and input jitter: loss and gradient norm of every step, and every parameter after
five steps.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file
from torch import Tensor

pytestmark = pytest.mark.slow

WORKER = Path(__file__).with_name("train_on_ranks.py")
SIZES = {1: (1,), 2: (1, 2), 4: (1, 2, 4)}  # processes: sizes of an expert group
STAGES = (0, 1, 2, 3)
Layout = tuple[int, int, int]
LAYOUTS = [(w, size, stage) for w, sizes in SIZES.items() for size in sizes for stage in STAGES]
# mistakes that people have made, and a stage to make each in
MUTATIONS = [
    ("expert gradients scaled by the group's size", 0),
    ("router gradient dropped", 2),
    ("balance loss counted twice", 3),
]
# float32 has 24 bits, 6e-8; sums in another order differ by a few of these
RELATIVE = 1e-6


@pytest.fixture(scope="module")
def folder(short_documents: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("layouts")
    for world_size in SIZES:
        cases = [
            {
                "name": f"{size}-{stage}",
                "micro_batch_size": 8 // world_size,
                "zero_stage": stage,
                "expert_parallel_size": size,
            }
            for world, size, stage in LAYOUTS
            if world == world_size
        ]
        if world_size == 2:
            cases += [
                {"name": mutation, "micro_batch_size": 4, "zero_stage": stage,
                 "expert_parallel_size": 2, "mutation": mutation}
                for mutation, stage in MUTATIONS
            ]  # fmt: skip
        output = made / str(world_size)
        output.mkdir()
        command = [sys.executable, str(WORKER), str(short_documents), str(output)]
        run_ranks([*command, json.dumps(cases)], world_size, cwd=output)
    return made


def steps_of(folder: Path, layout: Layout, *, rank: int = 0) -> list[dict[str, Any]]:
    world_size, size, stage = layout
    return steps_in(folder / str(world_size) / f"{size}-{stage}.rank{rank}.json")


def steps_in(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text())["steps"]


def tensors_of(folder: Path, layout: Layout) -> dict[str, Tensor]:
    """Every whole parameter and moment, put together from what the ranks hold.

    Every element is held by somebody, and those that hold the same agree bit by bit.
    """
    world_size, size, stage = layout
    whole: dict[str, Tensor] = {}
    for rank in range(world_size):
        held = load_file(folder / str(world_size) / f"{size}-{stage}.rank{rank}.safetensors")
        for key, values in held.items():
            stem, name, shape, start = key.split("|")
            sizes = [int(n) for n in shape.split(",")]
            flat = whole.setdefault(f"{stem} {name}", torch.full(sizes, math.nan)).view(-1)
            there = flat[int(start) : int(start) + len(values)]
            known = there.isfinite()
            assert torch.equal(there[known], values[known]), (rank, name)
            there.copy_(values)
    assert all(tensor.isfinite().all() for tensor in whole.values())
    return whole


@pytest.mark.parametrize("layout", LAYOUTS, ids="world{0[0]}-experts{0[1]}-zero{0[2]}".format)
def test_every_layout_trains_as_one_process_does(folder, layout):
    one, mine = steps_of(folder, (1, 1, 0)), steps_of(folder, layout)
    assert min(step["grad_norm"] for step in one) > 0.5  # clipping was on
    for expected, got in zip(one, mine, strict=True):
        for key in ("loss", "balance", "z", "grad_norm"):
            assert got[key] == pytest.approx(expected[key], rel=RELATIVE), key
        assert got["load_LE"] == expected["load_LE"]
    expected, got = (tensors_of(folder, where) for where in ((1, 1, 0), layout))
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (got[name] - tensor).abs().max() <= RELATIVE * tensor.abs().max(), name


@pytest.mark.parametrize("mutation", [mutation for mutation, _ in MUTATIONS])
def test_a_mistake_in_the_gradients_is_noticed(folder, mutation):
    one = steps_of(folder, (1, 1, 0))
    wrong = steps_in(folder / "2" / f"{mutation}.rank0.json")
    assert any(
        got[key] != pytest.approx(expected[key], rel=10 * RELATIVE)
        for expected, got in zip(one, wrong, strict=True)
        for key in ("loss", "balance", "grad_norm")
    )
