"""What a save after a signal can take, and when a run says that its notice is too short."""

from __future__ import annotations

import pytest

from moe.train.notice import NOTICE_VARIABLE, NoticeSink, notice_of_scheduler, pace_of

STEP = {"kind": "train", "step_seconds": 20.0}
SAVE = {"kind": "checkpoint", "checkpoint/write_seconds": 90.0}


def test_a_step_and_two_saves_must_fit() -> None:
    assert pace_of([STEP, {**STEP, "step_seconds": 3.0}, SAVE]).seconds_needed == 200.0
    assert pace_of([STEP]).seconds_needed == 0.0
    quick = [{**SAVE, "checkpoint/write_seconds": 1.0}] * 10
    assert pace_of([STEP, SAVE, *quick]).seconds_needed == 22.0  # the disk has become faster


def test_a_notice_that_became_too_short_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    sink = NoticeSink(150.0)
    for record in (STEP, {**SAVE, "checkpoint/write_seconds": 60.0}):
        sink.write(1, record)
    assert capsys.readouterr().out == ""
    for record in (SAVE, SAVE):
        sink.write(2, record)
    assert capsys.readouterr().out.count("launcher.signal_seconds=301") == 1


def test_the_batch_script_says_how_long_the_notice_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(NOTICE_VARIABLE, raising=False)
    assert notice_of_scheduler() == 0.0
    monkeypatch.setenv(NOTICE_VARIABLE, "120")
    assert notice_of_scheduler() == 120.0
