"""How the watch's processes talk: one JSON object a line, over sockets; and the file of faults.

Standard library only. Nothing that arrives is trusted: what is not a short JSON object with a
"kind" is BadLine, and the connection is closed.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from typing import Any

Message = dict[str, Any]

MAX_LINE_BYTES = 64 * 1024
MAX_HELLO_BYTES = 1024  # before a connection has shown the token
FAULTS_NAME = "faults.jsonl"


class BadLine(Exception):
    """What arrived is not of this protocol."""


class Lines:
    """A socket that is read without waiting and written in whole lines."""

    def __init__(self, connection: socket.socket, *, limit_bytes: int = MAX_LINE_BYTES) -> None:
        connection.setblocking(False)
        self.connection = connection
        self.limit_bytes = limit_bytes
        self.is_open = True  # for reading
        self._rest = b""

    def send(self, message: Message) -> bool:
        """Send one line; False if the other side is gone, or has not read for very long."""
        return send_line(self.connection, message)

    def receive(self) -> list[Message]:
        """Return the messages that have arrived; is_open turns False at the end of the stream.

        Raises BadLine.
        """
        while True:
            try:
                piece = self.connection.recv(65536)
            except BlockingIOError:
                break
            except OSError:
                piece = b""
            if not piece:
                self.is_open = False
                break
            self._rest += piece
            if len(self._rest) > 2 * self.limit_bytes:
                break  # a flood is judged line by line below, not gathered first
        *lines, self._rest = self._rest.split(b"\n")
        if len(self._rest) > self.limit_bytes:
            raise BadLine
        return [self._read(line) for line in lines]

    def close(self) -> None:
        """Close the socket."""
        self.is_open = False
        self.connection.close()

    def _read(self, line: bytes) -> Message:
        if len(line) > self.limit_bytes:
            raise BadLine
        try:
            message = json.loads(line)
        except (ValueError, RecursionError):
            raise BadLine from None
        if not isinstance(message, dict) or not isinstance(message.get("kind"), str):
            raise BadLine
        return message


def send_line(connection: socket.socket, message: Message) -> bool:
    """Send one line on a socket of any kind; False if it cannot be sent whole."""
    raw = json.dumps(message).encode() + b"\n"
    try:
        return connection.send(raw) == len(raw)
    except OSError:
        return False


def say(line: str) -> None:
    """Say one line on stderr, if anybody can hear it: ranks are ended whether or not."""
    with contextlib.suppress(OSError):
        os.write(2, f"watch: {line}\n".encode(errors="replace"))


def append_fault(run_dir: str, fault: Message) -> None:
    """Add one line to run_dir/faults.jsonl; a folder that cannot be written loses only that."""
    line = json.dumps({"time": round(time.time(), 3), **fault}) + "\n"
    with contextlib.suppress(OSError):
        os.makedirs(run_dir, exist_ok=True)
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        descriptor = os.open(os.path.join(run_dir, FAULTS_NAME), flags, 0o644)
        try:
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)
