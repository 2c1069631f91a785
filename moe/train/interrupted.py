"""What a run that Ctrl-C ended outside its steps is told: what is saved, and what goes on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from moe.errors import UserError
from moe.train.run_place import has_checkpoints


class RunInterrupted(UserError):
    """Ended by Ctrl-C where no step was under way that could be saved."""

    exit_code = 130


@contextlib.contextmanager
def telling_what_is_saved(run_dir: Path) -> Iterator[None]:
    """Raise RunInterrupted for KeyboardInterrupt inside, with what this run folder has then."""
    try:
        yield
    except KeyboardInterrupt:
        what = "Nothing is saved yet: the same command begins anew."
        if has_checkpoints(run_dir):
            what = f"The same command with paths.run_dir={run_dir} goes on from the last save."
        raise RunInterrupted(f"interrupted. {what}") from None
