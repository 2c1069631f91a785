"""python launch/log_trace.py: a checkpoint's trace becomes an offline W&B run, or one message."""

from __future__ import annotations

import shutil
from typing import Any


def test_a_trace_of_a_checkpoint_is_logged_with_the_command_that_sends_it(
    command: Any, workplace: Any, tmp_path: Any
) -> None:
    place = workplace.copy(tmp_path / "place").folder
    arguments = ("run=runs/a", "target=traces/a", "max_tokens=500")
    assert command("trace", *arguments, cwd=place).returncode == 0
    done = command("log_trace", "trace=traces/a", "logging.group=nano", cwd=place)
    assert done.returncode == 0, done.stderr
    [folder] = (place / "traces" / "a" / "wandb").glob("offline-run-*")
    assert done.stdout.splitlines()[-1] == f"send it with: wandb sync {folder.relative_to(place)}"
    [log] = folder.glob("*.wandb")
    content = log.read_bytes()
    for text in (b"routing-trace", b"part-00000.parquet", b"nano_moe", b"nano"):
        assert text in content
    assert str(place).encode() not in content, "where the trace lies is not told"
    again = command("trace", *arguments, cwd=place)
    assert again.returncode == 0, "W&B's folder is not taken for a part of the trace"
    shutil.rmtree(place / "traces")


def test_mistakes_are_one_message_each(command: Any, workplace: Any, tmp_path: Any) -> None:
    (tmp_path / "empty").mkdir()
    for arguments, expected in (
        ((), "trace: not given"),
        (("trace=nowhere",), "'nowhere' does not exist"),
        (("trace=empty",), "empty"),
        (("trace=empty", "logging=disabled"), "logging.wandb: got 'disabled'"),
        (("trace=empty", "logging.upload_trace_mib=-1"), "logging.upload_trace_mib: got -1"),
        (("trace=empty", "loging=offline"), "loging"),
    ):
        done = command("log_trace", *arguments, cwd=tmp_path)
        assert done.returncode == 2, arguments
        assert done.stderr.count("error: ") == 1, done.stderr
        assert expected in done.stderr
        assert "Traceback" not in done.stderr
    assert list(tmp_path.rglob("*wandb*")) == []
