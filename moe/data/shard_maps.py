"""Shards mapped when they are read, and only so many at a time, for a folder of any size.

A map holds no file descriptor, so the usual limit of 1,024 open files says nothing about the
number of shards, and the 65,530 maps that Linux allows a process are not reached either.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import mmap
import os
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moe.data.manifest import FileEntry
from moe.errors import DataError

MOST_MAPS = 4096  # a split's; of 65,530 for two splits and everything else


class ShardMaps(Sequence[np.ndarray]):
    """The tokens of each shard, (tokens,) each, read-only; the longest unused is let go."""

    def __init__(
        self,
        folder: Path,
        files: Sequence[FileEntry],
        item: np.dtype[Any],
        *,
        most: int = MOST_MAPS,
    ) -> None:
        self._folder, self._files, self._item, self._most = folder, files, item, most
        self._maps: OrderedDict[int, np.ndarray] = OrderedDict()

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, number: Any) -> Any:
        known = self._maps.get(number)
        if known is not None:
            self._maps.move_to_end(number)
            return known
        file = self._files[number]
        path = self._folder / file.name
        try:
            tokens = self._mapped(path, file.num_bytes)
        except OSError as error:
            reason = error.strerror or str(error)
            raise DataError(f"{path}: cannot be mapped ({reason}).") from None
        self._maps[number] = tokens
        if len(self._maps) > self._most:
            self._maps.popitem(last=False)
        return tokens

    def _mapped(self, path: Path, num_bytes: int) -> np.ndarray:
        try:
            return _map_file(path, num_bytes).view(self._item)
        except MemoryError:
            # a limit on maps or on address space that is lower than expected
            self._most = max(1, len(self._maps) // 2)
            self._maps.clear()
            try:
                return _map_file(path, num_bytes).view(self._item)
            except MemoryError as error:
                raise OSError(errno.ENOMEM, str(error)) from None


class _Map:
    """A mapped range of memory, which numpy reads; unmapped when no array needs it any more."""

    def __init__(self, address: int, num_bytes: int) -> None:
        self.__array_interface__ = {
            "version": 3,
            "typestr": "|u1",
            "shape": (num_bytes,),
            "data": (address, True),
        }  # fmt: skip; True: read-only
        # not at the end of the process: threads may still read
        weakref.finalize(self, _library().munmap, address, num_bytes).atexit = False


def _map_file(path: Path, num_bytes: int) -> np.ndarray:
    """The bytes of a file, mapped; Python's mmap would keep a descriptor for as long as it lives.

    Raises OSError, and MemoryError where only the room for maps is lacking.
    """
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        if os.fstat(handle).st_size != num_bytes:
            raise OSError(f"it has {os.fstat(handle).st_size} bytes, not {num_bytes}")
        address = _library().mmap(None, num_bytes, mmap.PROT_READ, mmap.MAP_SHARED, handle, 0)
        if address == ctypes.c_void_p(-1).value:
            number = ctypes.get_errno()
            if number == errno.ENOMEM:
                raise MemoryError(os.strerror(number))
            raise OSError(number, os.strerror(number))
    finally:
        os.close(handle)
    return np.asarray(_Map(address, num_bytes))


@functools.cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(None, use_errno=True)
    pointer, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    library.mmap.restype = pointer
    library.mmap.argtypes = [pointer, size, number, number, number, ctypes.c_long]
    library.munmap.argtypes = [pointer, size]
    return library
