"""A real HTTP server on loopback that answers as the Hugging Face Hub does where huggingface_hub downloads a model.

Large files are of Git LFS: their ETag is a sha256, that of others git's id. What a `Repo` says can be made false.
"""

import hashlib
import json
import re
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self
from urllib.parse import unquote, urlsplit

from tests.glm4lite.loopback import Loopback, QuietHandler


@dataclass
class Repo:
    """A repo's files, and how its server misbehaves."""

    files: dict[str, bytes] = field(default_factory=dict)
    status: int = 200
    """Of every answer."""
    busy: int = 0
    """So many answers are first 503."""
    token: str = ""
    """Only its bearer may enter."""
    branches: tuple[str, ...] = ("main",)
    """The revisions that it has beside its commit."""
    claimed: int = 0
    """The size that the listing tells of each file."""
    sent: dict[str, list[bytes]] = field(default_factory=dict)
    """What the next downloads of a file bring instead of its content."""
    breaks: dict[str, int] = field(default_factory=dict)
    """The next download of a file breaks after so many bytes."""
    etags: dict[str, str] = field(default_factory=dict)
    listed: dict[str, Any] = field(default_factory=dict)
    """Replaces parts of each file's entry in the listing; None leaves one out."""
    extra: list[Any] = field(default_factory=list)
    """Further entries of the listing."""
    names_commit: bool = True
    """Whether the listing tells the commit."""
    ranges: bool = True
    page: bytes = b""
    """The answer to everything, as HTML."""
    elsewhere: str = ""
    """The address that downloads of large files are sent to."""

    @property
    def sha(self) -> str:
        names = "\n".join(sorted(self.files))
        return hashlib.sha1(names.encode(), usedforsecurity=False).hexdigest()

    def entries(self) -> list[dict[str, Any]]:
        """The listing: sizes and digests of all files."""
        found = []
        for name, data in self.files.items():
            size = self.claimed or len(data)
            entry: dict[str, Any] = {"rfilename": name, "size": size, "blobId": git_id(data)}
            if is_large(name):
                entry["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": size, "pointerSize": 134}
            found.append({key: value for key, value in (entry | self.listed).items() if value is not None})
        return [*found, *self.extra]

    def etag(self, name: str) -> str:
        data = self.files[name]
        return self.etags.get(name) or (hashlib.sha256(data).hexdigest() if is_large(name) else git_id(data))

    @classmethod
    def of(cls, folder: Path) -> Self:
        return cls({path.name: path.read_bytes() for path in folder.iterdir()})


def is_large(name: str) -> bool:
    return name.endswith(".safetensors")


def git_id(data: bytes) -> str:
    """The name git gives a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


class HubServer(Loopback):
    """`with HubServer({"org/name": Repo(...)}) as hub: ... hub.url, hub.requests`."""

    def __init__(self, repos: dict[str, Repo]) -> None:
        self.repos = repos
        self.requests: list[tuple[str, str]] = []
        self.ranges: list[tuple[str, int]] = []  # file and bytes of each part that was sent
        self.authorizations: list[tuple[str, str | None]] = []
        hub = self

        class Handler(_Handler):
            server_hub = hub

        super().__init__(Handler)

    @property
    def fetched(self) -> set[str]:
        """Names of the files whose content was sent."""
        return {path.rpartition("/")[2] for method, path in self.requests if method == "GET" and "/resolve/" in path}


class _Handler(QuietHandler):
    server_hub: HubServer

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server_hub.requests.append((self.command, path))
        self.server_hub.authorizations.append((path, self.headers.get("Authorization")))
        parts = path.removeprefix("/api/models").strip("/").split("/")
        repo = self.server_hub.repos.get("/".join(parts[:2]))
        if repo is None:
            return self._send(404, b"", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        if repo.token and self.headers.get("Authorization") != f"Bearer {repo.token}":
            return self._send(403, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"})
        if repo.busy:
            repo.busy -= 1
            return self._send(503, b"", {})
        if repo.status != 200:
            return self._send(repo.status, b"", {})
        if repo.page:
            return self._send(200, repo.page, {"Content-Type": "text/html"})
        asked = self._revision(path, parts)
        if asked not in (*repo.branches, repo.sha):
            return self._send(404, b"", {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"})
        if path.startswith("/api/models/"):
            return self._send(200, json.dumps(_listing("/".join(parts[:2]), repo)).encode(), {})
        return self._file(repo, "/".join(parts[4:]))

    @staticmethod
    def _revision(path: str, parts: list[str]) -> str:
        """Of /api/models/ORG/NAME/revision/REVISION, or of /ORG/NAME/resolve/REVISION/FILE."""
        if path.startswith("/api/models/"):
            return "/".join(parts[3:]) or "main"
        return parts[3] if len(parts) > 3 else "main"

    def _file(self, repo: Repo, name: str) -> None:
        if name not in repo.files:
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
        data, etag = repo.files[name], repo.etag(name)
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": repo.sha}
        if repo.elsewhere and is_large(name):
            linked = {"Location": repo.elsewhere + self.path, "X-Linked-ETag": f'"{etag}"'}
            return self._send(302, b"", headers | linked | {"X-Linked-Size": str(len(data))})
        if self.command == "GET" and repo.sent.get(name):
            data = repo.sent[name].pop(0)
        if self.command == "GET" and name in repo.breaks:
            return self._send(200, data, headers, repo.breaks.pop(name))
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None or not repo.ranges:
            return self._send(200, data, headers)
        first, last = int(asked[1]), min(int(asked[2] or len(data)), len(data) - 1)
        self.server_hub.ranges.append((name, last - first + 1))
        return self._send(206, data[first : last + 1], headers | {"Content-Range": f"bytes {first}-{last}/{len(data)}"})

    def _send(self, status: int, body: bytes, headers: dict[str, str], breaks: int | None = None) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            with suppress(ConnectionError):  # whoever has read enough may leave
                self.wfile.write(body[:breaks])
        self.close_connection = self.close_connection or breaks is not None


def _listing(repo_id: str, repo: Repo) -> Any:
    about = {"id": repo_id, "modelId": repo_id, "private": False, "tags": []}
    return about | ({"sha": repo.sha} if repo.names_commit else {}) | {"siblings": repo.entries()}
