"""launch/trace.py: a run's routing written, gone on with after a kill, and refused."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moe.trace.batch import join_rows
from moe.trace.read import open_trace

ROOT = Path(__file__).resolve().parents[2]


def test_a_run_is_traced_and_a_finished_trace_says_so(command, workplace, tmp_path) -> None:
    target = tmp_path / "a trace, [1]"
    arguments = ("trace", "run=runs/a", f"target={target}", "split=train", "batch_size=3")
    done = command(*arguments, cwd=workplace.folder)
    assert done.returncode == 0, done.stderr
    trace = open_trace(target)
    rows = join_rows(list(trace.batches()))
    assert rows.num_rows == trace.info.num_tokens > 0
    assert trace.info.domains == ("code", "more")
    assert f"trace: {target}, {rows.num_rows:,} tokens of " in done.stdout
    assert "recording cost: " in done.stdout
    assert "runs/a/checkpoints/step_00000004, step 4" in done.stdout
    again = command(*arguments, cwd=workplace.folder)
    assert again.returncode == 0, again.stderr
    assert f"finished before: {target} holds all of it, verified" in again.stdout


@pytest.mark.slow
def test_a_killed_trace_goes_on_with_the_same_command(
    command, workplace, environment, tmp_path
) -> None:
    arguments = ["run=runs/a", "split=train", "seq_len=32", "batch_size=1", "part_tokens=1"]
    whole = tmp_path / "whole"
    done = command("trace", *arguments, f"target={whole}", cwd=workplace.folder)
    assert done.returncode == 0, done.stderr
    target = tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "launch/trace.py"), *arguments, f"target={target}"],
        cwd=workplace.folder, env=environment, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    while not (target / "part-00001.parquet").exists() and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (target / "trace.json").exists()
    done = command("trace", *arguments, f"target={target}", cwd=workplace.folder)
    assert done.returncode == 0, done.stderr
    assert "of these tokens were there already" in done.stdout
    for part in whole.glob("*.parquet"):
        assert (target / part.name).read_bytes() == part.read_bytes()


def test_mistakes_are_one_message(command, workplace, tmp_path) -> None:
    for arguments, message in (
        (["target=x"], "error: run: not given"),
        (["run=runs/a"], "error: target: not given"),
        (["run=runs/a", "target=x", "data_dir=data/other"], "error: data_dir: "),
        (["run=runs/a", "target=texts", "split=train"], "error: target: 'texts' is not empty"),
    ):
        done = command("trace", *arguments, cwd=workplace.folder)
        assert done.returncode == 2
        assert done.stderr.startswith(message)
        assert done.stderr.count("\n") == 1
        assert "Traceback" not in done.stderr


def test_a_dense_run_has_no_routing(command, workplace, tmp_path) -> None:
    done = command(
        "train", *workplace.train, "model.num_experts=0", f"paths.run_dir={tmp_path / 'dense'}",
        "train.steps=2", cwd=workplace.folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    target = tmp_path / "t"
    done = command("trace", f"run={tmp_path / 'dense'}", f"target={target}", cwd=workplace.folder)
    assert done.returncode == 2
    assert "is dense: it has no experts, so there is no routing to trace" in done.stderr
    assert not target.exists()


@pytest.mark.slow
def test_a_full_disk_is_one_message_and_the_trace_goes_on_later(
    command, workplace, tmp_path
) -> None:
    import resource

    target = tmp_path / "t"
    arguments = ("trace", "run=runs/a", f"target={target}", "split=train", "logits=true")
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # noqa: E731
    done = command(*arguments, cwd=workplace.folder, preexec_fn=limit)
    assert done.returncode == 2, done.stderr
    assert f"error: target: cannot write {target / 'part-00000.parquet'}: " in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(target.glob("*.parquet"))
    done = command(*arguments, cwd=workplace.folder)
    assert done.returncode == 0, done.stderr
    open_trace(target).verify()
