"""launch/measure_trace.py: what it measures of a small trace, and what it calls too much."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from measure_trace import MOST_BYTES, MOST_SECONDS, beyond_limits, shapes
from random_trace import write_random_trace

from moe.trace.batch import join_rows
from moe.trace.read import open_trace


@pytest.mark.slow
def test_a_small_measurement_has_every_stage_and_says_what_is_beyond(command, tmp_path) -> None:
    output = tmp_path / "new/result.json"
    done = command(
        "measure_trace", "--tokens", "3000", "--rounds", "1", "--passes", "1",
        "--json", str(output), "--folder", str(tmp_path), cwd=tmp_path,
    )  # fmt: skip
    result = json.loads(output.read_text())
    problems = beyond_limits(result)
    assert done.returncode == (1 if problems else 0), done.stderr
    assert done.stdout.count("beyond the limit: ") == len(problems)
    assert not [p for p in problems if not p.startswith("recording")]  # a moment's noise
    assert [trace["num_layers"] for trace in result["traces"]] == [32, 4, 4]
    names = [[stage["stage"] for stage in trace["stages"]] for trace in result["traces"]]
    assert [len(stages) for stages in names] == [9, 12, 2]
    assert names[1][-1] == "stability between two checkpoints"
    for trace in result["traces"]:
        assert trace["num_tokens"] == 3000
        assert trace["seconds"] == pytest.approx(sum(s["seconds"] for s in trace["stages"]))
        assert 50e6 < trace["peak_bytes"] < MOST_BYTES
        assert f"{trace['name']}: 3,000 tokens" in done.stdout
    assert [row["logits"] for row in result["recording"]] == [False, True]
    assert result["recording"][1]["bytes_a_token"] > result["recording"][0]["bytes_a_token"]
    assert len(list(tmp_path.iterdir())) == 1  # the traces are gone


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_ten_million_tokens_are_within_the_limits(command, tmp_path) -> None:
    output = tmp_path / "result.json"
    done = command(
        "measure_trace", "--rounds", "1", "--json", str(output), cwd=tmp_path, timeout=1700
    )
    assert "Traceback" not in done.stderr, done.stderr
    assert not [p for p in beyond_limits(json.loads(output.read_text())) if "recording" not in p]


def test_what_is_too_slow_or_too_large_is_named() -> None:
    fine = {"name": "a", "seconds": MOST_SECONDS, "peak_bytes": MOST_BYTES}
    recording = {"logits": True, "wall": {"median": 0.03}}
    assert beyond_limits({"traces": [fine], "recording": [recording]}) == []
    over = {
        "traces": [fine | {"seconds": 60.1}, fine | {"peak_bytes": 2.5e9}],
        "recording": [{"logits": True, "wall": {"median": 0.041}}],
    }
    assert beyond_limits(over) == [
        "a: 60.1 s; allowed 60", "a: 2.50 GB; allowed 2", "recording with logits: 4.10%; allowed 3%"
    ]  # fmt: skip


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_random_trace_is_one_that_can_be_read(number: int, tmp_path: Path) -> None:
    shape = shapes(1005)[number]
    write_random_trace(tmp_path / "trace", shape)
    trace = open_trace(tmp_path / "trace")
    assert (trace.info.layout, trace.info.num_tokens) == (shape.layout, 1005)
    rows = join_rows(list(trace.batches()))
    expert_TLK = rows.expert_TLK
    assert rows.num_rows == 1005
    assert (expert_TLK[..., 0] != expert_TLK[..., 1]).all()
    assert expert_TLK.min() >= 0
    assert set(expert_TLK.ravel()) == set(range(16))


def test_numbers_that_make_no_sense_are_refused(command, tmp_path) -> None:
    done = command("measure_trace", "--tokens", "10", cwd=tmp_path)
    assert done.returncode == 2
    assert "--tokens: got 10; it must be at least 1000" in done.stderr
