"""The verdict over a table of ranks: who is named, when, and who is not."""

from __future__ import annotations

import pytest

from moe.parallel.watch_verdict import (
    AGREE_SECONDS,
    ECHO_SECONDS,
    Limits,
    RankState,
    Verdict,
    judge,
)

LIMITS = Limits(silent=10.0, stuck=100.0)
NOW = 1000.0
COLLECTIVE = ["train.py:1 in main", "lib/torch/distributed/distributed_c10d.py:9 in all_reduce"]
OWN_CODE = ["train.py:1 in main", "loader.py:7 in read"]


def _ranks(count: int = 3) -> list[RankState]:
    """Ranks that run well, all in phase "forward" of step 5."""
    return [
        RankState(rank, host=f"node{rank}", pid=100 + rank, step=5, order=0, phase="forward",
                  heard_at=NOW)
        for rank in range(count)
    ]  # fmt: skip


def _stuck(seconds: float, *places: tuple[int, int, str]) -> list[RankState]:
    table = _ranks(len(places))
    for state, (step, order, phase) in zip(table, places, strict=True):
        state.step, state.order, state.phase, state.stuck_seconds = step, order, phase, seconds
    return table


def _raised(state: RankState, error: str, *, ago: float, is_echo: bool = False) -> None:
    state.end, state.error, state.raised_at, state.is_echo = "raised", error, NOW - ago, is_echo


def _judge(table: list[RankState]) -> Verdict | None:
    return judge(table, now=NOW, limits=LIMITS)


def _found(table: list[RankState]) -> Verdict:
    verdict = _judge(table)
    assert verdict is not None
    return verdict


def test_ranks_that_run_are_left_alone() -> None:
    assert _judge(_ranks()) is None


def test_the_watch_is_over_when_all_are_done() -> None:
    table = _ranks()
    for state in table[:2]:
        state.end = "done"
    assert _judge(table) is None
    table[2].end = "done"
    assert _found(table) == Verdict("over")


def test_a_dead_rank_is_named_with_host_process_phase_and_step() -> None:
    table = _ranks()
    table[1].end = "died"
    assert _found(table).line == (
        "rank 1 (host node1, process 101) died in phase 'forward' of step 5; ending all ranks"
    )
    table[1].step = -1
    assert "in phase 'forward' before the first step" in _found(table).line


def test_the_record_says_of_each_rank_at_fault_where_it_was() -> None:
    table = _ranks()
    table[1].end = "died"
    assert _found(table).record(table)["ranks"] == [
        {
            "rank": 1, "host": "node1", "pid": 101, "step": 5, "phase": "forward",
            "seconds_still": 0.0, "frames": [],
        }
    ]  # fmt: skip


@pytest.mark.parametrize(("seconds", "is_found"), [(9.9, False), (10.0, True)])
def test_silence_is_judged_by_its_limit(seconds: float, is_found: bool) -> None:
    table = _ranks()
    table[2].silent_seconds = seconds
    verdict = _judge(table)
    assert (verdict is not None) == is_found
    if verdict is not None:
        assert (verdict.kind, verdict.ranks) == ("stopped", [2])
        assert "gave no sign of life for 10.0 s" in verdict.line
        assert "is stopped" not in verdict.line


@pytest.mark.parametrize(("seconds", "is_found"), [(9.9, False), (10.0, True)])
def test_a_guardian_that_is_not_heard_of_has_vanished(seconds: float, is_found: bool) -> None:
    table = _stuck(10.0, *[(5, 0, "forward")] * 3)
    table[2].heard_at = NOW - seconds
    verdict = _judge(table)
    assert (verdict is not None) == is_found
    if verdict is not None:
        assert (verdict.kind, verdict.ranks) == ("vanished", [2])


def test_while_the_other_ranks_move_on_a_lost_connection_is_no_lost_rank() -> None:
    table = _stuck(10.0, *[(5, 0, "forward")] * 3)
    for state in table[1:]:
        state.heard_at = NOW - 60.0  # the network of rank 0's host is gone
    table[0].stuck_seconds = 9.9
    assert _judge(table) is None
    table[0].stuck_seconds = 10.0
    assert (_found(table).kind, _found(table).ranks) == ("vanished", [1, 2])


def test_a_rank_that_is_done_may_be_silent() -> None:
    table = _ranks()
    table[2].end, table[2].heard_at, table[2].silent_seconds = "done", 0.0, 500.0
    table[2].stuck_seconds = 500.0
    assert _judge(table) is None


def test_a_hang_names_the_rank_of_an_earlier_step() -> None:
    verdict = _found(_stuck(100.0, (6, 0, "forward"), (5, 3, "save"), (6, 0, "forward")))
    assert (verdict.kind, verdict.ranks) == ("hung", [1])
    assert "rank 1 (host node1, process 101) hangs for 100.0 s in phase 'save'" in verdict.line
    assert "2 other ranks wait" in verdict.line


def test_a_hang_names_the_rank_of_an_earlier_phase() -> None:
    verdict = _found(_stuck(100.0, (5, 2, "update"), (5, 1, "backward"), (5, 1, "backward")))
    assert (verdict.kind, verdict.ranks) == ("hung", [1, 2])
    assert "1 other rank waits" in verdict.line


def test_ranks_that_wait_for_a_slow_one_are_not_stuck() -> None:
    table = _stuck(500.0, (5, 2, "update"), (5, 1, "backward"), (5, 2, "update"))
    table[1].stuck_seconds = 99.0
    assert _judge(table) is None


def test_finishing_may_stand_still_as_long_as_an_upload_may_take_and_no_longer() -> None:
    table = _stuck(250.0, (6, 0, "finishing"), (6, 0, "finishing"))
    assert _judge(table) is None
    for state in table:
        state.stuck_seconds = 300.0
    assert _found(table).kind == "hung"


def test_a_hang_of_all_in_one_phase_says_so() -> None:
    table = _stuck(100.0, (5, 1, "backward"), (5, 1, "backward"))
    table[0].frames = table[1].frames = COLLECTIVE
    verdict = _found(table)
    assert (verdict.kind, verdict.ranks) == ("hung", [0, 1])
    assert verdict.line.startswith("all 2 running ranks hang in phase 'backward' of step 5")
    assert verdict.line.count("distributed_c10d.py:9 in all_reduce") == 2


def test_in_one_phase_the_rank_outside_the_collective_is_named() -> None:
    table = _stuck(100.0, (5, 1, "backward"), (5, 1, "backward"), (5, 1, "backward"))
    table[0].frames = table[2].frames = COLLECTIVE
    table[1].frames = OWN_CODE
    verdict = _found(table)
    assert verdict.ranks == [1]
    assert "rank 1 is at loader.py:7 in read; 2 other ranks wait" in verdict.line


def test_a_rank_without_frames_holds_the_interpreter() -> None:
    table = _stuck(100.0, (5, 2, "update"), (5, 1, "backward"))
    assert "rank 1 runs no Python code: a call holds the interpreter" in _found(table).line


def test_an_error_that_another_rank_can_have_caused_waits_for_that_cause() -> None:
    table = _ranks()
    _raised(table[0], "RuntimeError: connection closed", ago=ECHO_SECONDS - 0.1, is_echo=True)
    assert _judge(table) is None
    table[1].end = "died"
    assert (_found(table).kind, _found(table).ranks) == ("died", [1])


def test_without_a_cause_the_error_itself_is_the_fault() -> None:
    table = _ranks()
    _raised(table[0], "RuntimeError: connection closed", ago=ECHO_SECONDS, is_echo=True)
    _raised(table[2], "RuntimeError: connection reset", ago=ECHO_SECONDS / 2, is_echo=True)
    verdict = _found(table)
    assert (verdict.kind, verdict.ranks) == ("raised", [0])
    assert "raised RuntimeError: connection closed in phase" in verdict.line


def test_a_collective_that_gave_up_names_the_rank_that_did_not_come() -> None:
    table = _stuck(50.0, (5, 2, "update"), (5, 1, "backward"))
    _raised(table[0], "RuntimeError: gloo timed out", ago=ECHO_SECONDS, is_echo=True)
    verdict = _found(table)
    assert (verdict.kind, verdict.ranks) == ("hung", [1])
    assert "rank 0 raised RuntimeError: gloo timed out" in verdict.line


def test_a_lone_error_is_judged_when_the_others_had_time_to_agree() -> None:
    table = _ranks()
    _raised(table[1], "ValueError: wrong", ago=AGREE_SECONDS - 0.1)
    assert _judge(table) is None
    table[1].raised_at -= 0.2
    assert (_found(table).kind, _found(table).ranks) == ("raised", [1])


def test_an_error_and_its_echo_are_judged_at_once() -> None:
    table = _ranks()
    _raised(table[1], "ValueError: wrong", ago=0.1)
    _raised(table[0], "RuntimeError: connection closed", ago=0.2, is_echo=True)
    assert (_found(table).kind, _found(table).ranks) == ("raised", [1])


def test_the_first_error_is_the_cause() -> None:
    table = _ranks()
    _raised(table[0], "RuntimeError: connection closed", ago=0.1, is_echo=True)
    _raised(table[1], "ValueError: late", ago=0.2)
    _raised(table[2], "ValueError: early", ago=0.3)
    assert _found(table).ranks == [2]


def test_errors_of_all_ranks_are_no_fault_of_one() -> None:
    table = _ranks()
    for state in table:
        _raised(state, "TrainingStopped: not finite", ago=0.1)
    assert _found(table) == Verdict("agreed")


def test_an_error_after_the_others_are_done_is_a_fault() -> None:
    table = _ranks()
    table[0].end = table[2].end = "done"
    _raised(table[1], "OSError: no space left", ago=0.0)
    assert (_found(table).kind, _found(table).ranks) == ("raised", [1])


def test_a_large_job_is_told_in_one_short_line() -> None:
    table = _ranks(512)
    for state in table[:500]:
        state.end = "died"
    line = _found(table).line
    assert "rank 7 " in line
    assert "rank 8 " not in line
    assert "and 492 more died" in line
    table = _stuck(100.0, *[(5, 1, "backward")] * 512)
    assert len(_found(table).line) < 1000
