"""With ZeRO 3 a rank never holds the model, and starts with the numbers of one process."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file
from train_on_ranks import Case, config_of

from moe.model import init
from moe.model.transformer import build_model

WORKER = Path(__file__).with_name("start_on_ranks.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("start")
    run_ranks([sys.executable, str(WORKER), str(made)], 2, cwd=made)
    return made


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(init, "BLOCK_NUMBERS", 100)  # as the ranks have


def whole_model() -> torch.nn.Module:
    config = config_of(Case(name="start", micro_batch_size=4))
    return build_model(config.model, config.router, seed=3)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_holds_its_half_and_one_module_at_a_time(folder: Path, rank: int) -> None:
    held, num_drawn = json.loads((folder / f"rank{rank}.json").read_text())
    parameters = dict(whole_model().named_parameters())
    total = sum(p.numel() for p in parameters.values())
    largest = max(p.numel() for p in parameters.values())  # a module has a weight and a bias
    # experts are halved over the two ranks, the rest is partitioned; a bit more for rounding up
    assert held[-1] <= total / 2 + len(parameters)
    assert max(held) <= total / 2 + 1.01 * largest + len(parameters)
    assert max(held) < 0.8 * total
    assert num_drawn < 0.6 * total, "it draws its half, and the rest of the blocks at its ends"


def test_the_start_is_that_of_one_process(folder: Path) -> None:
    parameters = dict(whole_model().named_parameters())
    covered = dict.fromkeys(parameters, 0)
    for rank in range(2):
        for key, values in load_file(folder / f"rank{rank}.safetensors").items():
            stem, name, _, start = key.split("|")
            assert stem == "model"  # no moments before the first update
            there = parameters[name].detach().view(-1)[int(start) : int(start) + len(values)]
            assert torch.equal(values, there), name
            covered[name] += len(values)
    assert covered == {name: p.numel() for name, p in parameters.items()}
