"""The hub's open port: guardians with the token come in, everything else is put out."""

from __future__ import annotations

import errno
import json
import selectors
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from moe.parallel.watch_hub import HELLO_SECONDS, Hub
from moe.parallel.watch_lines import MAX_LINE_BYTES, BadLine, Lines, append_fault
from moe.parallel.watch_verdict import Limits, RankState

TOKEN = "a secret of this run"
HELLO = {"kind": "hello", "token": TOKEN, "rank": 1, "host": "b", "pid": 7}


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    """A hub for three ranks on a free port of this machine."""
    now = time.monotonic()
    table = [RankState(rank, heard_at=now) for rank in range(3)]
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        selectors.DefaultSelector() as selector,
    ):
        made = Hub(TOKEN, Limits(60.0, 600.0), str(tmp_path), table, selector, listener)
        made.start()
        yield made
        for key in list(selector.get_map().values()):
            if key.fileobj is not listener:
                key.fileobj.close()  # type: ignore[union-attr]


def _connect(hub: Hub) -> socket.socket:
    assert hub.listener is not None
    connection = socket.create_connection(hub.listener.getsockname())
    _turn(hub)
    return connection


def _turn(hub: Hub) -> None:
    """Let the hub handle what has arrived."""
    while ready := hub.selector.select(0.01):
        for key, _ in ready:
            key.data(time.monotonic())


def _send(hub: Hub, connection: socket.socket, raw: bytes) -> bytes:
    """Send and return the answer; b"" when the hub has closed the connection."""
    connection.sendall(raw)
    _turn(hub)
    connection.settimeout(0.2)
    try:
        return connection.recv(4096)
    except ConnectionResetError:
        return b""


def _hello(**changes: object) -> bytes:
    return json.dumps({**HELLO, **changes}).encode() + b"\n"


def test_a_guardian_with_the_token_is_welcome(hub: Hub) -> None:
    with _connect(hub) as connection:
        assert json.loads(_send(hub, connection, _hello())) == {"kind": "welcome"}
        assert (hub.table[1].host, hub.table[1].pid) == ("b", 7)
        assert not hub.is_alone()


@pytest.mark.parametrize(
    "raw",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\n",  # TLS
        b"\x00" * 5000,
        b"[1, 2]\n",
        b'"text"\n',
        b"{}\n",
        b"[" * 900 + b"\n",
        _hello(token="guess"),
        _hello(token=None),
        _hello(token="\ud800"),
        _hello(token=TOKEN + " "),
        _hello(rank=0),
        _hello(rank=3),
        _hello(rank=-1),
        _hello(rank="1"),
        b'{"kind": "done"}\n',
    ],
)
def test_whatever_is_no_guardian_is_put_out(hub: Hub, raw: bytes) -> None:
    with _connect(hub) as connection:
        assert _send(hub, connection, raw) == b""
    assert [state.end for state in hub.table] == ["", "", ""]
    with _connect(hub) as connection:
        assert b"welcome" in _send(hub, connection, _hello())


def test_a_second_guardian_of_one_rank_is_put_out(hub: Hub) -> None:
    with _connect(hub) as first, _connect(hub) as second:
        assert b"welcome" in _send(hub, first, _hello())
        assert _send(hub, second, _hello()) == b""
        assert hub.table[1].end == ""


def test_a_connection_that_says_nothing_is_put_out_after_a_while(hub: Hub) -> None:
    with _connect(hub) as connection:
        connection.settimeout(0.2)
        hub.judge(time.monotonic() + HELLO_SECONDS - 1)
        with pytest.raises(TimeoutError):
            connection.recv(1)
        hub.judge(time.monotonic() + HELLO_SECONDS + 1)
        assert connection.recv(1) == b""


def test_many_silent_connections_do_not_keep_a_guardian_out(hub: Hub) -> None:
    silent = [_connect(hub) for _ in range(100)]
    assert len(hub.selector.get_map()) < 80
    with _connect(hub) as connection:
        assert b"welcome" in _send(hub, connection, _hello())
    for connection in silent:
        connection.close()


def test_a_guardian_that_leaves_without_a_word_has_vanished(hub: Hub) -> None:
    with _connect(hub) as connection:
        _send(hub, connection, _hello())
    _turn(hub)
    assert hub.table[1].end == "vanished"


def test_last_words_are_heard_before_the_end_of_the_connection(hub: Hub) -> None:
    with _connect(hub) as connection:
        _send(hub, connection, _hello())
        connection.sendall(b'{"kind": "died", "step": 4, "order": 1, "phase": "save"}\n')
    _turn(hub)
    assert (hub.table[1].end, hub.table[1].step, hub.table[1].phase) == ("died", 4, "save")


def test_a_fault_is_said_once_to_everybody(
    hub: Hub, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with _connect(hub) as one, _connect(hub) as two:
        _send(hub, one, _hello(rank=1))
        _send(hub, two, _hello(rank=2))
        hub.hear(2, {"kind": "died"}, time.monotonic())
        for _ in range(3):
            hub.judge(time.monotonic())
        for connection in (one, two):
            connection.settimeout(0.2)
            assert json.loads(connection.recv(4096)) == {"kind": "fault", "ranks": [2]}
    assert capfd.readouterr().err.count("died") == 1
    assert len((tmp_path / "faults.jsonl").read_text().splitlines()) == 1


def test_a_run_folder_that_cannot_be_written_does_not_stop_the_watch(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    append_fault(str(tmp_path / "file"), {"kind": "died"})
    append_fault(str(tmp_path / "new" / "folder"), {"kind": "died"})
    (line,) = (tmp_path / "new" / "folder" / "faults.jsonl").read_text().splitlines()
    assert json.loads(line)["kind"] == "died"


def test_lines_arrive_whole_however_they_are_cut() -> None:
    left, right = socket.socketpair()
    with left, right:
        lines = Lines(right)
        raw = b'{"kind": "one"}\n{"kind": "two", "text": "\xc3\xa9"}\n{"kind"'
        found = []
        for byte in raw:
            left.send(bytes([byte]))
            found += lines.receive()
        assert found == [{"kind": "one"}, {"kind": "two", "text": "é"}]
        left.sendall(b': "three"}\n')
        left.close()
        assert lines.receive() == [{"kind": "three"}]
        assert not lines.is_open


@pytest.mark.parametrize(
    "raw", [b"GET / HTTP/1.1\r\n", b"\xff\n", b"[1]\n", b"{}\n", b'{"kind": 1}\n']
)
def test_a_line_that_is_no_message_is_refused(raw: bytes) -> None:
    left, right = socket.socketpair()
    with left, right:
        left.sendall(raw)
        lines = Lines(right)
        with pytest.raises(BadLine):
            lines.receive()


def test_a_line_that_never_ends_is_refused() -> None:
    left, right = socket.socketpair()
    with left, right:
        lines = Lines(right)
        for _ in range(4):
            left.sendall(b"x" * (MAX_LINE_BYTES // 4))
            assert lines.receive() == []
        left.sendall(b"x")
        with pytest.raises(BadLine):
            lines.receive()


def test_a_peer_that_never_reads_does_not_block_the_hub() -> None:
    left, right = socket.socketpair()
    with left, right:
        lines = Lines(right)
        results = [lines.send({"kind": "alive", "text": "x" * 1000}) for _ in range(2000)]
        assert results[0]
        assert not results[-1]


def test_a_hub_without_descriptors_puts_strangers_out_and_then_accepts_nobody(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    strangers = [_connect(hub) for _ in range(3)]
    assert hub.listener is not None
    hub.selector.unregister(hub.listener)
    monkeypatch.setattr(hub, "listener", _FullListener())
    hub.selector.register(hub.listener, selectors.EVENT_READ, hub.accept)
    hub.accept(time.monotonic())
    assert len(hub.selector.get_map()) == 1  # the strangers are gone
    hub.accept(time.monotonic())
    assert not hub.selector.get_map()  # else it would be readable for ever, and the loop spin
    assert capfd.readouterr().err.count("no file descriptors left") == 1
    for one in (*strangers, hub.listener):
        one.close()


class _FullListener:
    """A socket that somebody waits at while this process has no descriptor left."""

    def __init__(self) -> None:
        self._own, self._other = socket.socketpair()

    def fileno(self) -> int:
        return self._own.fileno()

    def accept(self) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    def close(self) -> None:
        self._own.close()
        self._other.close()


def test_the_soft_limit_is_raised_and_a_hard_one_that_is_too_low_is_refused() -> None:
    program = (
        "import resource as r, sys\n"
        "from moe.parallel.watch_hub import make_room\n"
        "r.setrlimit(r.RLIMIT_NOFILE, (64, int(sys.argv[1])))\n"
        "make_room(512)\n"
        "print(r.getrlimit(r.RLIMIT_NOFILE)[0])"
    )

    def run(hard: int) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, "-S", "-c", program, str(hard)]
        root = str(Path(__file__).parents[3])
        return subprocess.run(words, env={"PYTHONPATH": root}, capture_output=True, text=True)

    assert run(4096).stdout == "1152\n"
    assert run(700).stdout == "700\n"
    refused = run(512)
    assert "it may open 512 files, and 512 ranks need 1152" in refused.stderr
