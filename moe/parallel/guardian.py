"""One small process beside each rank: finds the rank dead, stopped or hung, and ends it.

`python -m moe.parallel.guardian SOCKET PAGE [LISTENER]` is started by moe/parallel/watch.py, which
gives it these file descriptors. It lives as long as its rank and no longer; signals meant for the
job do not end it. Standard library only: 40 ms of CPU time to start, 9 MB of memory of its own.
"""

from __future__ import annotations

import contextlib
import json
import selectors
import signal
import socket
import sys
import time

from moe.parallel.watch_hub import Hub, make_room
from moe.parallel.watch_lines import BadLine, Lines, Message, say
from moe.parallel.watch_page import Page
from moe.parallel.watch_rank import RankMonitor, Seen
from moe.parallel.watch_verdict import AGREE_SECONDS, ECHO_SECONDS, Limits, RankState

CONNECT_SECONDS = 10.0
# a rank that is told ends itself at once, if its threads run; one that raises may finish its exit
_TOLD_SECONDS = 1.5
_RAISED_SECONDS = 10.0
_LEAVE_SECONDS = 2.0  # in which the guardians take leave of the hub
_JOB_SIGNALS = ("SIGHUP", "SIGINT", "SIGQUIT", "SIGTERM", "SIGUSR1", "SIGUSR2", "SIGXCPU")


def tick_seconds(silent_seconds: float) -> float:
    """How often a rank gives a sign of life and its guardian looks: 0.25 to 5 s."""
    return min(silent_seconds / 4, 5.0)


class Guardian:
    """Watches one rank and speaks with the hub, which in rank 0's guardian is a part of it."""

    def __init__(self, rank_lines: Lines, page: Page, start: Message) -> None:
        now = time.monotonic()
        self.rank: int = start["rank"]
        self.tick = tick_seconds(start["silent_seconds"])
        self.limits = Limits(start["silent_seconds"], start["stuck_seconds"])
        self.lines = rank_lines
        self.monitor = RankMonitor(start["pid"], page, now=now)
        self.page = page
        self.selector = selectors.DefaultSelector()
        self.selector.register(rank_lines.connection, selectors.EVENT_READ, self._hear_rank)
        if self.monitor.pidfd is not None:
            self.selector.register(self.monitor.pidfd, selectors.EVENT_READ, self._find_end)
        self.launcher: int = start["launcher"]  # 0: its end is no fault
        self.hub: Hub | None = None
        self.link: Lines | None = None
        self.hub_heard_at = now
        self.is_watching = False  # from "go" on: all guardians have joined
        self.is_leaving = False  # the rank has said that it is done, or raises
        self.is_done = False
        self.is_gone = False
        self.is_over = False
        self.kill_at: float | None = None
        self.stop_at: float | None = None  # the hub's last moment once its rank is gone

    def run(self) -> None:
        """Look, listen and judge until the rank is gone or the watch is over."""
        last = time.monotonic()
        next_look = last
        while not self._is_finished():
            now = time.monotonic()
            if now - last > 2 * self.tick + 1.0:
                self._forgive(now - last, now)
            last = now
            if now >= next_look:
                next_look = now + self.tick
                self._look(now)
            self._judge(now)
            for key, _ in self.selector.select(self._wait_seconds(next_look)):
                if self.selector.get_map().get(key.fd) is key:  # not closed by one before it
                    key.data(time.monotonic())
        self._take_leave()

    def _is_finished(self) -> bool:
        if not (self.is_over or self.is_gone):
            return False
        if self.hub is None:
            return True
        # a socket closed too early can lose what was sent last
        late = self.stop_at is not None and time.monotonic() >= self.stop_at
        return late or (self.hub.verdict is not None and self.hub.is_alone())

    def _take_leave(self) -> None:
        if self.link is None or not self.link.is_open:
            return
        with contextlib.suppress(OSError, BadLine):
            self.link.connection.shutdown(socket.SHUT_WR)
            self.link.receive()  # what lies unread at the close would reset the connection

    def _wait_seconds(self, next_look: float) -> float:
        # never above 5 Hz without an event
        soon = 0.2 if self._is_urgent() else self.tick
        return max(0.0, min(soon, next_look - time.monotonic()))

    def _is_urgent(self) -> bool:
        if self.kill_at is not None or self.stop_at is not None:
            return True
        return self.hub is not None and (
            self.hub.is_asking or any(state.end == "raised" for state in self.hub.table)
        )

    def _forgive(self, seconds: float, now: float) -> None:
        # this process was stopped as well: a suspended terminal job, a paused machine
        self.monitor.forgive(seconds)
        self.hub_heard_at = now
        if self.hub is not None:
            self.hub.forgive(now)

    def _look(self, now: float) -> None:
        if self.monitor.is_gone():
            self._find_end(now)
            return
        if not self.is_watching:
            self.monitor.restart(now)  # it gives no pulse yet: another guardian may be late
        seen = self.monitor.look(now)
        self._tell_hub(_status("status", seen), now)
        if self.launcher and seen.parent not in (0, self.launcher):
            self._tell_hub(_status("orphaned", seen), now)
        self.lines.send({"kind": "alive"})
        if self.hub is not None:
            self.hub.say_alive()
        elif self._has_lost_hub(seen, now):
            self._end_rank(
                f"rank 0's guardian was silent for {now - self.hub_heard_at:.1f} s (its machine or "
                f"the network is gone), and this rank stands still for {seen.stuck_seconds:.1f} s",
                now,
            )

    def _has_lost_hub(self, seen: Seen, now: float) -> bool:
        """A rank that moves on meets rank 0 in every step: then only the way to hear is lost."""
        silent = self.limits.silent
        is_lost = min(now - self.hub_heard_at, seen.stuck_seconds) >= silent
        return is_lost and self.kill_at is None

    def _judge(self, now: float) -> None:
        if self.hub is not None and self.is_watching:
            was_asking = self.hub.is_asking
            found = self.hub.judge(now)
            if self.hub.is_asking and not was_asking:
                self.lines.send({"kind": "where"})
            if found is not None:
                self._obey("fault" if found.line else "over", "", now)
        if self.kill_at is not None and now >= self.kill_at and not self.is_done:
            self.monitor.kill()

    def _hear_rank(self, now: float) -> None:
        if not self.lines.is_open:
            return
        try:
            messages = self.lines.receive()
        except BadLine:
            messages = []
        for message in messages:
            if message["kind"] == "go":
                self.is_watching = True
                continue
            self.is_leaving = self.is_leaving or message["kind"] in ("done", "raised")
            self.is_done = self.is_done or message["kind"] == "done"
            place = self.page.place()
            self._tell_hub(
                {**message, "step": place.step, "order": place.order, "phase": place.phase}, now
            )
        if not self.lines.is_open:
            # the rank's end shows elsewhere: a child of it may still hold the other end open
            self.selector.unregister(self.lines.connection)
            self.lines.close()

    def _find_end(self, now: float) -> None:
        if self.is_gone:
            return
        self._hear_rank(now)  # its last words explain its end
        self.is_gone = True
        if self.monitor.pidfd is not None:
            self.selector.unregister(self.monitor.pidfd)
        self._tell_hub(_status("died", self.monitor.look(now)), now)  # ignored if it took its leave
        self.stop_at = now + _LEAVE_SECONDS + (AGREE_SECONDS if self.is_leaving else ECHO_SECONDS)

    def _hear_hub(self, now: float) -> None:
        assert self.link is not None
        self.hub_heard_at = now
        try:
            messages = self.link.receive()
        except BadLine:
            self.link.is_open = False
            messages = []
        for message in messages:
            if message["kind"] == "where":
                self.lines.send(message)
            elif message["kind"] in ("fault", "over"):
                ranks = message.get("ranks", [])
                own = self.rank in ranks
                what = "this rank is at fault" if own else f"rank {_list(ranks)} is at fault"
                self._obey(message["kind"], what, now)
        if not self.link.is_open:
            self.selector.unregister(self.link.connection)
            self.link.close()
            if self.kill_at is None and not self.is_over:
                self._end_rank("rank 0's guardian is gone", now)

    def _obey(self, kind: str, what: str, now: float) -> None:
        if kind == "over":
            self.lines.send({"kind": "over"})
            self._stop(now)
        else:
            self._end_rank(what, now)

    def _end_rank(self, what: str, now: float) -> None:
        if not self.is_watching:
            self._stop(now)  # the rank itself says that it could not begin
            return
        if what:  # the hub has said it already
            say(f"ending rank {self.rank}: {what} (rank 0's output names the cause)")
        self.lines.send({"kind": "fault"})
        self.kill_at = now + (_RAISED_SECONDS if self.is_leaving else _TOLD_SECONDS)
        if self.is_done:
            self._stop(now)

    def _stop(self, now: float) -> None:
        self.is_over = True
        self.stop_at = now + _LEAVE_SECONDS

    def _tell_hub(self, message: Message, now: float) -> None:
        if self.hub is not None:
            self.hub.hear(self.rank, message, now)
        elif self.link is not None and self.link.is_open:
            self.link.send(message)


def _status(kind: str, seen: Seen) -> Message:
    return {
        "kind": kind,
        "step": seen.place.step,
        "order": seen.place.order,
        "phase": seen.place.phase,
        "stuck_seconds": seen.stuck_seconds,
        "silent_seconds": seen.silent_seconds,
        "is_stopped": seen.is_stopped,
    }


def _list(ranks: list[int]) -> str:
    return ", ".join(str(rank) for rank in ranks[:8]) + (", ..." if len(ranks) > 8 else "")


def main() -> None:
    """Join the hub, say "ready" or "failed" to the rank, and watch."""
    for name in _JOB_SIGNALS:
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    rank_socket, page, *listener = (int(number) for number in sys.argv[1:])
    with socket.socket(fileno=rank_socket) as connection:
        start = _read_start(connection)
        guardian = Guardian(Lines(connection), Page(page), start)
        try:
            _join(guardian, start, listener=listener)
        except (OSError, BadLine) as error:
            guardian.lines.send({"kind": "failed", "error": str(error) or type(error).__name__})
            return
        guardian.lines.send({"kind": "ready"})
        guardian.run()


def _read_start(connection: socket.socket) -> Message:
    connection.setblocking(True)
    with connection.makefile("rb") as file:
        line = file.readline()
    if not line:
        sys.exit(70)  # the rank is gone already
    return json.loads(line)


def _join(guardian: Guardian, start: Message, *, listener: list[int]) -> None:
    """Become the hub, or connect to it. Raises OSError or BadLine."""
    if start["rank"] == 0:
        make_room(start["world_size"])
        now = time.monotonic()
        table = [RankState(rank, heard_at=now) for rank in range(start["world_size"])]
        table[0].host, table[0].pid = start["host"], start["pid"]
        guardian.hub = Hub(
            start["token"],
            guardian.limits,
            start["run_dir"],
            table,
            guardian.selector,
            socket.socket(fileno=listener[0]) if listener else None,
        )
        guardian.hub.start()
        return
    connection = socket.create_connection((start["hub_host"], start["hub_port"]), CONNECT_SECONDS)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    hello = {"kind": "hello", "token": start["token"], "rank": start["rank"]}
    lines = Lines(connection)
    lines.send({**hello, "host": start["host"], "pid": start["pid"]})
    guardian.link = lines
    guardian.selector.register(connection, selectors.EVENT_READ, guardian._hear_hub)
    with selectors.DefaultSelector() as waiting:
        waiting.register(connection, selectors.EVENT_READ)
        waiting.select(CONNECT_SECONDS)
    welcome = lines.receive()
    if not welcome or welcome[0]["kind"] != "welcome":
        raise ConnectionError("rank 0's guardian does not answer")


if __name__ == "__main__":
    main()
