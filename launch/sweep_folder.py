"""A sweep leaves no folder in which there was no run: Hydra makes one before it has read all."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from omegaconf import DictConfig


@contextlib.contextmanager
def no_empty_sweep() -> Iterator[Callable[[DictConfig], None]]:
    """Yield what is to be told of each sweep's configuration before Hydra makes its folder.

    At the end Hydra's file there, which has the values as they were typed, and every folder that
    was made for nothing are removed.
    """
    folders: dict[Path, list[Path]] = {}

    def look_at(composed: DictConfig) -> None:
        folder = Path(str(composed.hydra.sweep.dir))
        if folder not in folders:
            above = (folder, *folder.parents)
            folders[folder] = [path for path in above if not path.exists()]

    try:
        yield look_at
    finally:
        for folder, made in folders.items():
            with contextlib.suppress(OSError):
                (folder / "multirun.yaml").unlink(missing_ok=True)
            for path in made:  # the innermost first
                with contextlib.suppress(OSError):  # it holds something
                    path.rmdir()
