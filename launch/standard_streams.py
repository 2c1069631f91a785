"""Closed standard streams, and readers that go away, do not end a run of days.

`| head`, a killed `| tee`, a lost terminal and a full disk behind `> log` take the console from a
run, not its steps: what it says is in metrics.jsonl and in the run folder as well.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from typing import Any, TextIO

_NAMES = {1: "standard output", 2: "standard error"}
# nobody will ever read again; any other refusal (a full disk) may pass
_GONE = (errno.EPIPE, errno.EIO, errno.EBADF, errno.ENXIO, errno.ESTALE)


def keep_standard_streams() -> None:
    """Open what is closed on the null device, and let stdout and stderr drop what nobody takes."""
    open_missing()
    sys.stdout = _lasting(sys.stdout)
    sys.stderr = _lasting(sys.stderr)


def take_any_text() -> None:
    """Have characters that the streams' encoding lacks printed as escapes, not end a command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def open_missing() -> None:
    """Put the null device where one of the descriptors 0 to 2 is closed.

    Else the next file or socket that is opened has that number, and gets what is printed.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            # the lowest free number is this one; programs that are started have it, too
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    if sys.stdin is None:
        sys.stdin = open(0, closefd=False)  # noqa: SIM115 (as long as the process)
    if sys.stdout is None:
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115


def _lasting(stream: TextIO) -> TextIO:
    """The same stream, written to in a way that never raises."""
    if not isinstance(stream, io.TextIOWrapper):
        return stream
    stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(_LastingFile(stream.fileno())),
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


class _LastingFile(io.FileIO):
    """A standard stream that takes everything; what cannot be written is said once, elsewhere."""

    def __init__(self, number: int) -> None:
        super().__init__(number, "w", closefd=False)
        self._has_said = False

    def write(self, data: Any, /) -> int | None:
        try:
            return super().write(data)
        except OSError as error:
            self._drop(error)
            return memoryview(data).nbytes

    def _drop(self, error: OSError) -> None:
        number = self.fileno()
        if error.errno in _GONE:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, number)
            os.close(null)
        if self._has_said:
            return
        self._has_said = True
        line = (
            f"note: {_NAMES.get(number, 'a stream')} cannot be written any more "
            f"({error.strerror}); the run goes on, and its folder has all that it would say.\n"
        )
        with contextlib.suppress(OSError):
            os.write(3 - number, line.encode())
