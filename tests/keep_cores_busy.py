"""Run a command while other processes use every core: keep_cores_busy.py COMMAND [WORD ...]"""

from __future__ import annotations

import os
import subprocess
import sys

_SPIN = "while True: pass"


def main() -> int:
    """Return the command's exit status; the busy processes end with it."""
    cores = len(os.sched_getaffinity(0))
    busy = [subprocess.Popen([sys.executable, "-c", _SPIN]) for _ in range(cores)]
    try:
        return subprocess.run(sys.argv[1:], check=False).returncode
    finally:
        for process in busy:
            process.kill()
            process.wait(timeout=10)


if __name__ == "__main__":
    sys.exit(main())
