"""Processes that tests start have the default signals, in the foreground and in the background."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_children_of_a_session_in_the_background_can_be_interrupted(tmp_path):
    test = tmp_path / "test_child.py"
    child = (
        "import signal; print([signal.getsignal(n) in (signal.SIG_DFL, signal.default_int_handler)"
        " for n in (signal.SIGINT, signal.SIGHUP)])"
    )
    test.write_text(
        "import subprocess, sys\n\n\ndef test_child():\n"
        f"    made = subprocess.run([sys.executable, '-c', {child!r}], capture_output=True)\n"
        "    assert made.stdout == b'[True, True]\\n', made\n"
    )

    def ignore() -> None:
        for number in (signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)

    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(ROOT),
         "-c", str(ROOT / "pyproject.toml"), "--confcutdir", str(ROOT / "tests"),
         "-p", "conftest", str(test)],
        cwd=ROOT / "tests", preexec_fn=ignore, capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
