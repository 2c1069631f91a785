"""The errors that a user can fix: each is one message, shown without a traceback."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable


class UserError(Exception):
    """Not a bug: the message says what, where, what is allowed, the fix."""

    exit_code = 2


class ConfigError(UserError, ValueError):
    """A configuration value is wrong; the message starts with the key's full path."""


class DataError(UserError):
    """Text, tokens or a tokenizer on disk are missing, empty or damaged."""


class CheckpointError(UserError):
    """A checkpoint is missing, damaged, or belongs to another model."""


def nearest(word: str, known: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the closest known word, or an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""


def place_advice(error: OSError, key: str) -> str:
    """What helps where the disk refused to write: room, or another place; key is what names it."""
    is_full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return (
        f"{'Free space there, or set' if is_full else 'Set'} {key} to a place that you may write."
    )
