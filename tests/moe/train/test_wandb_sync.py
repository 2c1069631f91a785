"""What W&B's own programs send of a run: all of it, once, and nothing about this machine."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from small_trace import write_routing
from wandb_file import leave_the_user_out, only_wandb_file
from wandb_server import WandbServer

from moe.config import LoggingConfig
from moe.train.wandb_sink import WandbSink

wandb = pytest.importorskip("wandb")
KEY = "k" * 40


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    leave_the_user_out(tmp_path / "home", monkeypatch)
    yield tmp_path / "home"
    wandb.teardown()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    with WandbServer() as running:
        monkeypatch.setenv("WANDB_BASE_URL", running.url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
        yield running
        wandb.teardown()  # before the server goes, which it would try to reach


def log_a_run(run_dir: Path, trace: Path, *, mode: str) -> None:
    sink = WandbSink(
        LoggingConfig(wandb=mode, group="routers", job_type="topk"), run_dir=run_dir,
        run_id="abc123", run_name="tiny", resolved_config={"seed": 0}, final_step=3,
        trace_folder=trace,
    )  # fmt: skip
    for step in (1, 2, 3):
        sink.write(
            step,
            {"kind": "train", "step": step, "loss": 4.0 / step, "tokens_seen": 100 * step,
             "router/load_LE": [[0.5, 0.5], [1.0, 0.0]], "router/entropy_L": [0.5, 0.25]},
        )  # fmt: skip
    sink.close()


def expect_all_of_it(server: WandbServer, trace: Path) -> None:
    assert [row["loss/train"] for _, row in sorted(server.rows.items())] == [4.0, 2.0, 4.0 / 3]
    assert server.rows[2]["tokens"] == 200
    first = server.named("UpsertBucket")[0]
    assert (first["name"], first["groupName"], first["jobType"]) == ("abc123", "routers", "topk")
    (artifact,) = server.named("CreateArtifact")
    assert artifact["input"]["artifactTypeName"] == "routing-trace"
    assert json.loads(artifact["input"]["metadata"])["experts"] == 4
    assert len(server.named("CommitArtifact")) == 1
    for path in (p for p in trace.iterdir() if p.is_file()):
        assert server.uploads[f"/artifact/{path.name}"] == path.read_bytes()
    assert any(path.startswith("/run/media/images/router/load_") for path in server.uploads)


def expect_nothing_of_this_machine(server: WandbServer, tmp_path: Path) -> None:
    texts = [str(tmp_path), socket.gethostname() * (len(socket.gethostname()) > 3), KEY]
    for path, body in server.requests:
        if path.startswith("/artifact/"):
            continue  # a trace's own JSON has the places that launch/trace.py was given
        for text in filter(None, texts):
            assert text.encode() not in body, f"{path} tells {text}"


def test_an_offline_run_and_its_trace_wait_for_wandb_sync_which_sends_all_of_both(
    tmp_path: Path, server: WandbServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    trace = write_routing(Path("run/routing"))
    log_a_run(Path("run"), trace, mode="offline")
    assert server.requests == [], "offline is offline"
    folder = only_wandb_file(Path("run")).parent
    program = Path(sys.executable).parent / "wandb"
    done = subprocess.run(
        [str(program), "sync", str(folder)], cwd=tmp_path, env=dict(os.environ), timeout=60,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    expect_all_of_it(server, trace)
    expect_nothing_of_this_machine(server, tmp_path)


def test_an_online_run_sends_the_same_as_it_goes(
    tmp_path: Path, server: WandbServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    trace = write_routing(Path("run/routing"))
    log_a_run(Path("run"), trace, mode="online")
    expect_all_of_it(server, trace)
    expect_nothing_of_this_machine(server, tmp_path)
