"""What is said about a damaged checkpoint: the folder, the file, the reason, and what to do."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from moe.errors import CheckpointError

WHAT_TO_DO = (
    "Restore the file from a copy, or delete this folder: the checkpoint before it is used then."
)


@contextlib.contextmanager
def about(folder: Path, name: str) -> Iterator[None]:
    """Turn an OSError or ValueError into one CheckpointError about a file of a checkpoint."""
    try:
        yield
    except (OSError, ValueError) as error:
        where = f"{folder}: {name}: " if name else f"{folder}: "
        raise CheckpointError(f"{where}{reason(error)}. {WHAT_TO_DO}") from error


def reason(error: OSError | ValueError) -> str:
    """What is wrong, without the file's name."""
    if isinstance(error, FileNotFoundError):
        return "it is missing"
    if isinstance(error, OSError) and error.strerror:
        return f"it cannot be read ({error.strerror})"
    return str(error)
