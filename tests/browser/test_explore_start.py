"""How launch/explore.py starts, and what it says where it cannot: before any page."""

from __future__ import annotations

import shutil
import signal
import socket
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from explore import _writable
from served_page import served

pytestmark = pytest.mark.slow


@pytest.fixture
def refuse(command, place) -> Callable[..., str]:
    """Call refuse(*words): the one message of a start that fails."""

    def of(*words: str, code: int = 2) -> str:
        done = command("explore", *words, "browser=false", cwd=place, timeout=60)
        assert done.returncode == code, done.stdout
        assert "Traceback" not in done.stderr
        assert "page: http" not in done.stdout
        return done.stderr

    return of


def test_a_trace_of_another_model_is_refused(refuse: Any) -> None:
    said = refuse("run=runs/r", "trace=traces/a")  # both of step 4
    assert "is of another model (SHA-256" in said
    assert "is of another model (run" in refuse("run=runs/a", "trace=runs/r/routing")


def test_the_trace_of_the_run_itself_is_taken(place, environment) -> None:
    with served(place, environment, "run=runs/r", "trace=traces/b") as address:
        assert address.startswith("http://127.0.0.1:")


def test_the_newest_run_is_taken_where_nothing_is_given_and_asked_for_where_there_is_none(
    place, environment, command, tmp_path
) -> None:
    with served(place, environment) as address:
        assert address.startswith("http://127.0.0.1:")
    done = command("explore", "browser=false", cwd=tmp_path, timeout=60)
    assert done.returncode == 2
    assert "run: not given" in done.stderr


def test_a_missing_folder_and_a_folder_of_something_else_say_so(refuse) -> None:
    assert "does not exist" in refuse("run=runs/none")
    assert "neither a run nor a trace" in refuse("run=texts")
    assert "compare: 'texts'" in refuse("trace=traces/a", "compare=texts")
    assert "port: got 70000" in refuse("trace=traces/a", "port=70000")


def test_what_is_counted_of_a_folder_that_cannot_be_written_lies_elsewhere(
    tmp_path, capsys
) -> None:
    assert _writable(tmp_path, Path("/nowhere")) == tmp_path
    assert list(tmp_path.iterdir()) == []
    assert _writable(Path("/proc"), tmp_path) == tmp_path  # not even root writes there
    assert "/proc cannot be written" in capsys.readouterr().err


def test_a_truncated_trace_is_refused_before_the_page_starts(refuse, place) -> None:
    shutil.copytree(place / "traces/a", place / "traces/cut", dirs_exist_ok=True)
    part = next((place / "traces/cut").glob("*.parquet"))
    part.write_bytes(part.read_bytes()[:-100])
    assert part.name in refuse("trace=traces/cut")


def test_a_page_that_is_told_to_end_takes_its_server_with_it(place, environment) -> None:
    with served(place, environment, "run=runs/a", end=signal.SIGTERM) as address:
        port = urlsplit(address).port
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=5)


def test_the_page_is_for_those_who_have_its_address(place, environment) -> None:
    with served(place, environment, "run=runs/a") as address:
        bare = address.partition("?")[0]
        assert _status(address) == 200
        others = [bare, f"{bare}?access_token=guessed", f"{bare}/api/status"]
        assert [_status(other) for other in others] == [401, 401, 401]
        assert _status(address, host="evil.example") == 403
        token = address.rpartition("=")[2]
        commands = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline")]
        assert not any(token.encode() in words for words in commands)


def _status(address: str, *, host: str | None = None) -> int:
    """What is answered to somebody new; a page that asks for the token counts as 401."""
    request = urllib.request.Request(address, headers={"Host": host} if host else {})
    opener = urllib.request.build_opener(
        urllib.request.ProxyHandler({}), urllib.request.HTTPCookieProcessor()
    )
    try:
        with opener.open(request, timeout=20) as answer:
            return 401 if "/auth/login" in answer.url else answer.status
    except urllib.error.HTTPError as error:
        return error.code
