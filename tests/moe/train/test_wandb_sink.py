"""What the .wandb file of a run holds: our names, axes and steps, over kills and resumes."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from small_trace import write_routing
from wandb_file import (
    artifacts,
    axes,
    history,
    last_summary,
    leave_the_user_out,
    of_kind,
    only_wandb_file,
)

from moe.config import LoggingConfig
from moe.train.metrics import JsonlSink, Sinks
from moe.train.wandb_sink import WandbSink

wandb = pytest.importorskip("wandb")


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    leave_the_user_out(tmp_path / "home", monkeypatch)
    yield tmp_path / "home"
    wandb.teardown()


def make_sink(run_dir: Path, *, logging: dict[str, Any] | None = None, **changes: Any) -> WandbSink:
    arguments = {
        "run_dir": run_dir, "run_id": "abc123", "run_name": "tiny", "resolved_config": {"seed": 0},
        "resumed_step": None, **changes,
    }  # fmt: skip
    return WandbSink(LoggingConfig(**(logging or {})), **arguments)


def record_of(step: int) -> dict[str, Any]:
    load_LE = [[0.5, 0.25, 0.25, 0.0], [0.25, 0.25, 0.25, 0.25]]
    return {
        "kind": "train", "step": step, "loss": 4.0 / step, "loss/z": 0.5, "skipped": False,
        "lr": 1e-3, "tokens_seen": 100 * step, "data_hash": "00c0ffee",
        "router/load_LE": load_LE, "router/entropy_L": [1.0, 1.25], "router/dead_experts": 1,
    }  # fmt: skip


def validation_of(step: int) -> dict[str, Any]:
    # the third validation is the best
    return {
        "kind": "validation", "step": step, "validation/loss": 3.0 + abs(step - 6) / 8,
        "validation/loss/code": 3.25, "validation/unigram_entropy": 5.5,
    }  # fmt: skip


def write_steps(sink: Any, first: int, last: int) -> None:
    for step in range(first, last + 1):
        sink.write(step, record_of(step))
        if step % 2 == 0:
            sink.write(step, validation_of(step))


def as_it_is_shown(run_dir: Path) -> tuple[Any, Any, Any, Any]:
    """History, summary, axes and artifacts; without times, and pictures by their contents."""
    path = only_wandb_file(run_dir)
    rows = {
        step: {
            name: value.get("sha256", value) if isinstance(value, dict) else value
            for name, value in row.items()
            if name not in ("_timestamp", "_runtime")
        }
        for step, row in history(path).items()
    }
    summary = {k: v for k, v in last_summary(path).items() if k[0] != "_" and "/load" not in k}
    sent = [{**a, "files": {k: v[:2] for k, v in a["files"].items()}} for a in artifacts(path)]
    return rows, summary, axes(path), sent


def test_logged_values_can_be_read_back_from_the_file_at_our_steps(tmp_path: Path) -> None:
    sink = make_sink(tmp_path, heat_map_every=2)
    for step in range(1, 6):
        sink.write(step, record_of(step))
    sink.write(5, {"kind": "validation", "validation/loss": 3.5, "validation/loss/code": 3.25})
    sink.close()
    sink.close()
    rows = history(only_wandb_file(tmp_path))
    assert list(rows) == [1, 2, 3, 4, 5]
    assert [rows[step]["loss/train"] for step in rows] == [4.0 / step for step in rows]
    assert rows[5]["validation/loss"] == 3.5, "a validation shares the row of its step"
    assert rows[5]["domains/loss/code"] == 3.25
    assert rows[3]["router/max_load"] == 2.0
    assert rows[3]["layers/entropy/01"] == 1.25
    assert "router/load_LE" not in rows[3]
    assert [step for step in rows if "router/load" in rows[step]] == [1, 3, 5]
    assert [step for step in rows if "layers/load/01" in rows[step]] == [1, 3, 5]
    assert rows[3]["layers/load/00"]["_type"] == "histogram"
    assert sum(rows[3]["layers/load/00"]["values"]) == 4, "every expert once"
    assert len(list(tmp_path.glob("wandb/offline-run-*/files/media/images/router/*.png"))) == 3


def test_losses_are_over_tokens_and_the_rest_over_steps(tmp_path: Path) -> None:
    sink = make_sink(tmp_path)
    sink.write(1, record_of(1))
    sink.write(3, validation_of(3))  # a step without a training record
    sink.close()
    path = only_wandb_file(tmp_path)
    assert axes(path) == {
        "tokens": "hidden", "loss/*": "tokens", "validation/*": "tokens", "domains/*": "tokens",
    }  # fmt: skip
    rows = history(path)
    assert rows[1]["tokens"] == 100
    assert rows[3]["tokens"] == 100, "a point needs its place on the axis"
    assert rows[3]["validation/loss"] == 3.375


def test_the_table_of_runs_has_the_best_validation_and_what_is_the_same_all_along(
    tmp_path: Path,
) -> None:
    sink = make_sink(tmp_path)
    write_steps(sink, 1, 10)
    sink.close()
    path = only_wandb_file(tmp_path)
    shown = last_summary(path)
    assert shown["best/validation_loss"] == 3.0
    assert shown["validation/loss"] == 3.5, "a number, which a sweep can optimise"
    assert shown["data/unigram_entropy"] == 5.5
    assert not [k for row in history(path).values() for k in row if "unigram" in k]


def test_a_finished_run_has_its_figures_and_others_do_not(tmp_path: Path) -> None:
    picture = tmp_path / "run.png"
    from PIL import Image

    Image.new("RGB", (8, 6), "red").save(picture)
    for name, last in (("stopped", 3), ("finished", 4)):
        sink = make_sink(tmp_path / name, final_step=4, figures=lambda: {"run": picture})
        write_steps(sink, 1, last)
        sink.close()
    assert not [
        k for row in history(only_wandb_file(tmp_path / "stopped")).values() for k in row
        if k.startswith("figures/")
    ]  # fmt: skip
    assert "figures/run" in history(only_wandb_file(tmp_path / "finished"))[4]
    (sent,) = (tmp_path / "finished").glob("wandb/offline-run-*/files/media/images/figures/*.png")
    assert sent.read_bytes() == picture.read_bytes()


def test_figures_that_fail_leave_a_whole_file_and_do_not_stop_training(tmp_path: Path) -> None:
    def fail() -> dict[str, Path]:
        raise ValueError("nothing to draw")

    sinks = Sinks([make_sink(tmp_path, final_step=2, figures=fail)])
    write_steps(sinks, 1, 2)
    with pytest.warns(RuntimeWarning, match="nothing to draw"):
        sinks.close()
    path = only_wandb_file(tmp_path)
    assert list(history(path)) == [1, 2]
    assert of_kind(path, "exit"), "the run was ended"


def test_the_run_has_our_identity_and_our_configuration(tmp_path: Path) -> None:
    make_sink(tmp_path, resolved_config={"model": {"num_experts": 16}, "lr": 3e-3}).close()
    run, *_ = of_kind(only_wandb_file(tmp_path), "run")
    assert (run.run_id, run.display_name, run.project) == ("abc123", "tiny", "phimoe")
    config = {u.key: json.loads(u.value_json) for u in run.config.update if u.key != "_wandb"}
    assert config == {"model": {"num_experts": 16}, "lr": 3e-3}
    assert run.host == ""


def test_the_last_load_is_drawn_at_the_end_if_it_was_not_yet(tmp_path: Path) -> None:
    sink = make_sink(tmp_path, heat_map_every=100)
    for step in range(1, 5):
        sink.write(step, record_of(step))
    sink.close()
    rows = history(only_wandb_file(tmp_path))
    assert [step for step in rows if "router/load" in rows[step]] == [1, 4]


def test_a_resumed_run_is_one_folder_that_shows_what_an_uninterrupted_one_does(
    tmp_path: Path,
) -> None:
    trace = write_routing(tmp_path / "routing")

    def go(folder: str, first: int, last: int, *, resumed_step: int | None) -> None:
        run_dir = tmp_path / folder
        jsonl = JsonlSink(run_dir / "metrics.jsonl", resume_step=resumed_step)
        sink = make_sink(
            run_dir, resumed_step=resumed_step, heat_map_every=3, final_step=12, trace_folder=trace
        )
        sinks = Sinks([jsonl, sink])
        write_steps(sinks, first, last)
        sinks.close()

    go("whole", 1, 12, resumed_step=None)
    go("parts", 1, 8, resumed_step=None)
    first_folder = only_wandb_file(tmp_path / "parts").parent
    assert not artifacts(only_wandb_file(tmp_path / "parts")), "it is not finished"
    time.sleep(1.1)  # wandb names its folders by the second
    go("parts", 6, 12, resumed_step=5)
    time.sleep(1.1)
    go("parts", 13, 12, resumed_step=12)  # the same command again, with nothing left to do
    replaced = tmp_path / "parts" / "wandb" / "replaced"
    assert (replaced / first_folder.name).is_dir(), "nothing is deleted"
    assert len(list(replaced.iterdir())) == 2
    rows, _, _, sent = as_it_is_shown(tmp_path / "parts")
    assert list(rows) == list(range(1, 13))
    assert [artifact["name"] for artifact in sent] == ["routing-abc123"]
    assert as_it_is_shown(tmp_path / "parts") == as_it_is_shown(tmp_path / "whole")


def test_steps_that_a_kill_has_undone_are_not_replayed(tmp_path: Path) -> None:
    jsonl = JsonlSink(tmp_path / "metrics.jsonl")
    write_steps(jsonl, 1, 8)
    jsonl.close()
    make_sink(tmp_path, resumed_step=5).close()
    assert list(history(only_wandb_file(tmp_path))) == [1, 2, 3, 4, 5]


def test_ranks_that_wait_never_wait_for_the_steps_before_a_resume(tmp_path: Path) -> None:
    now = [0.0]
    for folder in ("whole", "parts"):
        jsonl = JsonlSink(tmp_path / folder / "metrics.jsonl")
        first = make_sink(tmp_path / folder)
        write_steps(Sinks([jsonl, first]), 1, 6)
        if folder == "whole":
            write_steps(first, 7, 9)
        jsonl.close()
        first.close()
    time.sleep(1.1)
    sink = make_sink(tmp_path / "parts", resumed_step=6, final_step=9, clock=lambda: now[0])
    run = sink._run
    write_steps(sink, 7, 9)  # in no time: nothing of it is for earlier steps
    assert run.step == 0
    assert not (tmp_path / "parts/wandb/replaced").exists(), "its steps are still needed"
    sink.close()
    rows, *_ = as_it_is_shown(tmp_path / "parts")
    assert rows == as_it_is_shown(tmp_path / "whole")[0]


def test_a_trace_above_the_limit_stays_here_with_one_message(tmp_path: Path) -> None:
    trace = write_routing(tmp_path / "routing", num_steps=4, num_tokens=30_000)
    sink = make_sink(
        tmp_path, logging={"upload_trace_mib": 1}, final_step=2, trace_folder=trace
    )  # fmt: skip
    write_steps(sink, 1, 2)
    with pytest.warns(RuntimeWarning, match=r"upload_trace_mib: got 1.*stays where it is.*=3 or"):
        sink.close()
    assert not artifacts(only_wandb_file(tmp_path))


def test_a_limit_of_zero_sends_no_trace_and_says_nothing(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    trace = write_routing(tmp_path / "routing")
    sink = make_sink(
        tmp_path, logging={"upload_trace_mib": 0}, final_step=2, trace_folder=trace
    )  # fmt: skip
    write_steps(sink, 1, 2)
    sink.close()
    assert not artifacts(only_wandb_file(tmp_path))
    assert not [w for w in recwarn if issubclass(w.category, RuntimeWarning)]


def test_a_killed_run_that_starts_over_leaves_one_folder(tmp_path: Path) -> None:
    sink = make_sink(tmp_path)
    sink.write(1, record_of(1))
    sink.close()
    time.sleep(1.1)
    sink = make_sink(tmp_path)
    sink.write(1, record_of(1))
    sink.close()
    assert list(history(only_wandb_file(tmp_path))) == [1]


def test_disabled_writes_nothing(tmp_path: Path) -> None:
    sink = make_sink(tmp_path / "run", logging={"wandb": "disabled"})
    sink.write(1, record_of(1))
    sink.close()
    assert not (tmp_path / "run").exists()


def test_a_run_ended_from_outside_never_stops_training(tmp_path: Path) -> None:
    sink = make_sink(tmp_path)
    jsonl = JsonlSink(tmp_path / "metrics.jsonl")
    sinks = Sinks([sink, jsonl])
    sinks.write(1, record_of(1))
    wandb.teardown()  # as if wandb's own process had died
    with pytest.warns(RuntimeWarning, match="WandbSink stopped working"):
        sinks.write(2, record_of(2))
    sinks.write(3, record_of(3))
    sinks.close()
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 3
