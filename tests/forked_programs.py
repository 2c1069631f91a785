"""Python programs as processes of their own that need not import torch: forks of one that did.

Where a test is about the start of a program itself (its environment before any import, its
signals, its limits), it starts a fresh interpreter instead.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

_SERVER = Path(__file__).with_name("fork_server.py")
_START_SECONDS = 120.0


@dataclass
class ForkedProgram:
    """A program that was started; like subprocess.Popen, as far as tests use it."""

    args: list[str]
    pid: int
    status_pipe: int
    returncode: int | None = None

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, negative for a signal; subprocess.TimeoutExpired where it still runs."""
        if self.returncode is None:
            ready, _, _ = select.select([self.status_pipe], [], [], timeout)
            if not ready:
                assert timeout is not None
                raise subprocess.TimeoutExpired(self.args, timeout)
            said = os.read(self.status_pipe, 16)
            os.close(self.status_pipe)
            self.returncode = int(said) if said else -signal.SIGKILL  # the server was killed
        return self.returncode

    def kill(self) -> None:
        """End it at once, unless it has ended."""
        if self.returncode is None:
            try:
                self.wait(timeout=0)
            except subprocess.TimeoutExpired:
                os.kill(self.pid, signal.SIGKILL)


class ForkServer:
    """The process that has imported torch; it ends with the tests."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, str(_SERVER)], stdin=theirs, env=dict(environment)
            )
        self._socket.settimeout(_START_SECONDS)
        assert self._socket.recv(16) == b"ready", "fork_server.py did not start"

    def start(
        self,
        argv: Sequence[str],
        *,
        cwd: Path,
        env: Mapping[str, str],
        stdin: int | IO[Any],
        stdout: int | IO[Any],
        stderr: int | IO[Any],
    ) -> ForkedProgram:
        """Start the Python file argv[0] with the arguments after it, in cwd, with these streams."""
        request = json.dumps({"argv": [str(a) for a in argv], "cwd": str(cwd), "env": dict(env)})
        ours, theirs = os.pipe()
        streams = [s if isinstance(s, int) else s.fileno() for s in (stdin, stdout, stderr)]
        try:
            socket.send_fds(self._socket, [request.encode()], [*streams, theirs])
        finally:
            os.close(theirs)
        return ForkedProgram(list(argv), int(self._socket.recv(16)), ours)

    def run(
        self, argv: Sequence[str], *, cwd: Path, env: Mapping[str, str], stdin: str, timeout: float
    ) -> subprocess.CompletedProcess[str]:
        """As subprocess.run does with input, captured text output and a limit."""
        with (
            tempfile.TemporaryFile() as given,
            tempfile.TemporaryFile() as out,
            tempfile.TemporaryFile() as err,
        ):
            given.write(stdin.encode())
            given.seek(0)
            program = self.start(argv, cwd=cwd, env=env, stdin=given, stdout=out, stderr=err)
            try:
                code = program.wait(timeout)
            except subprocess.TimeoutExpired:
                program.kill()
                raise
            texts = [_text(file) for file in (out, err)]
        return subprocess.CompletedProcess(list(argv), code, *texts)

    def close(self) -> None:
        """End the server and what still runs of it."""
        self._socket.close()
        self._process.wait(timeout=30)


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode().replace("\r\n", "\n")
