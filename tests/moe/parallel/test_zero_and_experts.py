"""ZeRO 0 to 3 times experts over 1, 2 or 4 processes: the training of one process.

Real processes over gloo, float32, DeepSpeed's engine, with accumulation, clipping, balance and z
losses, sampling and input jitter: loss and gradient norm of every step, and every parameter after
five steps.
"""

from __future__ import annotations

import json
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
LAYOUTS = [(w, size, stage) for w, sizes in SIZES.items() for size in sizes for stage in STAGES]
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
        output = made / str(world_size)
        output.mkdir()
        command = [sys.executable, str(WORKER), str(short_documents), str(output)]
        run_ranks([*command, json.dumps(cases)], world_size, cwd=output)
    return made


def steps_of(folder: Path, layout: tuple[int, int, int], *, rank: int = 0) -> list[dict[str, Any]]:
    world_size, size, stage = layout
    path = folder / str(world_size) / f"{size}-{stage}.rank{rank}.json"
    return json.loads(path.read_text())["steps"]


def parameters_of(folder: Path, layout: tuple[int, int, int]) -> dict[str, Tensor]:
    """Every parameter, experts in their order; the ranks that hold the same agree bit by bit."""
    world_size, size, stage = layout
    ranks = [
        load_file(folder / str(world_size) / f"{size}-{stage}.rank{rank}.safetensors")
        for rank in range(world_size)
    ]
    for rank, tensors in enumerate(ranks):
        for name, tensor in tensors.items():
            twin = ranks[rank % size if ".experts." in name else 0]
            assert torch.equal(tensor, twin[name]), (rank, name)
    return {
        name: torch.cat([ranks[place][name] for place in range(size)])
        if ".experts." in name
        else tensor
        for name, tensor in ranks[0].items()
    }


@pytest.mark.parametrize("layout", LAYOUTS, ids="world{0[0]}-experts{0[1]}-zero{0[2]}".format)
def test_every_layout_trains_as_one_process_does(folder, layout):
    one, mine = steps_of(folder, (1, 1, 0)), steps_of(folder, layout)
    assert min(step["grad_norm"] for step in one) > 0.5  # clipping was on
    for expected, got in zip(one, mine, strict=True):
        for key in ("loss", "balance", "z", "grad_norm"):
            assert got[key] == pytest.approx(expected[key], rel=RELATIVE), key
        assert got["load_LE"] == expected["load_LE"]
    expected, got = (parameters_of(folder, where) for where in ((1, 1, 0), layout))
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (got[name] - tensor).abs().max() <= RELATIVE * tensor.abs().max(), name
