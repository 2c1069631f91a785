"""A server on this machine that takes what W&B's clients send, and remembers all of it.

It answers the requests by which a run, its files and its artifacts are sent (GraphQL, the file
stream, and uploads to the addresses that it gave), as W&B 0.31 asks them. What it cannot know is
what the real server makes of the contents.
"""

from __future__ import annotations

import gzip
import json
import re
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class _QuietServer(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that ends while its connection waits for more is no error."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class WandbServer:
    """Use as a context manager; url is for WANDB_BASE_URL."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, bytes]] = []  # path and body, in order
        self.uploads: dict[str, bytes] = {}  # by the path of the upload
        self.operations: list[tuple[str, dict[str, Any]]] = []  # GraphQL name and variables
        self._server = _QuietServer(("127.0.0.1", 0), _handler_of(self))
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self) -> WandbServer:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def rows(self) -> dict[int, dict[str, Any]]:
        """step -> values of the history that came over the file stream."""
        rows: dict[int, dict[str, Any]] = {}
        for path, body in list(self.requests):
            if not path.endswith("/file_stream"):
                continue
            sent = json.loads(body).get("files") or {}
            for line in sent.get("wandb-history.jsonl", {}).get("content", ()):
                row = json.loads(line)
                rows[row["_step"]] = row
        return rows

    def named(self, operation: str) -> list[dict[str, Any]]:
        """The variables of every GraphQL request of that name."""
        return [variables for name, variables in list(self.operations) if name == operation]

    def answer(self, name: str, variables: dict[str, Any]) -> dict[str, Any]:
        """The data of a GraphQL answer."""
        if name == "UpsertBucket":
            project = {"id": "p", "name": "phimoe", "entity": {"id": "e", "name": "me"}}
            bucket = {"id": "b", "name": variables["name"], "project": project}
            bucket |= {"displayName": "", "historyLineCount": 0}
            return {"upsertBucket": {"bucket": bucket, "inserted": True}}
        if name == "CreateArtifact":
            made = {"id": "a", "state": "PENDING", "artifactSequence": {"latestArtifact": None}}
            return {"createArtifact": {"artifact": made}}
        if name == "CreateArtifactManifest":
            file = {"uploadUrl": f"{self.url}/manifest", "uploadHeaders": []}
            return {"createArtifactManifest": {"artifactManifest": {"id": "m", "file": file}}}
        if name == "CreateArtifactFiles":
            nodes = [self._upload(f["name"]) for f in variables["input"]["artifactFiles"]]
            return {"createArtifactFiles": {"files": {"edges": [{"node": n} for n in nodes]}}}
        if name == "CommitArtifact":
            return {"commitArtifact": {"artifact": {"id": "a", "digest": ""}}}
        if name == "CreateRunFiles":
            files = [{"name": f, "uploadUrl": f"{self.url}/run/{f}"} for f in variables["files"]]
            return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}
        if name == "Viewer":
            return {"viewer": {"id": "u", "entity": "me", "username": "me", "flags": "{}"}}
        # nothing is known of the run or of artifacts, and the server has no special feature
        return {"project": None}

    def _upload(self, name: str) -> dict[str, Any]:
        return {
            "storagePath": name, "uploadUrl": f"{self.url}/artifact/{name}", "uploadHeaders": [],
            "uploadMultipartUrls": None, "artifact": {"id": "a"},
        }  # fmt: skip


def _handler_of(server: WandbServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: Any) -> None:
            pass

        def do_GET(self) -> None:
            self._reply({})

        def do_PUT(self) -> None:
            body = self._body()
            server.requests.append((self.path, body))
            server.uploads[self.path] = body
            self._reply({})

        def do_POST(self) -> None:
            body = self._body()
            server.requests.append((self.path, body))
            if not self.path.endswith("/graphql"):
                self._reply({})
                return
            asked = json.loads(body)
            match = re.match(r"\s*(?:query|mutation)\s+(\w+)", asked["query"])
            name, variables = match[1] if match else "", asked.get("variables") or {}
            server.operations.append((name, variables))
            self._reply({"data": server.answer(name, variables)})

        def _body(self) -> bytes:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            return gzip.decompress(body) if body[:2] == b"\x1f\x8b" else body

        def _reply(self, content: dict[str, Any]) -> None:
            body = json.dumps(content).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    return Handler
