"""Experts over 1, 2 and 4 processes: the layer of one process, and not a byte more than needed.

Real processes over gloo, in float64; ranks have 7, 0, 12 and 5 tokens.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from safetensors.torch import load_file
from torch import Tensor

from moe.parallel.expert_parallel import make_expert_groups
from moe.parallel.processes import Processes

WORKER = Path(__file__).with_name("experts_on_ranks.py")
LAYOUTS = [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4)]  # processes, size of an expert group
SKEWS = [False, True]
# float64; sums over ranks are in another order
RELATIVE = 1e-12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("experts")
    for world_size in (1, 2, 4):
        cases = [
            {"name": f"{size}-{skew}", "size": size, "skew": skew}
            for world, size in LAYOUTS
            for skew in SKEWS
            if world == world_size
        ]
        output = made / str(world_size)
        output.mkdir()
        command = [sys.executable, str(WORKER), str(output), json.dumps(cases)]
        run_ranks(command, world_size, cwd=output)
    return made


class Layout:
    """What the ranks of one layout wrote, put together."""

    def __init__(self, folder: Path, world_size: int, size: int, skew: bool) -> None:
        paths = [folder / str(world_size) / f"{size}-{skew}.rank{r}" for r in range(world_size)]
        self.size = size
        self.records: list[dict[str, Any]] = [
            json.loads(Path(f"{path}.json").read_text()) for path in paths
        ]
        self._tensors = [load_file(f"{path}.safetensors") for path in paths]

    def of_tokens(self, name: str) -> Tensor:
        return torch.cat([tensors[name] for tensors in self._tensors])

    def of_router(self) -> Tensor:
        return sum(tensors["router.weight"] for tensors in self._tensors)  # type: ignore[return-value]

    def of_experts(self, name: str) -> Tensor:
        """Gradients of experts 0 to 7: summed over ranks that hold the same ones."""
        places = [
            sum(self._tensors[rank][name] for rank in range(place, len(self._tensors), self.size))
            for place in range(self.size)
        ]
        return torch.cat(places)  # type: ignore[arg-type]


def assert_close(got: Tensor, expected: Tensor) -> None:
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= RELATIVE * expected.abs().max()


@pytest.mark.parametrize("skew", SKEWS, ids=["random", "all_to_one"])
@pytest.mark.parametrize(("world_size", "size"), LAYOUTS)
def test_outputs_and_all_gradients_are_those_of_one_process(folder, world_size, size, skew):
    alone = Layout(folder, 1, 1, skew)
    spread = Layout(folder, world_size, size, skew)
    for name in ("y", "x"):
        assert_close(spread.of_tokens(name), alone.of_tokens(name))
    assert_close(spread.of_router(), alone.of_router())
    for name in ("experts.gate_up", "experts.down"):
        assert_close(spread.of_experts(name), alone.of_experts(name))


@pytest.mark.parametrize("skew", SKEWS, ids=["random", "all_to_one"])
@pytest.mark.parametrize(("world_size", "size"), [(2, 2), (4, 2), (4, 4)])
def test_exactly_the_rows_of_other_processes_travel(folder, world_size, size, skew):
    """Dispatch and combine, forward and backward; counted where the exchange is called."""
    records = Layout(folder, world_size, size, skew).records
    for rank, record in enumerate(records):
        place = rank % size
        count_PE = torch.tensor(record["count_E"]).view(size, -1)
        assert record["sent_P"] == count_PE.sum(dim=1).tolist()
        others = [records[rank - place + p]["sent_P"][place] for p in range(size)]
        assert record["received_P"] == others
        row = 16 * 8  # D float64 numbers
        there = (sum(record["sent_P"]) - record["sent_P"][place]) * row
        back = (sum(others) - others[place]) * row
        assert record["expected"] == there
        assert record["moved"] == [there, back, there, back]


@pytest.mark.parametrize(("world_size", "size"), LAYOUTS)
def test_every_expert_is_held_once_in_every_group(folder, world_size, size):
    records = Layout(folder, world_size, size, False).records
    for first in range(0, world_size, size):
        group = records[first : first + size]
        assert [e for record in group for e in record["held"]] == list(range(8))


@pytest.mark.parametrize("rank", [0, 13, 511])
def test_a_rank_makes_its_own_two_groups_and_waits_for_their_members_only(
    rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[list[int]] = []

    def new_group(ranks: list[int], *, use_local_synchronization: bool) -> dist.ProcessGroup:
        assert use_local_synchronization
        made.append(ranks)
        return dist.ProcessGroup(0, 1)

    monkeypatch.setattr(dist, "new_group", new_group)
    groups = make_expert_groups(8, Processes(rank, 512, torch.device("cpu")))
    first = rank - rank % 8
    assert made == [list(range(first, first + 8)), list(range(rank % 8, 512, 8))]
    assert groups.place == rank % 8
