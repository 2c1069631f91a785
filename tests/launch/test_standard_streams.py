"""Streams that are closed, or that nobody reads any more, take nothing with them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / "launch"
PROGRAM = """
import os, sys
sys.path.insert(0, sys.argv[1])
from standard_streams import keep_standard_streams
keep_standard_streams()
with open(sys.argv[2], "w") as file:
    assert file.fileno() > 2
    for _ in range(5):
        print("a line", flush=True)
        print("an error", file=sys.stderr, flush=True)
    assert sys.stdin.read() == ""
    file.write("done")
"""


def _run(done: Path, redirections: str, **kept: object) -> subprocess.CompletedProcess[str]:
    words = ["sh", "-c", f'exec "$@" {redirections}', "sh", sys.executable, "-c", PROGRAM]
    ended = subprocess.run(
        [*words, str(LAUNCH), str(done)], stdin=subprocess.DEVNULL, text=True, timeout=60, **kept
    )  # type: ignore[call-overload]
    assert ended.returncode == 0, ended.stderr
    assert done.read_text() == "done"
    return ended


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_closed_stream_is_the_null_device(closed: str, tmp_path: Path) -> None:
    said = _run(tmp_path / "done", closed, capture_output=True)
    assert said.stdout == ("" if ">&-" in closed.split() else "a line\n" * 5)
    assert said.stderr == ("" if "2>&-" in closed else "an error\n" * 5)


def test_a_pipe_whose_reader_is_gone_is_dropped_and_said_once(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    said = _run(tmp_path / "done", "", stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert said.stderr.count("note: standard output cannot be written any more (Broken pipe)") == 1
    assert said.stderr.count("an error") == 5


def test_a_full_disk_behind_the_log_ends_nothing(tmp_path: Path) -> None:
    said = _run(tmp_path / "done", ">/dev/full", stderr=subprocess.PIPE)
    assert said.stderr.count("No space left on device") == 1
    said = _run(tmp_path / "done", "2>/dev/full", stdout=subprocess.PIPE)
    assert said.stdout.count("a line") == 5
