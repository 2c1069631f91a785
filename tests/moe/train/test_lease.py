"""One living run has a folder; a second is refused with its name, a dead one's lease counts not."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from moe.errors import ConfigError
from moe.train import lease
from moe.train.lease import LEASE_NAME, hold, refuse_if_held

HOLD = """
import sys, time
from pathlib import Path
import moe.train.lease as lease
if sys.argv[2] == "no locks":
    def refuse(*_): raise OSError(38, "Function not implemented")
    lease.fcntl.lockf = refuse
with lease.hold(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def holder(
    folder: Path, environment: dict[str, str], *, locks: str
) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lease, ended by the block's end at the latest."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder), locks], env=environment, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(params=["locks", "no locks"])
def locks(request, monkeypatch) -> str:
    """File systems with locks, and without (Lustre mounted without them, some of FUSE)."""
    if request.param == "no locks":

        def refuse(*_: object) -> None:
            raise OSError(errno.ENOSYS, "Function not implemented")

        monkeypatch.setattr(fcntl, "lockf", refuse)
    return request.param


def test_a_second_process_is_refused_and_told_of_the_first(tmp_path, environment, locks):
    with holder(tmp_path, environment, locks=locks) as first:
        before = (tmp_path / LEASE_NAME).read_bytes()
        for ask in (hold(tmp_path).__enter__, lambda: refuse_if_held(tmp_path)):
            with pytest.raises(ConfigError) as caught:
                ask()
            message = str(caught.value)
            assert f"process {first.pid} on {socket.gethostname()}" in message
            assert "give another paths.run_dir" in message
        assert (tmp_path / LEASE_NAME).read_bytes() == before
        first.communicate("")  # it ends by itself
        assert not (tmp_path / LEASE_NAME).exists()
    with hold(tmp_path):
        pass


def test_the_lease_of_a_killed_process_is_taken_over_at_once(tmp_path, environment, locks):
    with holder(tmp_path, environment, locks=locks) as first:
        first.send_signal(signal.SIGKILL)
        first.wait()
        assert (tmp_path / LEASE_NAME).exists()
        refuse_if_held(tmp_path)
        began = time.monotonic()
        with hold(tmp_path):
            mine = json.loads((tmp_path / LEASE_NAME).read_text())
        assert mine["pid"] == os.getpid()
        assert time.monotonic() - began < lease._OUTDATED_SECONDS  # nobody was waited for
    assert list(tmp_path.iterdir()) == []


def test_children_that_outlive_a_killed_run_do_not_keep_its_folder(tmp_path, environment):
    code = HOLD.replace(
        'print("held"', 'import os\n    if os.fork() == 0: time.sleep(60)\n    print("held"'
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path), "locks"], env=environment, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    with process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            process.kill()
            process.wait()
            with hold(tmp_path):
                pass
        finally:
            os.killpg(process.pid, signal.SIGKILL)


def lease_of_another_host(folder: Path, **changes: str) -> None:
    values = {
        "host": "node07", "machine": "node07 another boot", "pid": os.getpid(), "began": "1",
        "since": "2026-01-31 12:00:00", "job": "", "job_start": "0", "token": "ab",
    }  # fmt: skip
    (folder / LEASE_NAME).write_text(json.dumps(values | changes))


def test_one_of_another_host_counts_as_long_as_it_is_renewed(tmp_path, monkeypatch, locks):
    monkeypatch.setattr(lease, "_OUTDATED_SECONDS", 2.5)
    lease_of_another_host(tmp_path)
    with hold(tmp_path):  # was not renewed meanwhile
        pass
    lease_of_another_host(tmp_path)
    renew = "import os, sys, time\nwhile True: time.sleep(0.3); os.utime(sys.argv[1])"
    renewing = subprocess.Popen([sys.executable, "-c", renew, str(tmp_path / LEASE_NAME)])
    try:
        with pytest.raises(ConfigError, match="on node07, since 2026-01-31") as caught:
            hold(tmp_path).__enter__()
    finally:
        renewing.kill()
        renewing.wait()
    assert "gone for good, remove" in str(caught.value)


def test_a_job_that_its_scheduler_started_again_elsewhere_waits_for_nobody(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "_is_renewed", lambda path: pytest.fail("waited"))
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    lease_of_another_host(tmp_path, job="42", job_start="0")
    with hold(tmp_path):
        pass


@pytest.mark.parametrize("content", ["", "{", "[]", '{"host": 3}'])
def test_a_torn_or_strange_lease_stops_nobody(tmp_path, content, locks):
    (tmp_path / LEASE_NAME).write_text(content)
    refuse_if_held(tmp_path)
    with hold(tmp_path):
        pass
