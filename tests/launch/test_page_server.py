"""launch/page_server.py: who is let in, asked over real HTTP and a real WebSocket's handshake."""

from __future__ import annotations

import http.client
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOKEN = "known-to-its-owner"
WEBSOCKET = {
    "Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
}  # fmt: skip


@pytest.fixture(scope="module")
def port(tmp_path_factory) -> Iterator[int]:
    """The port of a server whose page no test opens."""
    pytest.importorskip("marimo")
    folder = tmp_path_factory.mktemp("page")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "kernels"))),
        "XDG_CONFIG_HOME": str(folder), "EXPLORE_PAGE": str(folder / "none.json"),
    }  # fmt: skip
    with subprocess.Popen(
        [sys.executable, "-P", str(ROOT / "launch" / "page_server.py"), str(port)],
        env=environment, cwd=folder, stdin=subprocess.PIPE, text=True,
    ) as server:  # fmt: skip
        assert server.stdin is not None
        try:
            server.stdin.write(TOKEN)
            server.stdin.close()
            until = time.monotonic() + 90
            while server.poll() is None and time.monotonic() < until:
                with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                    break
                time.sleep(0.1)
            yield port
        finally:
            server.terminate()


def _asked(port: int, path: str, **headers: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    with closing(connection):
        connection.request("GET", path, headers={"Host": f"127.0.0.1:{port}"} | headers)
        with connection.getresponse() as answer:
            # an accepted WebSocket does not end by itself
            return answer.status, "" if answer.status == 101 else answer.read().decode()


def test_the_owner_of_the_token_is_let_in_under_each_name_of_this_machine(port: int) -> None:
    opened = f"/?access_token={TOKEN}"
    for name in ("127.0.0.1", "localhost", "[::1]", "LOCALHOST"):
        assert _asked(port, opened, Host=f"{name}:{port}")[0] in (200, 303)
    assert _asked(port, opened, Origin=f"http://localhost:{port}")[0] in (200, 303)
    assert _asked(port, "/api/status")[0] == 401


@pytest.mark.parametrize("path", [f"/?access_token={TOKEN}", "/health", "/auth/login"])
def test_another_name_or_origin_is_refused_even_with_the_token(port: int, path: str) -> None:
    for host in ("evil.example", f"evil.example:{port}", "127.0.0.1", f"127.0.0.1:{port + 1}", ""):
        status, said = _asked(port, path, Host=host)
        assert (status, said.count("\n")) == (403, 1)
        assert "evil" not in said
    for origin in ("http://evil.example", "null", f"https://localhost:{port}",
                   "http://localhost:1", ""):  # fmt: skip
        assert _asked(port, path, Origin=origin)[0] == 403


def test_a_websocket_of_another_origin_is_refused_at_its_handshake(port: int) -> None:
    path = f"/ws?session_id=s_abcdef&access_token={TOKEN}"
    assert _asked(port, path, **WEBSOCKET, Origin="http://evil.example")[0] == 403
    assert _asked(port, path, **WEBSOCKET, Host=f"evil.example:{port}")[0] == 403
    assert _asked(port, path, **WEBSOCKET, Origin=f"http://127.0.0.1:{port}")[0] == 101
