"""Who gives models out: the Hugging Face Hub (or a mirror of it), and ModelScope. Each lists a repo and its digests.

A repo is named `ORG/NAME`, one of ModelScope `ms:ORG/NAME`.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote, urlencode

from glm4lite.base.errors import HubError, one_line
from glm4lite.hub.cache import RepoFolder, is_name
from glm4lite.hub.client import (
    cache_folder,
    checked_token,
    endpoint,
    httpx,
    hub_headers,
    plain_headers,
    raise_for_status,
    session,
)
from glm4lite.hub.digests import digest_of
from glm4lite.hub.options import MODELSCOPE, HubOptions
from glm4lite.hub.patience import asked
from glm4lite.hub.transfer import entity_tag


@dataclass(frozen=True)
class Listed:
    """What a host says of one file: its size (0 where it does not say) and the digests its content may have."""

    size: int = 0
    digests: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Repo:
    """The files at the top of a repo at one commit, or of the subfolder that is asked for.

    Those of other subfolders are other formats of the same weights. at: the revision that its files are asked for by;
    "": the commit. every: all files by their paths, also of the folders below.
    """

    repo_id: str
    options: HubOptions
    commit: str
    files: Mapping[str, Listed] = field(default_factory=dict)
    at: str = ""
    every: Mapping[str, Listed] = field(default_factory=dict)

    @property
    def host(self) -> Host:
        return host_of(self.repo_id)

    @property
    def folder(self) -> RepoFolder:
        return self.host.folder(self.repo_id, self.options)

    @property
    def snapshot(self) -> Path:
        """Where its files are shown in the cache."""
        return self.folder.snapshot(self.commit, self.options.subfolder)

    def url(self, name: str) -> str:
        return self.host.url(self.repo_id, str(PurePosixPath(self.options.subfolder) / name), self.at or self.commit)

    def headers(self) -> dict[str, str]:
        return self.host.headers(self.options)


class Host:
    """The Hub; what another host does otherwise, its class says."""

    branch = "main"

    def address(self) -> str:
        return endpoint()

    def headers(self, options: HubOptions) -> dict[str, str]:
        """With the user's token for this host. HubError."""
        return hub_headers(options)

    def folder(self, repo_id: str, options: HubOptions) -> RepoFolder:
        return RepoFolder(cache_folder(options), repo_id)

    def revision(self, options: HubOptions) -> str:
        return options.revision or self.branch

    def url(self, repo_id: str, path: str, at: str) -> str:
        """Of a file at a revision."""
        return f"{self.address()}/{repo_id}/resolve/{quote(at, safe='')}/{quote(path)}"

    def listing(self, repo_id: str, options: HubOptions) -> Repo:
        """What the host holds at the revision that is asked for; its client's errors where it does not say."""
        at = f"/revision/{quote(options.revision, safe='')}" if options.revision else ""
        told = self._asked(f"/api/models/{repo_id}{at}?blobs=true", options)
        with_sha = told.get("sha") if isinstance(told, dict) else None
        every = _below(self._read(repo_id, lambda: _hub_files(told)), options.subfolder)
        files = _at_the_top(every)
        commit = with_sha if isinstance(with_sha, str) else self._commit_of(repo_id, options, files)
        return Repo(repo_id, options, _as_name(commit, "commit", self), files, every=every)

    def _commit_of(self, repo_id: str, options: HubOptions, files: Mapping[str, Listed]) -> str:
        """Of a mirror whose listing does not tell it."""
        path = str(PurePosixPath(options.subfolder) / next(iter(files), "config.json"))
        url = self.url(repo_id, path, self.revision(options))
        response = _answer("HEAD", url, self.headers(options))
        commit = [*response.history, response][0].headers.get("X-Repo-Commit", "")
        if not commit:
            raise self._no_host(repo_id)
        return str(commit)

    def tag(self, repo: Repo, name: str) -> tuple[str, int]:
        """The entity tag and the size (0: not told) of a file that the listing tells no digest of."""
        response = _answer("HEAD", repo.url(name), repo.headers())
        hops = [*response.history, response]
        sizes = [hop.headers.get("X-Linked-Size") for hop in hops] + [response.headers.get("Content-Length")]
        size = next((int(one) for one in sizes if one and re.fullmatch(r"\d{1,19}", one, re.ASCII)), 0)
        return _as_name(entity_tag(hops), "ETag", self), size

    def _asked(self, path: str, options: HubOptions) -> Any:
        """The JSON that answers a question."""
        response = _answer("GET", self.address() + path, self.headers(options))
        return self._read(path, response.json)

    def _read(self, repo_id: str, read: Callable[[], Any]) -> Any:
        try:
            return read()
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise self._no_host(repo_id) from None

    def _no_host(self, repo_id: str) -> HubError:
        where = "HF_ENDPOINT" if type(self) is Host else "MODELSCOPE_DOMAIN"
        name = re.sub(r"^/api/(?:v1/)?models/([^/?]+/[^/?]+).*", r"\1", repo_id)
        return HubError(
            f"{name}: {self.address()} does not answer as the Hub does; if this network asks for a login in a browser, "
            f"do that first, else check {where}"
        )


class ModelScope(Host):
    """ModelScope, by the same addresses that its own client asks (modelscope/hub/api.py and file_download.py)."""

    branch = "master"

    def address(self) -> str:
        domain = os.environ.get("MODELSCOPE_DOMAIN") or "www.modelscope.cn"
        return (domain if "://" in domain else f"https://{domain}").rstrip("/")

    def headers(self, options: HubOptions) -> dict[str, str]:
        """A token of the Hub's is not for this host: MODELSCOPE_API_TOKEN is."""
        token = checked_token(os.environ.get("MODELSCOPE_API_TOKEN"), "MODELSCOPE_API_TOKEN")
        return plain_headers() | ({"Authorization": f"Bearer {token}"} if token and options.token is not False else {})

    def folder(self, repo_id: str, options: HubOptions) -> RepoFolder:
        """Beside the Hub's, so that two repos of one name do not share refs."""
        return RepoFolder(modelscope_cache(options), repo_id.removeprefix(MODELSCOPE))

    def url(self, repo_id: str, path: str, at: str) -> str:
        query = urlencode({"Revision": at, "FilePath": path})
        return f"{self.address()}/api/v1/models/{repo_id.removeprefix(MODELSCOPE)}/repo?{query}"

    def listing(self, repo_id: str, options: HubOptions) -> Repo:
        """It names no commit, so what it lists is hashed for one. Files are asked for at the branch: that none is of
        another commit, its digest tells."""
        revision = self.revision(options)
        query = urlencode({"Revision": revision, "Recursive": "true"})
        told = self._asked(f"/api/v1/models/{repo_id.removeprefix(MODELSCOPE)}/repo/files?{query}", options)
        if isinstance(told, dict) and told.get("Success") is False:
            why = one_line(told.get("Message"))[:200]
            raise HubError(f"{repo_id}: {self.address()} says {why!r}; check the name and the revision")
        found = self._read(repo_id, lambda: _modelscope_files(told))
        known = sorted((name, *sorted(one.digests)) for name, one in found.items())
        commit = hashlib.sha1(repr(known).encode(), usedforsecurity=False).hexdigest()
        every = _below(found, options.subfolder)
        return Repo(repo_id, options, commit, _at_the_top(every), revision, every)


_HUB, _MODELSCOPE = Host(), ModelScope()


def _answer(method: str, url: str, headers: Mapping[str, str]) -> httpx.Response:
    """With patience; its client's errors where it is a refusal, or there is none."""

    def ask() -> httpx.Response:
        response = session().request(method, url, headers=dict(headers), follow_redirects=True)
        raise_for_status(response)
        return response

    return asked(ask)


def host_of(repo_id: str) -> Host:
    return _MODELSCOPE if repo_id.startswith(MODELSCOPE) else _HUB


def modelscope_cache(options: HubOptions) -> Path:
    return cache_folder(options).with_name("modelscope")


def _as_name(word: str, what: str, host: Host) -> str:
    """A server's word that becomes a path in the cache: `ETag: "../../x"` must not."""
    if not is_name(word):
        raise HubError(
            f"{host.address()} calls a file by the {what} {word[:100]!r}, which leaves the cache's folder; "
            "set HF_ENDPOINT to another mirror, or unset it"
        )
    return word


def _below(files: Mapping[str, Listed], subfolder: str) -> dict[str, Listed]:
    prefix = f"{PurePosixPath(subfolder)}/" if subfolder else ""
    return {path.removeprefix(prefix): one for path, one in files.items() if path.startswith(prefix)}


def _at_the_top(files: Mapping[str, Listed]) -> dict[str, Listed]:
    return {name: one for name, one in files.items() if "/" not in name}


def _hub_files(told: Any) -> dict[str, Listed]:
    return {str(entry["rfilename"]): _of_hub(entry) for entry in told["siblings"]}


def _of_hub(entry: Mapping[str, Any]) -> Listed:
    size, oid, lfs = entry.get("size"), entry.get("blobId"), entry.get("lfs")
    if isinstance(lfs, dict):
        return Listed(_size(size), frozenset(one for one in digest_of(str(lfs.get("sha256"))) if "sha256" in one))
    return Listed(_size(size), frozenset() if lfs else digest_of(str(oid)))


def _modelscope_files(told: Any) -> dict[str, Listed]:
    """All files have a sha256 there."""
    entries = (entry for entry in told["Data"]["Files"] if entry.get("Type") != "tree")
    return {str(one["Path"]): Listed(_size(one.get("Size")), digest_of(str(one.get("Sha256")))) for one in entries}


def _size(told: Any) -> int:
    return told if isinstance(told, int) and told > 0 else 0
