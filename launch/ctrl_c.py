"""Ctrl-C or SIGTERM while a command is still being imported: one line, and the status as ever."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from types import FrameType, TracebackType

_PROCESS = os.getpid()
_LINE = b"error: ended by SIGTERM.\n"


def _say(kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, where)
        return
    print("error: interrupted.", file=sys.stderr, flush=True)
    os._exit(130)


def _say_and_end(number: int, frame: FrameType | None) -> None:
    """End as if there were no handler; forked children and ranks of a launcher say nothing."""
    if os.getpid() == _PROCESS and "PHIMOE_EXIT_FOLDER" not in os.environ:
        with contextlib.suppress(OSError):
            os.write(2, _LINE)  # print would take a lock that the interrupted code may hold
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


sys.excepthook = _say
if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
    signal.signal(signal.SIGTERM, _say_and_end)
