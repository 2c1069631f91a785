"""May this run start here? Asked by all ranks together, before anything is built or written."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

from moe.errors import ConfigError, UserError
from moe.parallel.processes import Processes
from moe.train.run_place import taken_place


@contextlib.contextmanager
def run_folder(run_dir: str, processes: Processes, *, may_rename: bool) -> Iterator[Path]:
    """Yield the folder that this run alone has until the block ends; rank 0 takes it for all.

    may_rename: as in taken_place. Raises the same ConfigError on every rank.
    """
    with contextlib.ExitStack() as stack:
        told = {"folder": "", "error": ""}
        if processes.is_first:
            try:
                taken = stack.enter_context(taken_place(run_dir, may_rename=may_rename))
                told["folder"] = str(taken)
            except UserError as error:
                told["error"] = str(error)
            except OSError as error:
                told["error"] = (
                    f"paths.run_dir: cannot write {error.filename or run_dir}: {error.strerror}. "
                    "Free space there, or set paths.run_dir to a place that you may write."
                )
        told = json.loads(processes.from_first(json.dumps(told)))
        if told["error"]:
            raise ConfigError(told["error"])
        yield Path(told["folder"])
