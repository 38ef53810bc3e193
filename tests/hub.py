"""A server that speaks the Hugging Face Hub's protocol, for its real client: models, trees, files, redirects, limits.

Files are served from bytes; weights as large files (LFS: sha256, a redirect to a store on another port), others by
git's sha1. What goes wrong is set on `Hub`: statuses to answer first, where to break a connection, damage.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

COMMIT = "c0ffee" + 34 * "0"
OLD_COMMIT = "0ddba11" + 33 * "0"
TOKEN = "hf_secret"


@dataclass
class Request:
    """One that was received."""

    method: str
    path: str
    range: str | None
    authorization: str | None
    host: str


@dataclass
class Hub:
    """What is served, and how it misbehaves."""

    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    revisions: dict[str, str] = field(default_factory=lambda: {"main": COMMIT, "v1": OLD_COMMIT})
    gated: set[str] = field(default_factory=set)
    private: set[str] = field(default_factory=set)
    """Open to `TOKEN` alone."""
    statuses: list[tuple[int, dict[str, str]]] = field(default_factory=list)
    """Answered first, in this order, whatever is asked for."""
    file_statuses: list[tuple[int, dict[str, str]]] = field(default_factory=list)
    """Answered first where a file's content is asked for."""
    broken: list[int] = field(default_factory=list)
    """Bytes of a large file after which the connection breaks, for each of the first answers."""
    damaged: list[str] = field(default_factory=list)
    """Files that arrive with a wrong byte, once for each time that they are named."""
    requests: list[Request] = field(default_factory=list)
    url: str = ""
    store_url: str = ""

    def asked(self, text: str) -> list[Request]:
        """The GET requests whose path holds the text."""
        return [request for request in self.requests if request.method == "GET" and text in request.path]


def is_large(name: str) -> bool:
    """Whether a file is kept in the large file store."""
    return name.endswith((".safetensors", ".bin"))


def repository(folder: Path, **more: bytes) -> dict[str, bytes]:
    """The files of a model's folder."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()} | more


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Serve it on two free ports of loopback: the Hub and its store of large files."""

    class Handler(_Handler):
        pass

    Handler.hub = hub
    servers = [ThreadingHTTPServer(("127.0.0.1", 0), Handler) for _ in range(2)]
    hub.url = f"http://127.0.0.1:{servers[0].server_port}"
    # Another host by name, as the Hub's store is.
    hub.store_url = f"http://localhost:{servers[1].server_port}"
    threads = [threading.Thread(target=server.serve_forever, args=(0.01,)) for server in servers]
    for thread in threads:
        thread.start()
    yield hub
    for server, thread in zip(servers, threads, strict=True):
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def do_GET(self) -> None:
        hub, headers = self.hub, self.headers
        path, query = urlsplit(self.path).path, parse_qs(urlsplit(self.path).query)
        hub.requests.append(
            Request(self.command, path, headers.get("Range"), headers.get("Authorization"), headers.get("Host", ""))
        )
        if hub.statuses:
            status, more = hub.statuses.pop(0)
            return self._answer(status, headers=more)
        if path.startswith("/store/"):
            owner, name, file = path.removeprefix("/store/").split("/", 2)
            return self._file(f"{owner}/{name}", file)
        found = re.fullmatch(r"(?:/api/models)?/([\w-]+/[\w.-]+)(?:/(tree|resolve|revision)/(\w+)(?:/(.+))?)?", path)
        files = hub.repositories.get(found[1]) if found else None
        if found is None or files is None or (found[1] in hub.private and not self._knows_token()):
            return self._answer(401 if not self._knows_token() else 404, error="RepoNotFound")
        commit = hub.revisions.get(found[3] or "main", found[3])
        if commit not in hub.revisions.values():
            return self._answer(404, error="RevisionNotFound")
        match found[2]:
            case "tree":
                return self._json([self._entry(name, body) for name, body in files.items()])
            case "resolve":
                return self._resolve(found[1], str(commit), found[4], files)
        siblings = [self._sibling(name, body, "blobs" in query) for name, body in files.items()]
        return self._json({"id": found[1], "sha": commit, "siblings": siblings})

    do_HEAD = do_GET

    def _knows_token(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _entry(self, name: str, body: bytes) -> dict[str, Any]:
        entry = {"type": "file", "path": name, "size": len(body), "oid": _git_sha1(body)}
        return entry | ({"lfs": _lfs(body)} if is_large(name) else {})

    def _sibling(self, name: str, body: bytes, described: bool) -> dict[str, Any]:
        if not described:
            return {"rfilename": name}
        sibling = {"rfilename": name, "size": len(body), "blobId": _git_sha1(body)}
        return sibling | ({"lfs": _lfs(body)} if is_large(name) else {})

    def _resolve(self, repository: str, commit: str, name: str, files: dict[str, bytes]) -> None:
        hub = self.hub
        if repository in hub.gated:
            return self._answer(403, error="GatedRepo")
        if name not in files:
            return self._answer(404, error="EntryNotFound")
        if not is_large(name):
            return self._file(repository, name)
        described = {
            "X-Repo-Commit": commit,
            "X-Linked-Size": str(len(files[name])),
            "X-Linked-ETag": f'"{hashlib.sha256(files[name]).hexdigest()}"',
            "Location": f"{hub.store_url}/store/{repository}/{name}",
        }
        return self._answer(302, headers=described)

    def _file(self, repository: str, name: str) -> None:
        hub = self.hub
        body = hub.repositories[repository][name]
        etag = hashlib.sha256(body).hexdigest() if is_large(name) else _git_sha1(body)
        if self.command == "GET" and hub.file_statuses:
            status, more = hub.file_statuses.pop(0)
            return self._answer(status, headers=more)
        if self.command == "GET" and name in hub.damaged:
            hub.damaged.remove(name)
            body = body[:-1] + bytes([body[-1] ^ 1])
        start = int(found[1]) if (found := re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))) else 0
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        broken = hub.broken.pop(0) if self.command == "GET" and is_large(name) and hub.broken else None
        return self._answer(206 if start else 200, body[start:], headers, broken)

    def _json(self, content: object) -> None:
        self._answer(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _answer(
        self,
        status: int,
        body: bytes = b"",
        headers: dict[str, str] | None = None,
        broken: int | None = None,
        error: str | None = None,
    ) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(name, value)
        if error:
            self.send_header("X-Error-Code", error)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body if broken is None else body[:broken])
        if broken is not None:
            self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        pass


def _git_sha1(body: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(body) + body, usedforsecurity=False).hexdigest()


def _lfs(body: bytes) -> dict[str, Any]:
    return {
        "sha256": hashlib.sha256(body).hexdigest(),
        "oid": hashlib.sha256(body).hexdigest(),
        "size": len(body),
        "pointerSize": 130,
    }
