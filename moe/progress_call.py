"""How long work says that it moves on: a function, called with what is done since the last call.

Whoever reads, writes, hashes or computes for more than some seconds takes one and calls it for
every piece (bytes, rows, batches; the unit is the caller's). A run gives the watch's, so that slow
work is not taken for a hung rank; it costs a microsecond and may be called from any thread.
"""

from __future__ import annotations

from collections.abc import Callable

ProgressCall = Callable[[int], None]


def no_progress(amount: int) -> None:
    """For those who do not want to know."""
