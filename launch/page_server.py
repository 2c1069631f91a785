"""The server of the page: marimo's app behind a door that other sites' pages do not pass.

Started by launch/explore.py as `python launch/page_server.py PORT`, with the page's token on its
standard input and the page's file in EXPLORE_PAGE. A page of another site that the same browser
shows reaches this port, too: by a name that it lets point here (DNS rebinding), or by a request of
its own. Such requests name another host or come from another origin, whatever else they know.
"""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

HOST = "127.0.0.1"  # never another: whoever reaches the page sees the text of the trace
_APP = Path(__file__).resolve().parent.parent / "analysis" / "explore" / "app.py"
_NAMES = ("localhost", HOST, "[::1]")
_KEEP_ALIVE_SECONDS = 300  # a page that is looked at is not connected anew for each click

_Message = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[_Message]]
_Send = Callable[[_Message], Awaitable[None]]
_Application = Callable[[_Message, _Receive, _Send], Awaitable[None]]


def guarded(application: _Application, *, port: int) -> _Application:
    """The ASGI application, for requests and WebSockets that are meant for this address only.

    Any other Host, and any Origin but the page's own, is answered with 403 and one line; where
    there is no Origin, Host alone is asked: browsers leave it out of what a person opens.
    """
    hosts = {f"{name}:{port}" for name in _NAMES}
    origins = {f"http://{host}" for host in hosts}

    async def answer(scope: _Message, receive: _Receive, send: _Send) -> None:
        if scope["type"] == "lifespan":
            await application(scope, receive, send)
            return
        asked = [value.decode("latin-1").lower() for name, value in scope["headers"]
                 if name.lower() == b"host"]  # fmt: skip
        came_from = [value.decode("latin-1").lower() for name, value in scope["headers"]
                     if name.lower() == b"origin"]  # fmt: skip
        if len(asked) == 1 and asked[0] in hosts and origins.issuperset(came_from):
            await application(scope, receive, send)
        elif scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1008})  # before accept: 403
        else:
            await _refuse(send, address=f"http://{HOST}:{port}")

    return answer


async def _refuse(send: _Send, *, address: str) -> None:
    body = f"Refused: this page is at {address}, for requests of its own only.\n".encode()
    headers = [(b"content-type", b"text/plain"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 403, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def serve(port: int, *, token: str) -> None:
    """Answer on this port until a signal ends it."""
    import marimo
    import uvicorn

    builder = marimo.create_asgi_app(quiet=True, token=token, skew_protection=True)
    application = builder.with_app(path="", root=str(_APP)).build()
    uvicorn.run(
        guarded(application, port=port),  # type: ignore[arg-type] # both are ASGI's, spelt twice
        host=HOST,
        port=port,
        log_level="error",
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=1,
        ws_ping_interval=1,
        ws_ping_timeout=60,
    )


if __name__ == "__main__":
    serve(int(sys.argv[1]), token=sys.stdin.read())
