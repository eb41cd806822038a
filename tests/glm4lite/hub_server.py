"""A real HTTP server on loopback that answers as the Hugging Face Hub does where huggingface_hub downloads a model."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import unquote, urlsplit


@dataclass
class Repo:
    """A repo's files. `status` makes every request fail, `token` lets only its bearer in, `claimed` is a false size."""

    files: dict[str, bytes] = field(default_factory=dict)
    status: int = 200
    token: str = ""
    claimed: int = 0

    @property
    def sha(self) -> str:
        names = "\n".join(sorted(self.files))
        return hashlib.sha1(names.encode(), usedforsecurity=False).hexdigest()

    def entries(self) -> Iterator[tuple[str, bytes, str]]:
        """Name, content and git-like id of each file."""
        for name, data in self.files.items():
            yield name, data, hashlib.sha1(data, usedforsecurity=False).hexdigest()

    @classmethod
    def of(cls, folder: Path) -> Self:
        return cls({path.name: path.read_bytes() for path in folder.iterdir()})


class HubServer:
    """`with HubServer({"org/name": Repo(...)}) as hub: ... hub.url, hub.requests`."""

    def __init__(self, repos: dict[str, Repo]) -> None:
        self.repos = repos
        self.requests: list[tuple[str, str]] = []
        self.ranges: list[tuple[str, int]] = []  # file and bytes of each part that was sent
        hub = self

        class Handler(_Handler):
            server_hub = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    @property
    def fetched(self) -> set[str]:
        """Names of the files whose content was sent."""
        return {path.rpartition("/")[2] for method, path in self.requests if method == "GET" and "/resolve/" in path}

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    server_hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server_hub.requests.append((self.command, path))
        parts = path.removeprefix("/api/models").strip("/").split("/")
        repo = self.server_hub.repos.get("/".join(parts[:2]))
        if repo is None:
            return self._send(404, b"", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        if repo.token and self.headers.get("Authorization") != f"Bearer {repo.token}":
            return self._send(403, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"})
        if repo.status != 200:
            return self._send(repo.status, b"", {})
        if path.startswith("/api/models/"):
            return self._send(200, json.dumps(_listing("/".join(parts[:2]), repo, parts[2:])).encode(), {})
        return self._file(repo, "/".join(parts[4:]))

    def _file(self, repo: Repo, name: str) -> None:
        if name not in repo.files:
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
        data = repo.files[name]
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": repo.sha}
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if asked is None:
            return self._send(200, data, headers)
        first, last = int(asked[1]), min(int(asked[2]), len(data) - 1)
        self.server_hub.ranges.append((name, last - first + 1))
        return self._send(206, data[first : last + 1], headers | {"Content-Range": f"bytes {first}-{last}/{len(data)}"})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


def _listing(repo_id: str, repo: Repo, route: list[str]) -> Any:
    if route[:1] == ["tree"]:
        return [{"type": "file", "path": name, "size": len(data), "oid": oid} for name, data, oid in repo.entries()]
    siblings = [
        {"rfilename": name, "size": repo.claimed or len(data), "blobId": oid} for name, data, oid in repo.entries()
    ]
    return {"id": repo_id, "modelId": repo_id, "sha": repo.sha, "private": False, "tags": [], "siblings": siblings}
