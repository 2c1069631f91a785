"""One host's part of the hostfile launcher: runs the command that comes on standard input.

The first line is JSON: working directory, environment, command. Then come names of signals, one a
line, for the command; the end of the input is SIGTERM, so nothing runs on when nobody listens.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress

# any that train.py knows; names alone, for nothing of ours is imported here
_FORWARDED = ("SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU", "SIGINT")


def main() -> int:
    """Return the command's exit code, 128 + n where signal n ended it."""
    order = json.loads(sys.stdin.readline())
    process = subprocess.Popen(
        order["command"], cwd=order["cwd"], env=os.environ | order["environment"],
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    threading.Thread(target=_forward_signals, args=(process,), daemon=True).start()
    code = process.wait()
    return code if code >= 0 else 128 - code


def _forward_signals(process: subprocess.Popen[bytes]) -> None:
    for line in sys.stdin:
        if line.strip() in _FORWARDED:
            _signal(process, line.strip())
    _signal(process, "SIGTERM")


def _signal(process: subprocess.Popen[bytes], name: str) -> None:
    with suppress(ProcessLookupError):  # it has just ended
        process.send_signal(signal.Signals[name])


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # a thread may still be reading
