"""Real wandb: that no secret is in its files, and what is said where it cannot start."""

from __future__ import annotations

import os
import pty
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from wandb_file import leave_the_user_out, of_kind, only_wandb_file

from moe.config import LoggingConfig
from moe.errors import ConfigError, UserError
from moe.train.wandb_run import check_can_log_in, end_run, import_wandb, start_run

wandb = pytest.importorskip("wandb")

ENVIRONMENT_CANARY = "canaryEnvironment7f3a9d"
ARGUMENT_CANARY = "canaryArgument51b0c2"
CONFIG_CANARY = "canaryConfig88e1f4"
URL_CANARY = "canaryUrl20d6aa"
KEY_CANARY = "canaryKey" + "0123456789abcdef" * 2
CANARIES = (ENVIRONMENT_CANARY, ARGUMENT_CANARY, CONFIG_CANARY, URL_CANARY, KEY_CANARY)


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    leave_the_user_out(tmp_path / "home", monkeypatch)
    yield tmp_path / "home"
    wandb.teardown()


def start(run_dir: Path, **changes: Any) -> Any:
    return start_run(
        import_wandb(), LoggingConfig(**changes), run_dir=run_dir, run_id="abc123", run_name="tiny",
        values={},
    )  # fmt: skip


def test_group_job_type_and_tags_are_in_the_run_and_secrets_in_them_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_SERVICE_TOKEN", ENVIRONMENT_CANARY)
    run = start(tmp_path, group="routers", job_type="topk", tags=("a", f"b {ENVIRONMENT_CANARY}"))
    end_run(wandb, run)
    (shown, *_) = of_kind(only_wandb_file(tmp_path), "run")
    assert (shown.run_group, shown.job_type) == ("routers", "topk")
    assert list(shown.tags) == ["a", "<redacted>"]


@pytest.mark.parametrize(
    ("key", "value", "most"),
    [("tags", ("x" * 65,), 64), ("tags", ("",), 64), ("group", "g" * 129, 128),
     ("project", "", 128), ("job_type", "", 64)],
)  # fmt: skip
def test_texts_that_wandb_refuses_are_refused_before_a_run(key: str, value: Any, most: int) -> None:
    with pytest.raises(ConfigError, match=rf"logging\.{key}: got a text of .*1 to {most}"):
        LoggingConfig(**{key: value})


def test_a_negative_size_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"logging\.upload_trace_mib: got -1"):
        LoggingConfig(upload_trace_mib=-1)


WITH_SECRETS = f"""
import os, sys
from pathlib import Path
from moe.config import LoggingConfig
from moe.train.wandb_sink import WandbSink
sink = WandbSink(
    LoggingConfig(wandb="offline"), run_dir=Path(sys.argv[1]), run_id="abc123", run_name="tiny",
    resolved_config={{
        "a": {{"b": [{{"api_key": "{CONFIG_CANARY}"}}]}},
        "sources": ["https://user:{URL_CANARY}@host.example/x"],
        "note": "run with {ENVIRONMENT_CANARY}",
        "overrides": ["wandb.token={CONFIG_CANARY}"],
        "use_cls_token": "visible-value", "num_tokens": 5,
    }},
    resumed_step=None,
)
print("{ENVIRONMENT_CANARY}", flush=True)
for step in (1, 2):
    sink.write(step, {{"loss": 1.0, "router/load_LE": [[0.5, 0.5]]}})
sink.close()
"""


def test_no_secret_is_in_any_file_that_wandb_writes(tmp_path: Path, own_home: Path) -> None:
    run_dir = tmp_path / "run"
    environ = {
        **os.environ,
        "MY_SERVICE_TOKEN": ENVIRONMENT_CANARY,
        "WANDB_API_KEY": KEY_CANARY,
        "HARMLESS": f"contains {ARGUMENT_CANARY}",
        "WANDB_SAVE_CODE": "true",
        "WANDB_MODE": "online",
        "WANDB_CONSOLE": "wrap",
        "WANDB_BASE_URL": "https://wandb.example",
    }
    done = subprocess.run(
        [sys.executable, "-c", WITH_SECRETS, str(run_dir), f"--password={ARGUMENT_CANARY}"],
        env=environ, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    files = [p for folder in (run_dir, own_home) for p in folder.rglob("*") if p.is_file()]
    assert any(p.suffix == ".wandb" for p in files), "the environment must not change the mode"
    assert any(p.suffix == ".png" for p in files)
    for path in files:
        content = path.read_bytes()
        found = [c for c in CANARIES if c.encode() in content or c in str(path)]
        assert not found, f"{path} holds {found}"
        assert socket.gethostname().encode() not in content or path.suffix == ".png", path
    everything = b"".join(p.read_bytes() for p in files)
    assert b"visible-value" in everything
    assert b"host.example" in everything
    names = {p.name for p in files}
    assert not names & {"wandb-metadata.json", "requirements.txt", "output.log", "diff.patch"}
    assert not [p for p in files if p.suffix == ".py"]


def test_online_without_a_key_is_one_message(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"logging\.wandb: got 'online'.*WANDB_API_KEY"):
        start(tmp_path, wandb="online")


ONLINE = """
import sys, time
from moe.config import LoggingConfig
from moe.errors import UserError
from moe.train import wandb_run, wandb_sink
wandb_run._CONNECT_SECONDS = 2.0
began = time.monotonic()
try:
    wandb_sink.WandbSink(
        LoggingConfig(wandb="online"), run_dir=sys.argv[1], run_id="abc123", run_name="tiny",
        resolved_config={}, resumed_step=None,
    )
except UserError as error:
    print("MESSAGE", error, "SECONDS", round(time.monotonic() - began))
"""


def test_online_without_a_key_never_asks_on_a_terminal(tmp_path: Path) -> None:
    controller, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", ONLINE, str(tmp_path)], stdin=terminal, stdout=subprocess.PIPE,
        stderr=terminal, text=True,
    )  # fmt: skip
    os.close(terminal)
    written, _ = process.communicate(timeout=30)  # a prompt would wait here for ever
    os.close(controller)
    assert "MESSAGE logging.wandb: got 'online', but there is no W&B key" in written


@pytest.mark.parametrize("key", ["k" * 40, "short"])
def test_online_without_a_server_or_with_a_bad_key_is_one_message_within_the_time_allowed(
    tmp_path: Path, key: str
) -> None:
    with socket.socket() as free:  # bound and not listening: every connection is refused
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        done = subprocess.run(
            [sys.executable, "-c", ONLINE, str(tmp_path)], capture_output=True, text=True,
            env={**os.environ, "WANDB_API_KEY": key, "WANDB_BASE_URL": url}, timeout=60, check=True,
        )  # fmt: skip
    assert "MESSAGE logging.wandb: got 'online', and W&B could not start" in done.stdout
    assert "logging.wandb=offline" in done.stdout
    assert int(done.stdout.split()[-1]) <= 10
    assert key not in done.stdout


def test_a_key_in_a_netrc_file_is_found(
    tmp_path: Path, own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example")
    (own_home / ".netrc").write_text("machine other.example login user password x\n")
    with pytest.raises(UserError):
        check_can_log_in(wandb)
    (own_home / ".netrc").write_text(f"machine wandb.example login user password {'k' * 40}\n")
    check_can_log_in(wandb)


def test_a_missing_wandb_is_one_sentence_with_the_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="pip install wandb"):
        import_wandb()
