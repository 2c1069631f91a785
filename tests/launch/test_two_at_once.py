"""The same run folder given twice at once: the second command is refused, the first unharmed."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

from moe.train.lease import LEASE_NAME
from moe.train.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[2]


def test_the_second_command_names_the_first_which_trains_on(
    workplace, tmp_path, environment, command
):
    place = workplace.copy(tmp_path).folder
    arguments = [*workplace.train, "train.steps=100000", "paths.run_dir=runs/b"]
    lease = place / "runs/b" / LEASE_NAME
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "launch/train.py"), *arguments], cwd=place, env=environment,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    with process:
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("step "):
                    break
            config = (place / "runs/b/config.json").read_bytes()
            done = command("train", *arguments, cwd=place)
            assert done.returncode == 2, done.stderr
            assert f"another run trains in runs/b now (process {process.pid} on" in done.stderr
            assert done.stderr.count("\n") == 1
            process.send_signal(signal.SIGTERM)  # it saves and ends as if alone
            said, _ = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 75, said
    assert not lease.exists()
    assert (place / "runs/b/config.json").read_bytes() == config
    steps = [
        r["step"] for r in read_metrics(place / "runs/b/metrics.jsonl") if r["kind"] == "train"
    ]
    assert steps == list(range(1, len(steps) + 1))


def test_a_run_that_was_killed_goes_on_at_once(workplace, tmp_path, environment, command):
    place = workplace.copy(tmp_path).folder
    arguments = [*workplace.train, "train.steps=12", "paths.run_dir=runs/a"]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "launch/train.py"), *arguments, "train.save_every=5"],
        cwd=place, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    lease = place / "runs/a" / LEASE_NAME
    with process:
        until = time.monotonic() + 100
        while not lease.exists() and time.monotonic() < until:
            time.sleep(0.01)
        process.kill()
    assert lease.exists()
    done = command("train", *arguments, cwd=place)
    assert done.returncode == 0, done.stderr
    assert not lease.exists()
