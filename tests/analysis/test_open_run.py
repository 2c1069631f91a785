"""A run's folder is found and read, and what is missing or another's is said in one message."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from analysis.figure_trace import domain_figure, margin_figures
from analysis.open_run import (
    checkpoint_traces,
    find_run_folder,
    last_steps,
    open_run,
    recorded_routing,
    routing_to_show,
    traces_to_compare,
)
from analysis.routing_counts import count_routing
from moe.errors import DataError
from moe.trace.batch import join_rows
from moe.trace.read import open_trace

NO_VARIABLE: dict[str, str] = {}


def make_run(folder: Path, *, seconds: int) -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("")
    os.utime(folder / "metrics.jsonl", (seconds, seconds))
    return folder


def test_the_newest_run_is_taken_where_none_is_named(tmp_path: Path) -> None:
    make_run(tmp_path / "runs/nano/one", seconds=1000)
    newest = make_run(tmp_path / "runs/tiny/two", seconds=3000)
    make_run(tmp_path / "runs/nano/three", seconds=2000)
    assert find_run_folder(runs=tmp_path / "runs", environment=NO_VARIABLE) == newest


def test_what_is_named_comes_before_the_variable_and_that_before_the_newest(
    tmp_path: Path,
) -> None:
    one = make_run(tmp_path / "runs/one", seconds=1000)
    two = make_run(tmp_path / "runs/two", seconds=2000)
    make_run(tmp_path / "runs/three", seconds=3000)
    variable = {"PHIMOE_RUN": str(two)}
    assert find_run_folder(runs=tmp_path / "runs", environment=variable) == two
    assert find_run_folder(one, runs=tmp_path / "runs", environment=variable) == one


@pytest.mark.parametrize(
    ("run", "environment", "message"),
    [
        ("nowhere", {}, "RUN: 'nowhere' does not exist .*Train one with `make train`"),
        (None, {"PHIMOE_RUN": "nowhere"}, "PHIMOE_RUN: 'nowhere' does not exist"),
        ("empty", {}, "RUN: 'empty' holds no metrics.jsonl"),
        (None, {}, "there is no run below .*make train.*Set RUN in the first cell"),
    ],
)
def test_no_run_is_answered_with_what_makes_one(
    run: str | None, environment: dict[str, str], message: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=message):
        find_run_folder(run, runs=tmp_path / "runs", environment=environment)


def test_a_run_is_read_with_its_model_router_and_records(runs: Any) -> None:
    run = open_run(runs.sparse)
    assert (run.model.num_experts, run.model.num_layers, run.seq_len) == (16, 2, 64)
    assert (run.router.name, run.mask_threshold) == ("sparsemixer", 0.01)
    assert max(record["step"] for record in run.metrics) == 60


def test_a_damaged_configuration_is_named(runs: Any, tmp_path: Path) -> None:
    for text, message in (
        ("{", "is not the configuration"),
        ('{"model": {"num_layer": 2}, "router": {}, "name": "x"}', "model.num_layer: unknown key"),
        ("{}", "is not the configuration .*'model'"),
    ):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(DataError, match=message):
            open_run(tmp_path)
    with pytest.raises(DataError, match=r"config.json: cannot be read"):
        open_run(tmp_path / "nothing")


def test_a_dense_run_has_no_routing_to_show(runs: Any) -> None:
    run = open_run(runs.dense)
    for ask in (recorded_routing, checkpoint_traces, routing_to_show, traces_to_compare):
        with pytest.raises(DataError, match="nano_dense, which is dense"):
            ask(run)


def test_a_run_without_traces_or_recorded_routing_names_the_commands(runs: Any) -> None:
    run = open_run(runs.bare)
    with pytest.raises(DataError, match=r"python launch/trace.py run=\S+ target=\S+/traces/last"):
        routing_to_show(run)
    with pytest.raises(DataError, match=r"Train with train.trace_every=10"):
        recorded_routing(run)
    with pytest.raises(DataError, match=r"0 checkpoint\(s\)(.|\n)*for step in \S+/step_\*; do"):
        traces_to_compare(run)


def test_the_last_checkpoints_trace_is_shown_and_else_the_last_recorded_steps(
    runs: Any, tmp_path: Path
) -> None:
    trace, said = routing_to_show(open_run(runs.sparse))
    assert trace.folder == runs.sparse / "traces/step_00000060"
    assert "step 60 on train text" in said
    named, _ = routing_to_show(open_run(runs.sparse), runs.sparse / "traces/step_00000020")
    assert named.info.setting("step") == 20
    shutil.copytree(runs.sparse, tmp_path / "run", ignore=shutil.ignore_patterns("traces"))
    recorded, said = routing_to_show(open_run(tmp_path / "run"), num_steps=2)
    assert recorded.info.steps == (50, 60)
    assert set(join_rows(list(recorded.batches())).step_T.tolist()) == {50, 60}
    assert "training steps 50 to 60, 2 of them recorded" in said


def test_last_steps_leave_a_trace_of_documents_as_it_is(runs: Any) -> None:
    trace = open_trace(runs.sparse / "traces/step_00000020")
    assert last_steps(trace, num_steps=1) is trace
    with pytest.raises(ValueError, match="num_steps: got 0"):
        last_steps(trace, num_steps=0)


def test_checkpoints_to_compare_are_those_of_the_same_tokens(
    runs: Any, tmp_path: Path, command: Any, workplace: Any
) -> None:
    run = open_run(runs.sparse)
    assert [step for step, _ in traces_to_compare(run)] == [20, 60]
    copied = shutil.copytree(runs.sparse, tmp_path / "run")
    done = command(
        "trace", f"run={copied}/checkpoints/step_00000040", f"target={copied}/traces/a_other",
        "split=validation", cwd=workplace.folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [step for step, _ in checkpoint_traces(open_run(copied))] == [20, 40, 60]
    assert [step for step, _ in traces_to_compare(open_run(copied))] == [20, 60]
    shutil.rmtree(copied / "traces/step_00000020")
    with pytest.raises(DataError, match=r"traces of 1 checkpoint\(s\)"):
        traces_to_compare(open_run(copied))


def test_the_trace_of_another_model_is_refused(runs: Any, tmp_path: Path) -> None:
    shutil.copytree(runs.sparse, tmp_path / "run")
    path = tmp_path / "run/config.json"
    config = json.loads(path.read_text())
    config["router"]["name"] = "topk"
    path.write_text(json.dumps(config))
    with pytest.raises(DataError, match="another model: router: sparsemixer, and topk in the run"):
        routing_to_show(open_run(tmp_path / "run"))
    config["model"]["num_experts"] = 8
    path.write_text(json.dumps(config))
    with pytest.raises(DataError, match="another model: experts: 16, and 8 in the run"):
        recorded_routing(open_run(tmp_path / "run"))


def test_a_truncated_trace_is_named(runs: Any, tmp_path: Path) -> None:
    shutil.copytree(runs.sparse, tmp_path / "run")
    part = next((tmp_path / "run/traces/step_00000060").glob("*.parquet"))
    part.write_bytes(part.read_bytes()[:-100])
    with pytest.raises(DataError, match=rf"{part.name}: has \d+ bytes; it was written with"):
        routing_to_show(open_run(tmp_path / "run"))


def test_one_domain_and_no_logits_are_said_where_a_figure_needs_more(runs: Any) -> None:
    trace = open_trace(runs.sparse / "traces/step_00000060")
    batch = join_rows(list(trace.batches()))
    only = batch._replace(domain_T=batch.domain_T * 0)
    counts = count_routing(only, num_experts=16, num_domains=2)
    with pytest.raises(DataError, match="has tokens of code only, of the domains code, more"):
        domain_figure(counts, ["code", "more"])
    with pytest.raises(DataError, match="logits=true"):
        margin_figures(None)
