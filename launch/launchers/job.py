"""What a launcher starts: the checked configuration, and the command line of every rank."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from moe.config import TrainConfig

TRAIN = Path(__file__).resolve().parent.parent / "train.py"


@dataclass(frozen=True)
class Job:
    """One training run that somebody asked to be launched.

    arguments are the user's own for launch/train.py, without launcher ones.
    """

    config: TrainConfig
    arguments: tuple[str, ...]

    def command(self, run_dir: str, *launcher: str) -> list[str]:
        """The command that goes on in run_dir; launcher: its launcher options, local if none.

        The run folder is given in words, so that every rank and every restart has the same one.
        """
        rest = [a for a in self.arguments if not a.lstrip("+~").startswith("paths.run_dir=")]
        options = launcher or ("launcher=local",)
        return [sys.executable, str(TRAIN), *rest, *options, override("paths.run_dir", run_dir)]

    @property
    def names_run_dir(self) -> bool:
        """Whether the user chose the run folder; else it has the time in its name."""
        return any(a.lstrip("+~").startswith("paths.run_dir=") for a in self.arguments)


def override(key: str, text: str) -> str:
    """key=text for Hydra's grammar, whatever characters text has."""
    escaped = text.replace("\\'", "\\\\'").replace("'", "\\'")
    return f"{key}='{escaped}'"


def without_launcher(arguments: list[str]) -> tuple[str, ...]:
    """The arguments that say what to train, not how to start it."""
    return tuple(a for a in arguments if not a.lstrip("+~").startswith(("launcher=", "launcher.")))
