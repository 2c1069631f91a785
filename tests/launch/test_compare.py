"""The command compare with real runs: stopped and gone on with, shared, refused, failing."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "launch"))  # as launch/ itself is found there

# two arms on the nano model; the second is a quarter of the FLOPs by its length alone
SMALL = """# @package _global_
name: small
experiment: nano
title: A nano MoE against a shorter run of it
question: Do more steps help?
published: Yes.
source: everybody
arms:
  - {{name: long, label: sixteen steps, overrides: [train.steps=16]}}
  - {{name: dense, overrides: [model=my_dense, logging.project=planted-secret], flops_of: long}}
{more}contrasts:
  - {{arm: long, against: dense, expects: lower}}
overrides: >-
  parallel=plain data.name=tiny tokenizer.vocab_size=512 train.precision=float32
  optim.warmup_steps=2 logging.tags=[planted-secret]
evaluations: 2
seeds: [0, 1]
"""
DENSE = """name: my_dense
vocab_size: 512
hidden_size: 32
num_layers: 1
num_heads: 2
num_kv_heads: 1
head_dim: 16
intermediate_size: 64
num_experts: 0
"""
FAILING = """  - {name: bad, overrides: [model.vocab_size=256, train.steps=2]}
  - {name: after, overrides: [train.steps=2], starts_from: bad}
"""


@dataclass(frozen=True)
class Place:
    """A working directory with data, and configuration files of one's own."""

    folder: Path
    environment: dict[str, str]

    def write(self, more: str = "") -> None:
        for path, text in (
            ("conf/comparison/small.yaml", SMALL.format(more=more)),
            ("conf/model/my_dense.yaml", DENSE),
        ):
            (self.folder / path).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / path).write_text(text)

    def arguments(self, *more: str) -> list[str]:
        command = [sys.executable, str(ROOT / "launch/compare.py"), "comparison=small"]
        return [*command, "--config-dir", "conf", "paths.runs=r=u,n s", "paths.reports=rep", *more]

    def compare(self, *more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.arguments(*more), cwd=self.folder, env=self.environment, text=True,
            capture_output=True, timeout=240, check=False,
        )  # fmt: skip

    @property
    def runs(self) -> list[Path]:
        return sorted((self.folder / "r=u,n s").glob("*/seed_*"))

    def rows(self, name: str) -> list[dict[str, str]]:
        with (self.folder / "rep/small" / name).open(newline="") as file:
            return list(csv.DictReader(file))

    def trainers(self) -> list[str]:
        """Processes of launch/train.py that work in this folder."""
        found = []
        for entry in Path("/proc").iterdir():
            try:
                words = (entry / "cmdline").read_bytes()
                is_here = (entry / "cwd").resolve() == self.folder.resolve()
            except OSError:
                continue
            if b"launch/train.py" in words and is_here:
                found.append(entry.name)
        return found


@pytest.fixture(scope="module")
def compared(
    workplace, environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Place, subprocess.CompletedProcess[str]]:
    """Stopped once by Ctrl-C in the middle of a run, and gone on with to the end."""
    environment = environment | {"REVIEW_PAT": "planted-secret"}
    place = Place(tmp_path_factory.mktemp("compared"), environment)
    shutil.copytree(workplace.folder / "data", place.folder / "data")
    place.write()
    first = subprocess.Popen(
        place.arguments("jobs=2"), cwd=place.folder, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        until = time.monotonic() + 120
        while not any((run / "metrics.jsonl").is_file() for run in place.runs):
            assert time.monotonic() < until
            assert first.poll() is None, first.communicate()
            time.sleep(0.02)
        first.send_signal(signal.SIGINT)
        said = first.communicate(timeout=100)
    finally:
        first.kill()
    assert first.returncode == 130, said
    assert "The same command goes on" in said[1]
    assert place.trainers() == []
    states = [json.loads((run / "comparison.json").read_text()) for run in place.runs]
    assert not all(state["is_finished"] for state in states) or len(states) < 4
    done = place.compare("jobs=2")
    assert done.returncode == 0, done.stderr
    return place, done


def test_a_comparison_that_was_stopped_goes_on_and_ends_with_a_report(compared) -> None:
    place, done = compared
    assert len(place.runs) == 4
    for run in place.runs:
        records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        steps = [record["step"] for record in records if record["kind"] == "train"]
        assert steps == list(range(1, steps[-1] + 1))  # none lost, none twice
    rows, curves = place.rows("runs.csv"), place.rows("curves.csv")
    assert [(r["arm"], r["seed"]) for r in rows] == [
        ("long", "0"), ("dense", "0"), ("long", "1"), ("dense", "1"),
    ]  # fmt: skip
    long, dense = rows[0], rows[1]
    assert (long["steps"], long["tokens"]) == ("16", str(16 * 8 * 64))
    per_step = float(dense["flops"]) / int(dense["steps"])
    assert abs(float(dense["flops"]) - float(long["flops"])) <= per_step / 2
    assert float(long["load_cv"]) > 0
    assert dense["load_cv"] == dense["dead_experts"] == ""
    assert {row["validation_tokens"] for row in rows} == {long["validation_tokens"]}
    assert len({row["data"] for row in rows}) == 1
    assert str(place.folder) not in (place.folder / "rep/small/runs.csv").read_text()
    ends = {(c["arm"], c["seed"], c["step"]): c["validation_loss"] for c in curves}
    for row in rows:
        assert ends[row["arm"], row["seed"], row["steps"]] == row["validation_loss"]
    assert "sixteen steps against dense (published direction: lower): **" in done.stdout
    report = (place.folder / "rep/small/report.md").read_text()
    assert "| sixteen steps |" in report
    assert str(place.folder) not in report
    assert (place.folder / "rep/small/figure.png").read_bytes()[:4] == b"\x89PNG"


def test_no_file_of_a_comparison_holds_a_secret_that_was_typed(compared) -> None:
    place, _ = compared
    written = [
        path
        for folder in (place.folder / "r=u,n s", place.folder / "rep")
        for path in folder.rglob("*")
        if path.is_file()
    ]
    assert {"comparison.json", "runs.csv", "report.md"} <= {path.name for path in written}
    assert [str(path) for path in written if b"planted-secret" in path.read_bytes()] == []
    assert "overrides='parallel=plain" in (place.folder / "rep/small/report.md").read_text()


def test_what_is_finished_is_not_trained_again(compared) -> None:
    place, _ = compared
    before = {run: (run / "train.log").stat() for run in place.runs}
    again = place.compare()
    assert again.returncode == 0, again.stderr
    assert "4/4 done" in again.stdout
    assert {run: (run / "train.log").stat() for run in place.runs} == before


def test_a_report_is_a_function_of_its_csv_files(compared) -> None:
    place, _ = compared
    folder = place.folder / "rep/small"
    files = {name: (folder / name).read_bytes() for name in ("report.md", "runs.csv", "curves.csv")}
    (folder / "report.md").unlink()
    (folder / "figure.png").unlink()
    done = place.compare("report_only=true", "paths.runs=nowhere")
    assert done.returncode == 0, done.stderr
    assert (folder / "figure.png").is_file()
    assert {name: (folder / name).read_bytes() for name in files} == files


def test_a_run_folder_of_other_settings_is_refused(compared) -> None:
    place, _ = compared
    settings = place.runs[0] / "config.json"
    text = settings.read_text()
    values = json.loads(text)
    values["optim"]["lr"] = 0.5
    settings.write_text(json.dumps(values))
    try:
        done = place.compare()
    finally:
        settings.write_text(text)
    assert done.returncode == 2
    assert "holds a run of other settings" in done.stderr
    assert str(place.runs[0].relative_to(place.folder)) in done.stderr
    assert "Traceback" not in done.stderr


def test_a_run_that_another_process_trains_is_waited_for(compared, monkeypatch) -> None:
    import fcntl

    place, _ = compared
    record = place.runs[0] / "comparison.json"
    text = record.read_text()
    record.write_text(json.dumps(json.loads(text) | {"is_finished": False}))
    with (place.runs[0] / "comparison.lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        process = subprocess.Popen(
            place.arguments(), cwd=place.folder, env=place.environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        try:
            assert process.stdout is not None
            while "3/4 done" not in process.stdout.readline():
                assert process.poll() is None
            time.sleep(2)
            assert process.poll() is None
            assert place.trainers() == []  # it does not train beside the other
            record.write_text(text)  # the other one has finished it
            assert process.wait(timeout=60) == 0
        finally:
            process.kill()
            process.communicate()


def test_a_run_that_fails_is_told_with_its_last_lines_and_the_others_go_on(
    compared, tmp_path: Path
) -> None:
    first, _ = compared
    place = Place(tmp_path, first.environment)
    for name in ("data", "r=u,n s"):
        shutil.copytree(first.folder / name, tmp_path / name)
    place.write(FAILING)
    done = place.compare("seeds=[0]")
    assert done.returncode == 1
    assert "2 of 4 runs failed" in done.stderr
    assert "bad/0 ended with 2, last lines of" in done.stderr
    assert "    error: model.vocab_size: got 256" in done.stderr
    assert "after/0: not started, for bad is what it starts from" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "rep").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "comparison: not given"),
        (["comparison=router"], "comparison: got 'router'"),
        (["comparison=routers", "sedes=[0]"], "sedes: unknown key"),
        (["comparison=shapes", "overrides=optim=adam"], "optim: got 'adam'"),
        (["comparison=routers", "report_only=true", "paths.reports=empty"], "cannot be read"),
        (["comparison=shapes", "overrides=train.trace_every=5"], "arm mini: train.trace_every"),
    ],
    ids=["no comparison", "no such comparison", "key", "option", "no numbers", "dense and traced"],
)
def test_a_mistake_is_one_message(
    arguments: list[str], said: str, command: Callable[..., object], tmp_path: Path
) -> None:
    done: subprocess.CompletedProcess[str] = command("compare", *arguments, cwd=tmp_path)  # type: ignore[assignment]
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert os.listdir(tmp_path) == []
