"""Two ranks killed by SIGKILL anywhere, and started again, end bitwise as ranks never killed.

Each kill is aimed: in a step, in a save at each of its stages, in the recovery from a kill before,
at the end. killed_ranks.py holds the aim, traps.py the places.
"""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from killed_ranks import (
    AFTER_A_START,
    AT_THE_END,
    NUM_STEPS,
    Pool,
    Run,
    Sprung,
    assert_one_run,
    draw,
    pool_of_ranks,
    table_of_places,
)
from same_run import assert_same_run
from traps import Trap

SEED = int(os.environ.get("PHIMOE_KILL_SEED", "20261121"))
_KILLS_OF_A_RUN = 6
FIFTY = {
    "forward": 4, "backward": 4, "update": 4,
    "copying tensors": 5, "writing a file": 7, "before the rename": 5, "after the rename": 4,
    "removing an old one": 3,
    "build model": 2, "reading a checkpoint": 3, "load parameters": 3, "mending metrics.jsonl": 2,
    "removing leftovers": 2,
    "write sample": 1, "replacing sample.txt": 1,
}  # fmt: skip
# leaves a checkpoint, a torn one, and steps after it: what every recovery needs
LEAVES_ALL = Trap("before the rename", rank=0, occurrence=2)


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with pool_of_ranks() as started:
        yield started


@pytest.fixture(scope="module")
def reference(
    pool: Pool, short_documents: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[int], Run]:
    """Call reference(zero_stage): the run that was never killed."""
    made: dict[int, Run] = {}

    def of(zero_stage: int) -> Run:
        if zero_stage not in made:
            folder = tmp_path_factory.mktemp(f"reference{zero_stage}")
            made[zero_stage] = Run(folder, short_documents, zero_stage, write_delay_seconds=0.0)
            made[zero_stage].to_the_end(pool)
        return made[zero_stage]

    return of


@pytest.mark.slow
def test_two_ranks_killed_four_times_end_bitwise_as_ranks_never_killed(
    pool: Pool, reference: Callable[[int], Run], short_documents: Path, tmp_path: Path
) -> None:
    run = Run(tmp_path, short_documents, zero_stage=2)
    kills = [
        run.kill(pool, Trap("writing a file", rank=1, occurrence=5)),
        run.kill(pool, Trap("backward", rank=0, occurrence=11, fraction=0.5, victim="other")),
        run.kill(pool, Trap("reading a checkpoint", rank=1, occurrence=4, victim="both")),
        run.kill(pool, Trap("before the rename", rank=0, occurrence=2)),
    ]
    run.to_the_end(pool)
    assert kills[0].step_after == 0  # nothing to resume from
    assert kills[0].thread == "other"  # in the background
    assert kills[1].step_after > 0
    assert kills[3].detail.endswith(f"step_{kills[3].step_after + 2:08d}")
    assert run.log.read_text().count("resume: ") == 2
    assert_same_run(run.run_dir, reference(2).run_dir, num_steps=NUM_STEPS)
    assert_one_run(run)


@pytest.mark.long
@pytest.mark.timeout(3000)
def test_two_ranks_killed_fifty_times_end_bitwise_as_ranks_never_killed(
    pool: Pool, reference: Callable[[int], Run], short_documents: Path, tmp_path: Path
) -> None:
    chance = random.Random(SEED)
    places = [place for place, count in FIFTY.items() for _ in range(count)]
    chance.shuffle(places)
    traps = [draw(place, chance) for place in places]
    kills: list[Sprung] = []
    number = 0
    while traps:
        run = Run(tmp_path / f"run{number}", short_documents, zero_stage=number % 4)
        kills += kill_until_full(run, pool, traps)
        run.to_the_end(pool)
        assert_same_run(run.run_dir, reference(number % 4).run_dir, num_steps=NUM_STEPS)
        assert_one_run(run)
        number += 1
    print(f"\nseed {SEED}: {len(kills)} kills in {number} runs, all bitwise the run never killed")
    print(table_of_places(kills))
    assert sum(FIFTY.values()) == 50 <= len(kills)
    assert {kill.trap.place for kill in kills} == set(FIFTY)


def kill_until_full(run: Run, pool: Pool, traps: list[Trap]) -> list[Sprung]:
    """Kill the run in one after the other of the traps that it will come to; takes them out."""
    kills: list[Sprung] = []
    while traps and len(kills) < _KILLS_OF_A_RUN:
        fitting = [trap for trap in traps if run.can_spring(trap)]
        if not fitting and kills:
            break
        # after a kill while it trained, one in the recovery from that, if there is one left
        wants = AFTER_A_START if kills and kills[-1].trap.place not in AFTER_A_START else ()
        fitting.sort(key=lambda trap: (trap.place in AT_THE_END, trap.place not in wants))
        trap = fitting[0] if fitting else LEAVES_ALL
        if fitting:
            traps.remove(trap)
        kills.append(run.kill(pool, trap))
    return kills


@pytest.mark.long
@pytest.mark.timeout(900)
def test_ranks_whose_launcher_is_killed_end_bitwise_as_ranks_never_killed(
    pool: Pool, reference: Callable[[int], Run], short_documents: Path, tmp_path: Path
) -> None:
    """Ranks that train save then. Last, a rank is killed: the launcher itself starts it again."""
    run = Run(tmp_path, short_documents, zero_stage=2)
    in_step = Trap("backward", rank=1, occurrence=9, fraction=0.5, victim="launcher")
    assert run.launch(in_step) == -signal.SIGKILL, run.log.read_text()
    killed_in = int(run.notes()[0]["detail"].split()[1].rstrip(","))
    assert killed_in <= run.step <= killed_in + 1
    in_save = Trap("writing a file", rank=1, occurrence=3, victim="launcher")
    before = run.step
    assert run.launch(in_save) == -signal.SIGKILL, run.log.read_text()
    assert run.step > before
    in_recovery = Trap("reading a checkpoint", rank=0, occurrence=3, victim="launcher")
    before = run.step
    assert run.launch(in_recovery) == -signal.SIGKILL, run.log.read_text()
    assert run.step >= before  # they had trained nothing yet
    last = Trap("before the rename", rank=0, occurrence=2, victim="other")
    assert run.launch(last) == 0, run.log.read_text()
    said = run.log.read_text()
    assert "launcher: rank 1 ended with signal 9 (SIGKILL)" in said
    assert said.count("resume: ") >= 3  # two starts and a restart
    assert_same_run(run.run_dir, reference(2).run_dir, num_steps=NUM_STEPS)
    assert_one_run(run)
