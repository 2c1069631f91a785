"""A checkpoint of any layout loads into any other: every bit, and the next step.

Real processes over gloo: world 1, 2, 4 x experts over 1, 2, 4 x ZeRO 0 to 3 is 24 layouts. Each
saves; each loads what others saved, saves it again (the bits must be the same), takes a step and
saves that (the numbers must be those of the layout that saved, a step later). `make test` loads two
others into each of 14 layouts, of four processes two; `make test-long` all pairs of the 24.
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks
from reshard_on_ranks import Task

pytestmark = pytest.mark.slow

WORKER = Path(__file__).with_name("reshard_on_ranks.py")
SIZES = {1: (1,), 2: (1, 2), 4: (1, 2, 4)}  # processes: sizes of an expert group
TASKS = {
    world: [
        Task(f"world{world}-experts{size}-zero{stage}", size, stage)
        for size in sizes
        for stage in (0, 1, 2, 3)
    ]
    for world, sizes in SIZES.items()
}
QUICK = {**TASKS, 4: [Task("world4-experts2-zero1", 2, 1), Task("world4-experts4-zero3", 4, 3)]}
NUM_STRIDE = 5  # prime to 14: so every layout is loaded by two others
# float32 has 24 bits, 6e-8; sums in another order differ by a few of these
RELATIVE = 1e-6


@pytest.fixture(scope="module")
def saves(short_documents: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("saves")
    run_all(QUICK, short_documents, made, made)
    return made


def names_of(tasks: dict[int, list[Task]]) -> list[str]:
    return [task.name for some in tasks.values() for task in some]


def run_all(tasks: dict[int, list[Task]], data_dir: Path, saves: Path, output: Path) -> None:
    for world, some in tasks.items():
        arguments = [str(data_dir), str(saves), str(output)]
        arguments.append(json.dumps([asdict(task) for task in some]))
        logs = output / f"logs-{world}"
        logs.mkdir()
        run_ranks([sys.executable, str(WORKER), *arguments], world, cwd=logs, timeout=1500)


def with_sources(
    tasks: dict[int, list[Task]], sources_of: dict[str, list[str]]
) -> dict[int, list[Task]]:
    return {
        world: [
            Task(t.name, t.expert_parallel_size, t.zero_stage, tuple(sources_of[t.name]))
            for t in some
        ]
        for world, some in tasks.items()
    }


def read(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / f"{name}.json").read_text())


def check_pairs(saves: Path, output: Path, sources_of: dict[str, list[str]]) -> None:
    for name, sources in sources_of.items():
        found = read(output, name)
        assert sorted(found) == sorted(sources)
        for source, record in found.items():
            pair = f"{source} -> {name}"
            assert record["differing"] == [], pair
            expected = read(saves, source)["next"]
            for key in ("loss", "grad_norm"):
                assert record[key] == pytest.approx(expected[key], rel=RELATIVE), f"{pair}: {key}"
            assert record["worst"] <= RELATIVE, f"{pair}: {record['worst']:.1e}"
            # without ZeRO every process has all it computes with, and reads it
            if "zero0" not in name:
                num_elements = sum(math.prod(shape) for shape in record["shapes"].values())
                assert record["num_read"] == num_elements, f"{pair}: each element by one process"
            experts = {n: s for n, s in record["shapes"].items() if ".experts." in n}
            assert len(experts) == 2 * 2  # gate_up and down of each layer
            assert all(shape[0] == 8 for shape in experts.values())  # every expert


def test_each_layout_loads_two_others(short_documents: Path, saves: Path, tmp_path: Path) -> None:
    names = names_of(QUICK)
    sources_of = {
        name: [names[(place * NUM_STRIDE + shift) % len(names)] for shift in (1, 3)]
        for place, name in enumerate(names)
    }
    assert {source for some in sources_of.values() for source in some} == set(names)
    assert all(name not in some for name, some in sources_of.items())
    run_all(with_sources(QUICK, sources_of), short_documents, saves, tmp_path)
    check_pairs(saves, tmp_path, sources_of)


@pytest.mark.long
@pytest.mark.timeout(3000)
def test_each_layout_loads_every_other(short_documents: Path, tmp_path: Path) -> None:
    saves, loads = tmp_path / "saves", tmp_path / "loads"
    saves.mkdir()
    loads.mkdir()
    run_all(TASKS, short_documents, saves, saves)
    sources_of = dict.fromkeys(names_of(TASKS), names_of(TASKS))
    run_all(with_sources(TASKS, sources_of), short_documents, saves, loads)
    check_pairs(saves, loads, sources_of)
