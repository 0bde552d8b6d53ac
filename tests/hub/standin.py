"""A stand-in for the Hub's HTTP API: takes commits and remembers the files."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Hub(ThreadingHTTPServer):
    """Repositories by id: files by path, as the last commit left them; branches besides main as `id@branch`."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, dict[str, bytes]] = {}
        self.tokens: list[str | None] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        if self.path.startswith("/api/whoami"):
            self._answer({"name": "me", "type": "user", "auth": {}})
        else:
            self._answer({"id": self._repo(), "siblings": [], "sha": "0" * 40, "tags": []})

    def do_POST(self) -> None:
        self.server.tokens.append(self.headers.get("Authorization"))
        body = self._body()
        repo = self._repo()
        if self.path == "/api/repos/create":
            content = json.loads(body)
            name = "/".join(filter(None, (content.get("organization") or "me", content["name"].split("/")[-1])))
            self.server.repos.setdefault(name, {})
            self._answer({"url": f"{self.server.address}/{name}", "name": name})
        elif self.path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif "/branch/" in self.path:
            branch = f"{repo}@{self._last()}"
            taken = branch in self.server.repos
            self.server.repos.setdefault(branch, dict(self.server.repos[repo]))
            self._answer({}, 409 if taken else 200)
        elif self._branch(repo) not in self.server.repos:
            self._answer({"error": f"no revision {self._last()}"}, 404)
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            self._answer(
                {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
            )
        elif "/commit/" in self.path:
            for line in body.decode().splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    value = entry["value"]
                    self.server.repos[self._branch(repo)][value["path"]] = base64.b64decode(value["content"])
            commit = {"commitUrl": f"{self.server.address}/{repo}/commit/1", "commitOid": "1" * 40}
            self._answer(commit | {"pullRequestUrl": None})
        else:
            self._answer({"message": f"not there: {self.path}"}, 404)

    def _last(self) -> str:
        return self.path.split("?")[0].rsplit("/", 1)[-1]

    def _branch(self, repo: str) -> str:
        """Where the files of a request's revision are kept."""
        return repo if self._last() == "main" else f"{repo}@{self._last()}"

    def _repo(self) -> str:
        parts = self.path.split("?")[0].split("/")
        return "/".join(parts[3:5]) if self.path.startswith("/api/models/") else ""

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _answer(self, content: dict, status: int = 200) -> None:
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def standin() -> Iterator[Hub]:
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
