"""Real wandb, offline: what its files hold, over kills and resumes, and that no secret is in them.

The .wandb file is read here without wandb's help where its layout is concerned (a LevelDB log:
blocks of 32 KiB, records of checksum, length, type, data, after a header of 7 bytes), so that the
test sees what is on disk and not what the library remembers.
"""

from __future__ import annotations

import json
import math
import os
import pty
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe.config import LoggingConfig
from moe.errors import UserError
from moe.train.metrics import JsonlSink, Sinks
from moe.train.wandb_sink import WandbSink, load_picture, scalars

wandb = pytest.importorskip("wandb")

ENVIRONMENT_CANARY = "canaryEnvironment7f3a9d"
ARGUMENT_CANARY = "canaryArgument51b0c2"
CONFIG_CANARY = "canaryConfig88e1f4"
URL_CANARY = "canaryUrl20d6aa"
KEY_CANARY = "canaryKey" + "0123456789abcdef" * 2
CANARIES = (ENVIRONMENT_CANARY, ARGUMENT_CANARY, CONFIG_CANARY, URL_CANARY, KEY_CANARY)


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Nothing of the user's own W&B set-up is read, and all that wandb writes is below tmp_path."""
    for name in list(os.environ):
        if name.startswith("WANDB_") or name == "NETRC":
            monkeypatch.delenv(name)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    for name in ("CACHE", "CONFIG", "DATA"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(home / name.lower()))
    yield home
    wandb.teardown()


def make_sink(run_dir: Path, **changes: Any) -> WandbSink:
    arguments = {
        "run_dir": run_dir, "run_id": "abc123", "run_name": "tiny", "resolved_config": {"seed": 0},
        "resumed_step": None, **changes,
    }  # fmt: skip
    return WandbSink(LoggingConfig(wandb=arguments.pop("mode", "offline")), **arguments)


def record_of(step: int) -> dict[str, Any]:
    load_LE = [[0.5, 0.25, 0.25, 0.0], [0.25, 0.25, 0.25, 0.25]]
    return {
        "kind": "train", "step": step, "loss": 4.0 / step, "skipped": False,
        "router/load_LE": load_LE, "router/entropy_L": [1.0, 1.25], "router/dead_experts": 1,
    }  # fmt: skip


def only_wandb_file(run_dir: Path) -> Path:
    (path,) = run_dir.glob("wandb/offline-run-*/*.wandb")
    return path


def read_log(path: Path) -> list[Any]:
    """The protobuf records of a .wandb file."""
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]

    content = path.read_bytes()
    assert content[:4] == b":W&B"
    records, pending, at = [], b"", 7
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:  # too short for a header: padding
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack("<HB", content[at + 4 : at + 7])
        if kind == 0:
            break
        pending += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            records.append(Record.FromString(pending))
            pending = b""
    return records


def history(path: Path) -> dict[int, dict[str, Any]]:
    """step -> logged values; a step that is in the file twice fails."""
    rows: dict[int, dict[str, Any]] = {}
    for record in read_log(path):
        if record.WhichOneof("record_type") != "history":
            continue
        values = {
            (item.nested_key[0] if item.nested_key else item.key): json.loads(item.value_json)
            for item in record.history.item
        }
        step = values["_step"]
        assert step == record.history.step.num
        assert step not in rows, f"step {step} is there twice"
        rows[step] = values
    return rows


def test_logged_values_can_be_read_back_from_the_file_at_our_steps(tmp_path: Path) -> None:
    sink = make_sink(tmp_path, heat_map_every=2)
    for step in range(1, 6):
        sink.write(step, record_of(step))
    sink.write(5, {"kind": "validation", "validation/loss": 3.5, "validation/loss/code": 3.25})
    sink.close()
    sink.close()
    rows = history(only_wandb_file(tmp_path))
    assert list(rows) == [1, 2, 3, 4, 5]
    assert [rows[step]["loss"] for step in rows] == [4.0 / step for step in rows]
    assert rows[5]["validation/loss"] == 3.5, "a validation shares the row of its step"
    assert rows[5]["validation/loss/code"] == 3.25
    assert rows[3]["router/layer_00/max_load"] == 2.0
    assert rows[3]["router/layer_00/min_load"] == 0.0
    assert rows[3]["router/layer_01/max_load"] == 1.0
    assert rows[3]["router/layer_01/entropy"] == 1.25
    assert "router/load_LE" not in rows[3]
    assert [step for step in rows if "router/load" in rows[step]] == [1, 3, 5]
    assert len(list(tmp_path.glob("wandb/offline-run-*/files/media/images/router/*.png"))) == 3


def test_the_run_has_our_identity_and_our_configuration(tmp_path: Path) -> None:
    make_sink(tmp_path, resolved_config={"model": {"num_experts": 16}, "lr": 3e-3}).close()
    runs = [
        r.run for r in read_log(only_wandb_file(tmp_path)) if r.WhichOneof("record_type") == "run"
    ]
    assert (runs[0].run_id, runs[0].display_name, runs[0].project) == ("abc123", "tiny", "phimoe")
    config = {u.key: json.loads(u.value_json) for u in runs[0].config.update if u.key != "_wandb"}
    assert config == {"model": {"num_experts": 16}, "lr": 3e-3}
    assert runs[0].host == ""


def test_the_last_load_is_drawn_at_the_end_if_it_was_not_yet(tmp_path: Path) -> None:
    sink = make_sink(tmp_path, heat_map_every=100)
    for step in range(1, 5):
        sink.write(step, record_of(step))
    sink.close()
    rows = history(only_wandb_file(tmp_path))
    assert [step for step in rows if "router/load" in rows[step]] == [1, 4]


def test_a_resumed_run_is_one_folder_with_every_step_once(tmp_path: Path) -> None:
    def go(first: int, last: int, *, resumed_step: int | None) -> None:
        jsonl = JsonlSink(tmp_path / "metrics.jsonl", resume_step=resumed_step)
        sinks = Sinks([jsonl, make_sink(tmp_path, resumed_step=resumed_step)])
        for step in range(first, last + 1):
            sinks.write(step, record_of(step))
        sinks.close()

    go(1, 8, resumed_step=None)
    first_folder = only_wandb_file(tmp_path).parent
    time.sleep(1.1)  # wandb names its folders by the second
    go(6, 12, resumed_step=5)
    rows = history(only_wandb_file(tmp_path))
    assert list(rows) == list(range(1, 13))
    assert [rows[step]["loss"] for step in rows] == [4.0 / step for step in rows]
    assert (tmp_path / "wandb" / "replaced" / first_folder.name).is_dir(), "nothing is deleted"


def test_a_killed_run_that_starts_over_leaves_one_folder(tmp_path: Path) -> None:
    sink = make_sink(tmp_path)
    sink.write(1, record_of(1))
    sink.close()
    time.sleep(1.1)
    sink = make_sink(tmp_path)
    sink.write(1, record_of(1))
    sink.close()
    assert list(history(only_wandb_file(tmp_path))) == [1]


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


def test_disabled_writes_nothing(tmp_path: Path) -> None:
    sink = make_sink(tmp_path / "run", mode="disabled")
    sink.write(1, record_of(1))
    sink.close()
    assert not (tmp_path / "run").exists()


def test_online_without_a_key_is_one_message(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"logging\.wandb: got 'online'.*WANDB_API_KEY"):
        make_sink(tmp_path, mode="online")


ONLINE = """
import sys, time
from moe.config import LoggingConfig
from moe.errors import UserError
from moe.train import wandb_sink
wandb_sink._CONNECT_SECONDS = 2.0
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
    from moe.train.wandb_sink import _check_can_log_in

    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example")
    (own_home / ".netrc").write_text("machine other.example login user password x\n")
    with pytest.raises(UserError):
        _check_can_log_in(wandb)
    (own_home / ".netrc").write_text(f"machine wandb.example login user password {'k' * 40}\n")
    _check_can_log_in(wandb)


def test_a_missing_wandb_is_one_sentence_with_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="pip install wandb"):
        make_sink(tmp_path)


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


def test_scalars_hold_no_arrays_and_no_more_than_three_numbers_for_a_layer() -> None:
    num_layers, num_experts = 32, 16
    load_LE = np.full((num_layers, num_experts), 1 / num_experts).tolist()
    values = scalars(
        {"step": 1, "kind": "train", "router/load_LE": load_LE,
         "router/entropy_L": [2.0] * num_layers, "loss": math.nan}
    )  # fmt: skip
    assert len(values) == 3 * num_layers + 1
    assert all(isinstance(value, float) for value in values.values())
    assert values["router/layer_31/max_load"] == 1.0
    assert scalars({"router/load_LE": [[], []], "router/entropy_L": None}) == {}


def test_the_picture_shows_dead_ideal_and_crowded_experts_apart() -> None:
    picture = load_picture(np.array([[0.0, 0.25, 0.75, 0.0], [0.125, 0.25, 0.25, 0.375]]))
    size = picture.shape[0] // 2
    assert picture.shape == (2 * size, 4 * size, 3)
    cells = picture[size // 2 :: size, size // 2 :: size]
    assert cells[0, 0].tolist() == [0, 0, 0]
    assert cells[0, 1].tolist() == [255, 255, 255]
    assert cells[0, 2].tolist() == [5, 48, 97]
    assert cells[1, 0][0] > cells[1, 0][2], "orange is less than ideal"
    assert cells[1, 3][2] > cells[1, 3][0], "blue is more than ideal"
