"""What one rank sends and holds, measured from inside: bytes on its sockets, bytes of its tensors.

Linux only. The bytes of tensors are those of storages that operations of this thread made and that
are still alive; memory inside an operation (a library's own buffers) is not among them.
"""

from __future__ import annotations

import os
import socket
import stat
import struct
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# struct tcp_info of linux/tcp.h: tcpi_bytes_sent and tcpi_bytes_retrans, since Linux 4.19
_BYTES_SENT = struct.Struct("QQ")
_BYTES_SENT_OFFSET = 200
_TCP_INFO_SIZE = 256


def sent_bytes(*, without_port: int) -> int:
    """Bytes that this process has given to its open TCP connections so far, headers not counted.

    Connections to or from without_port (the store, whose clients look at it all the time) are left
    out.
    """
    total = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            if not stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                continue
            copy = os.dup(int(name))
        except OSError:
            continue  # closed meanwhile
        with socket.socket(fileno=copy) as connection:
            total += _sent_by(connection, without_port)
    return total


def _sent_by(connection: socket.socket, without_port: int) -> int:
    if connection.family not in (socket.AF_INET, socket.AF_INET6):
        return 0
    try:
        ports = connection.getsockname()[1], connection.getpeername()[1]
        info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_SIZE)
    except OSError:
        return 0  # it listens, or is no TCP
    if without_port in ports:
        return 0
    sent, again = _BYTES_SENT.unpack_from(info, _BYTES_SENT_OFFSET)
    return sent - again


class Alive(TorchDispatchMode):
    """Counts bytes of storages alive; `most` is the largest number since `start`.

    Storages that are alive before are counted only if given to `hold`. A storage of exactly
    ignored_bytes is left out: DeepSpeed's gradient bucket, which is as large for a tiny model as
    for a huge one and on a CPU is never touched beyond what is used.
    """

    def __init__(self, *, ignored_bytes: int = 0) -> None:
        super().__init__()
        self.now = self.most = self.ignored = 0
        self.calls: dict[str, list[int]] = {}  # collective: [calls, bytes of its tensors]
        self._held: dict[int, int] = {}
        self._ignored_bytes = ignored_bytes

    def start(self) -> None:
        """Forget the largest number and the collectives so far."""
        self.most, self.calls = self.now, {}

    def hold(self, tensors: Any) -> None:
        """Count storages that were made outside."""
        for tensor in tensors:
            self._hold(tensor.untyped_storage())

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if str(func).startswith("c10d."):
            self._count(str(func), args)
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
                self._hold(tensor.untyped_storage())
        return result

    def _count(self, name: str, args: Any) -> None:
        tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
        entry = self.calls.setdefault(name, [0, 0])
        entry[0] += 1
        entry[1] += sum(tensor.nbytes for tensor in tensors)

    def _hold(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._held or size == 0:
            return
        if size == self._ignored_bytes:
            self.ignored = size
            return
        self._held[key] = size
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.now -= self._held.pop(key, 0)
