"""The page of memory in which a rank leaves where it is, for its guardian to read at any time.

Memory and not messages: a rank that was killed, stopped or holds the interpreter's lock says
nothing any more, but where it was stands here. Standard library only.
"""

from __future__ import annotations

import mmap
import os
import struct
from typing import NamedTuple

_PAGE_BYTES = 4096
_PHASE_BYTES = 64
# changes so far, step, phases of this step so far, name of the phase
_PLACE = struct.Struct(f"<QqQ{_PHASE_BYTES}s")
_BEAT = struct.Struct("<Q")
_BEAT_AT = 2048  # far from the place: two threads write
_PROGRESS_AT = 1024


class Place(NamedTuple):
    """Where a rank is. Ranks call the same phases, so the lower (step, order) is behind."""

    changes: int
    step: int  # -1 before the first
    order: int  # which phase of the step, from 0
    phase: str


class Page:
    """One page, shared with a child process through a file descriptor."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._memory = mmap.mmap(descriptor, _PAGE_BYTES)
        self._changes = 0
        self._step = -1
        self._order = -1
        self._num_beats = 0
        self._progress = 0

    def close_descriptor(self) -> None:
        """Close the file descriptor, once the child has it; the memory stays."""
        os.close(self.descriptor)

    def set_place(self, phase: str, step: int | None) -> None:
        """Write the place; a step of None is the one before. 0.4 microseconds, no system call.

        The main thread only.
        """
        if step is not None and step != self._step:
            self._step = step
            self._order = -1
        self._order += 1
        self._changes += 1
        name = phase.encode()[:_PHASE_BYTES]
        _PLACE.pack_into(self._memory, 0, self._changes, self._step, self._order, name)

    def beat(self) -> None:
        """Write one sign of life; the pulse thread only."""
        self._num_beats += 1
        _BEAT.pack_into(self._memory, _BEAT_AT, self._num_beats)

    def add_progress(self, amount: int) -> None:
        """Write that work of this phase moves on; any thread, no system call.

        Two threads at once may lose one of two amounts, never the change.
        """
        self._progress += amount
        _BEAT.pack_into(self._memory, _PROGRESS_AT, self._progress % 2**64)

    def progress(self) -> int:
        """Read how much was done; only that it changes means something."""
        return int(_BEAT.unpack_from(self._memory, _PROGRESS_AT)[0])

    def num_beats(self) -> int:
        """Read how many signs of life there were."""
        return int(_BEAT.unpack_from(self._memory, _BEAT_AT)[0])

    def place(self) -> Place:
        """Read the place; a half-written one is read again."""
        raw = self._memory[: _PLACE.size]
        for _ in range(8):
            again = self._memory[: _PLACE.size]
            if again == raw:
                break
            raw = again
        changes, step, order, name = _PLACE.unpack(raw)
        return Place(changes, step, order, name.rstrip(b"\0").decode(errors="replace"))


def make_page() -> Page:
    """Make a page in memory (where there is no memfd: in a nameless temporary file)."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("phimoe_watch", os.MFD_CLOEXEC)
    else:
        import tempfile  # slow to import, and seldom needed

        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    os.ftruncate(descriptor, _PAGE_BYTES)
    return Page(descriptor)
