"""What one of our commands makes of a typed line, asked in this process: an answer in a blink."""

from __future__ import annotations

import contextlib
import io
import os
import runpy
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import command
from hydra._internal.hydra import Hydra

LAUNCH = Path(__file__).resolve().parents[2] / "launch"


@dataclass(frozen=True)
class Answer:
    """How the command ended; config is what its task would have got, where the line was taken."""

    code: int
    stdout: str
    stderr: str
    config: Any = None

    @property
    def message(self) -> str:
        """The one message of a line that was refused."""
        assert self.config is None, f"taken: {self.config}"
        assert "Traceback" not in self.stderr, self.stderr
        assert self.stderr.count("error: ") == 1, self.stderr
        return self.stderr.partition("error: ")[2].strip()


class _TakenError(BaseException):
    """The line passed every check of a configuration; carries it past all handlers."""


def ask(name: str, arguments: Sequence[str], *, runs: bool = False) -> Answer:
    """Give launch/<name>.py these arguments, up to its task or, with runs, to the task's end."""
    out, err = io.StringIO(), io.StringIO()
    taken, code = None, 0
    checked = command._checked

    def stop_here(*composed: Any) -> Any:
        raise _TakenError(checked(*composed))

    with (
        mock.patch.object(command, "_checked", checked if runs else stop_here),
        # without a flag Hydra composes once more, only to ask whether a file says hydra.mode
        mock.patch.object(Hydra, "get_mode", return_value=None),
        mock.patch.object(sys, "argv", [str(LAUNCH / f"{name}.py"), *arguments]),
        mock.patch.dict(os.environ),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except _TakenError as passed:
            taken = passed.args[0]
        except SystemExit as leaving:
            code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
        except Exception:  # a bug: what the interpreter would print
            code = 1
            err.write(traceback.format_exc())
    return Answer(code, out.getvalue(), err.getvalue(), taken)
