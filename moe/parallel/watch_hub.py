"""Rank 0's guardian as the hub: hears of every rank, judges, and tells all guardians.

The port is open to the machine's networks, so a connection must show the run's token in its first
line, within seconds; until then it can only be closed. Standard library only.
"""

from __future__ import annotations

import errno
import hmac
import resource
import selectors
import socket
from dataclasses import dataclass, field

from moe.parallel.watch_lines import (
    MAX_HELLO_BYTES,
    MAX_LINE_BYTES,
    BadLine,
    Lines,
    Message,
    append_fault,
    say,
)
from moe.parallel.watch_verdict import Limits, RankState, Verdict, judge

HELLO_SECONDS = 10.0
FRAMES_SECONDS = 1.0  # a pulse thread answers in milliseconds, if it can
_SPARE_CONNECTIONS = 64  # that have not shown the token yet


def make_room(world_size: int) -> None:
    """Raise this process's limit of open files to what a hub needs. Raises OSError."""
    needed = 2 * world_size + 2 * _SPARE_CONNECTIONS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(needed, hard), hard))
    else:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
    if hard != resource.RLIM_INFINITY and hard < world_size + _SPARE_CONNECTIONS:
        raise OSError(
            f"it may open {hard} files, and {world_size} ranks need {needed}: raise the hard limit "
            "(ulimit -Hn, LimitNOFILE) on rank 0's host"
        )


@dataclass
class _Connection:
    lines: Lines
    opened_at: float
    rank: int | None = None  # None: has not shown the token


@dataclass
class Hub:
    """The table of ranks and the connections of their guardians."""

    token: str
    limits: Limits
    run_dir: str
    table: list[RankState]
    selector: selectors.BaseSelector
    listener: socket.socket | None  # None with one process
    verdict: Verdict | None = None
    _connections: dict[int, _Connection] = field(default_factory=dict)  # by file descriptor
    _asked_at: float | None = None

    def start(self) -> None:
        """Begin to accept guardians."""
        if self.listener is not None:
            self.listener.setblocking(False)
            self.selector.register(self.listener, selectors.EVENT_READ, self.accept)

    def accept(self, now: float) -> None:
        """Take one new connection, which has shown nothing yet."""
        assert self.listener is not None
        try:
            connection, _ = self.listener.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                self._make_way()
            return
        strangers = [made for made in self._connections.values() if made.rank is None]
        if len(strangers) >= _SPARE_CONNECTIONS + len(self.table):
            self._drop(strangers[0])  # the oldest: guardians show the token at once
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        lines = Lines(connection, limit_bytes=MAX_HELLO_BYTES)
        made = self._connections[connection.fileno()] = _Connection(lines, now)
        self.selector.register(
            connection, selectors.EVENT_READ, lambda now: self._receive(made, now)
        )

    def _make_way(self) -> None:
        """Without descriptors: put out those without a token, or accept nobody any more."""
        strangers = [made for made in self._connections.values() if made.rank is None]
        for made in strangers:
            self._drop(made)
        if not strangers and self.listener is not None:
            # the socket would stay readable, and the loop would spin
            self.selector.unregister(self.listener)
            say("rank 0's guardian has no file descriptors left; raise `ulimit -n` there")

    def hear(self, rank: int, message: Message, now: float) -> None:
        """Take in one message of a rank's guardian; judging is the next tick's or the caller's."""
        state = self.table[rank]
        state.heard_at = now
        for name in ("step", "order", "phase", "stuck_seconds", "silent_seconds", "is_stopped"):
            if name in message:
                setattr(state, name, message[name])
        kind = message["kind"]
        if kind == "frames":
            state.frames = message["frames"]
        elif kind == "raised" and not state.end:
            state.end, state.raised_at = "raised", now
            state.error, state.is_echo = message["error"], message["is_echo"]
        elif kind in ("done", "died", "orphaned") and not state.end:
            state.end = kind

    def judge(self, now: float) -> Verdict | None:
        """Return a verdict the first time that there is one, after telling everybody."""
        for made in list(self._connections.values()):
            if made.rank is None and now - made.opened_at > HELLO_SECONDS:
                self._drop(made)
        if self.verdict is not None:
            return None
        found = judge(self.table, now=now, limits=self.limits)
        if found is not None and found.kind == "hung" and not self._has_frames(now):
            return None
        if found is None:
            self._asked_at = None
            return None
        self.verdict = found
        if found.line:
            say(found.line)
            append_fault(self.run_dir, found.record(self.table))
        self._tell_all({"kind": "fault" if found.line else "over", "ranks": found.ranks})
        return found

    def say_alive(self) -> None:
        """Give every guardian the hub's own sign of life."""
        self._tell_all({"kind": "alive"})

    def forgive(self, now: float) -> None:
        """The hub itself was stopped: nobody could be heard."""
        for state in self.table:
            state.heard_at = now

    def is_alone(self) -> bool:
        """Whether every guardian has taken its leave."""
        return all(made.rank is None for made in self._connections.values())

    @property
    def is_asking(self) -> bool:
        """Whether the own guardian must ask its rank for its frames, too."""
        return self._asked_at is not None

    def _has_frames(self, now: float) -> bool:
        if self._asked_at is None:
            self._asked_at = now
            for state in self.table:
                state.frames = None
            self._tell_all({"kind": "where"})
        running = [state for state in self.table if not state.end]
        have_all = all(state.frames is not None for state in running)
        return have_all or now - self._asked_at >= FRAMES_SECONDS

    def _tell_all(self, message: Message) -> None:
        for made in self._connections.values():
            if made.rank is not None:
                made.lines.send(message)

    def _receive(self, made: _Connection, now: float) -> None:
        try:
            for message in made.lines.receive():
                if made.rank is None:
                    self._admit(made, message, now)
                else:
                    self.hear(made.rank, message, now)
        except (BadLine, KeyError, TypeError, ValueError):
            self._drop(made)
            return
        if not made.lines.is_open:
            self._drop(made)

    def _admit(self, made: _Connection, hello: Message, now: float) -> None:
        """Take a connection as a rank's guardian. Raises BadLine."""
        token, rank = str(hello.get("token")), hello.get("rank")
        if not hmac.compare_digest(token.encode(), self.token.encode()):
            raise BadLine
        taken = {other.rank for other in self._connections.values()}
        if not isinstance(rank, int) or not 0 < rank < len(self.table) or rank in taken:
            raise BadLine
        state = self.table[rank]
        state.host, state.pid, state.heard_at = str(hello["host"]), int(hello["pid"]), now
        made.rank = rank
        made.lines.limit_bytes = MAX_LINE_BYTES
        made.lines.send({"kind": "welcome"})

    def _drop(self, made: _Connection) -> None:
        self._connections.pop(made.lines.connection.fileno(), None)
        self.selector.unregister(made.lines.connection)
        made.lines.close()
        if made.rank is not None and not self.table[made.rank].end:
            self.table[made.rank].end = "vanished"
