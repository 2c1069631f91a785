"""Numbers of a kill loop from a history made by hand, and the program itself for some seconds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from recovery_numbers import Kill, Line, Outcome, outcomes, summary, table

ROOT = Path(__file__).parents[2]
_STEP = "step {}/1000000  loss 6.9  lr 1e-3"
_AGAIN = (
    "launcher: rank 1 ended with signal 9 (SIGKILL). All ranks start again from the newest "
    "checkpoint (restart {} of 1000)."
)


def start(seconds: float, step: int, *, resumed: int | None) -> list[Line]:
    """What a start says up to its first step; metrics.jsonl is cut back to where it resumed."""
    texts = [] if resumed is None else [f"resume: runs/a/checkpoints/x, step {resumed} of 1000000"]
    texts += ["model: nano_moe, 454,656 parameters", "run folder: runs/a"]
    lines = [Line(seconds, text, 99) for text in texts]
    return [*lines, Line(seconds + 1, _STEP.format(step), step)]


def restart(seconds: float, number: int, *, reached: int) -> Line:
    return Line(seconds, _AGAIN.format(number), reached)


def test_each_kill_is_told_with_its_recovery_and_the_steps_that_it_cost() -> None:
    lines = [
        *start(8, 1, resumed=None),
        restart(20.5, 1, reached=27),
        *start(28, 21, resumed=20),
        restart(40.5, 2, reached=35),
        restart(46.5, 3, reached=35),
        *start(55, 21, resumed=20),
        restart(70.5, 4, reached=44),
    ]
    kills = [Kill(20, 1), Kill(40, 0), Kill(46, 1), Kill(70, 0)]
    assert outcomes(kills, lines) == [
        Outcome(kills[0], True, 0.5, 9, 7),
        Outcome(kills[1], True, 0.5, None, None),  # another came before it was over
        Outcome(kills[2], False, 0.5, 10, 15),  # with what the one before cost
        Outcome(kills[3], True, 0.5, None, None),  # nobody trained again
    ]


def test_steps_lost_are_those_from_the_first_where_nothing_was_saved() -> None:
    lines = [*start(8, 1, resumed=None), restart(12, 1, reached=6), *start(20, 1, resumed=None)]
    assert outcomes([Kill(11, 0)], lines) == [Outcome(Kill(11, 0), True, 1, 10, 6)]


def test_a_start_cut_back_the_record_before_it_was_killed_and_no_step_is_forgotten() -> None:
    lines = [
        *start(8, 1, resumed=None),
        restart(20, 1, reached=27),
        restart(30, 2, reached=20),  # the first restart had already dropped 21 to 27
        *start(38, 21, resumed=20),
    ]
    told = outcomes([Kill(19, 0), Kill(29, 0)], lines)
    assert [outcome.lost_steps for outcome in told] == [None, 7]


def test_effective_time_counts_the_steps_of_the_finished_run_once() -> None:
    told = [Outcome(Kill(20, 1), True, 0.4, 9.0, 7), Outcome(Kill(40, 1), False, 0.6, 5.0, 3),
            Outcome(Kill(60, 1), True, None, None, None)]  # fmt: skip
    records = [{"step_seconds": 0.5} for _ in range(40)]
    row = summary(told, records, wall_seconds=80.0)
    assert row["effective_time"] == 20.0 / 80.0
    assert row["recovery_median_seconds"] == 7.0
    assert row["found_median_seconds"] == 0.5
    assert row["recovery_p95_seconds"] == 9.0
    assert (row["lost_steps"], row["steps"], row["kills"]) == (10, 40, 3)
    assert (row["kills_while_starting"], row["kills_before_the_first_step_again"]) == (1, 1)
    [heads, values] = table(row | {"is_bitwise_equal": True})
    assert "effective time" in heads
    assert "25.0%" in values
    assert len(heads) == len(values)


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_short_kill_loop_loses_no_bit(tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch/measure_recovery.py"), "--seconds", "60",
         "--between", "20", "--seed", "1", "--json", str(result), "train.save_every=5"],
        cwd=tmp_path, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    row = json.loads(result.read_text())
    assert row["is_bitwise_equal"] is True
    assert row["kills"] == len(row["each_kill"]) >= 2
    assert row["recovery_median_seconds"] > 0
    assert 0 < row["effective_time"] < 1
    assert row["steps"] >= 1
