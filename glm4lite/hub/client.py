"""The Hugging Face Hub as glm4lite asks it. huggingface_hub sends the requests and keeps the cache and the tokens.

A mirror is trusted with what a model is, not with this machine: what it calls its files never leaves the cache's
folder, and one that stops answering is not waited for.
"""

import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote

if os.environ.get("HF_ENDPOINT") and "huggingface_hub" not in sys.modules:
    # Xet asks its own servers, which a mirror does not have; huggingface_hub reads this when it is imported.
    os.environ.setdefault("HF_HUB_DISABLE_XET", "1")

from huggingface_hub import constants, get_token, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.utils import (
    build_hf_headers,
    get_session,
    hf_raise_for_status,
    httpx,  # the client it uses, under its lasting name
)
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from glm4lite.base.errors import HubError
from glm4lite.base.files import CONFIG
from glm4lite.hub.errors import in_words
from glm4lite.hub.options import HubOptions

constants.DOWNLOAD_CHUNK_SIZE = min(constants.DOWNLOAD_CHUNK_SIZE, 1 << 20)  # between two, a download can be stopped

_SECONDS = 20.0
_TOKEN = re.compile(r"[!-~]+")  # what a header can carry
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SHA1 = re.compile(r"[0-9a-f]{40}")
_NAMES_OF_FILES = ("ETag", "X-Linked-ETag", "X-Repo-Commit")  # huggingface_hub calls files in its cache so


@dataclass(frozen=True)
class Listed:
    """What the Hub says of one file: its size (0 where it does not say) and the digests its content may have."""

    size: int = 0
    digests: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Repo:
    """The files at the top of a Hub repo, or of the subfolder that is asked for.

    Those of other subfolders are other formats of the same weights.
    """

    repo_id: str
    options: HubOptions
    commit: str | None = None
    files: Mapping[str, Listed] = field(default_factory=dict)


def endpoint() -> str:
    """The Hub's address, or its mirror's."""
    return constants.ENDPOINT


def cache(options: HubOptions) -> Path:
    """Where huggingface_hub keeps what it downloaded."""
    return Path(options.cache_dir or constants.HF_HUB_CACHE)


@contextmanager
def explained(repo_id: str) -> Iterator[None]:
    """Around what asks the Hub or the cache, and nothing else: its errors become one line for the user."""
    try:
        yield
    except Exception as error:
        message = in_words(repo_id, error)
        if message is None:
            raise
        raise HubError(" ".join(message.split())) from None


def listing(repo_id: str, options: HubOptions, commit: str | None = None) -> Repo:
    """What the Hub holds at a commit (None: at the revision asked for); its client's errors where it does not say."""
    revision = commit or options.revision
    at = f"/revision/{quote(revision, safe='')}" if revision else ""
    response = _session().get(
        f"{endpoint()}/api/models/{repo_id}{at}", params={"blobs": "true"}, headers=_headers(options), timeout=_SECONDS
    )
    hf_raise_for_status(response)
    try:
        told = response.json()
        siblings = told["siblings"]
        prefix = f"{PurePosixPath(options.subfolder)}/" if options.subfolder else ""
        inside = [entry for entry in siblings if entry["rfilename"].startswith(prefix)]
        named = [(entry["rfilename"].removeprefix(prefix), entry) for entry in inside]
        files = {name: _listed(entry) for name, entry in named if "/" not in name}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise HubError(
            f"{repo_id}: {endpoint()} does not answer as the Hub does; if this network asks for a login in a browser, "
            "do that first, else check HF_ENDPOINT"
        ) from None
    sha = told.get("sha")
    return Repo(repo_id, options, sha if isinstance(sha, str) else None, files)


def _listed(entry: Mapping[str, Any]) -> Listed:
    size, oid, lfs = entry.get("size"), entry.get("blobId"), entry.get("lfs")
    if isinstance(lfs, dict) and _SHA256.fullmatch(str(lfs.get("sha256"))):
        digests = frozenset({f"sha256:{lfs['sha256']}"})
    else:
        digests = frozenset({f"git:{oid}"} if not lfs and _SHA1.fullmatch(str(oid)) else ())
    return Listed(size if isinstance(size, int) and size > 0 else 0, digests)


def cached_as(path: Path) -> frozenset[str]:
    """The digests that a file of the cache may have by the name it is kept under, which is the ETag it came with."""
    try:
        etag = Path(os.readlink(path)).name
    except OSError:  # no link: where the system has none, the cache keeps the files themselves
        return frozenset()
    kinds = ((_SHA256, "sha256"), (_SHA1, "git"))
    return frozenset(f"{kind}:{etag}" for pattern, kind in kinds if pattern.fullmatch(etag))


def forget(path: Path, blobs: Path) -> None:
    """Takes a file out of the cache, for every program that uses it; `blobs`: the folder that its link leads into."""
    with suppress(OSError):
        kept = Path(os.path.normpath(path.parent / os.readlink(path)))
        if kept.parent == blobs:
            kept.unlink()
    with suppress(OSError):
        path.unlink()


def fetch(
    repo_id: str,
    file: str,
    options: HubOptions,
    count: Callable[[int], None],
    commit: str | None = None,
    anew: bool = False,
) -> Path:
    """A file of the repo, in the cache: downloaded where it is not there, or `anew`.

    `count` hears of more bytes (of fewer where a server begins again), and ends the download by raising.
    """
    _session()
    found = hf_hub_download(
        repo_id,
        file,
        subfolder=options.subfolder or None,
        revision=commit or options.revision,
        cache_dir=options.cache_dir,
        token=options.token,
        tqdm_class=_bar(count),
        force_download=anew,
    )
    return Path(found)


def _bar(count: Callable[[int], None]) -> type[Any]:
    """The progress bars that huggingface_hub makes, which draw nothing here."""

    class Bar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self._counts = [0, 0]
            super().__init__(*args, **{**kwargs, "disable": True})

        def update(self, n: float | None = 1) -> None:
            """So many bytes more were written."""
            self._add(0, int(n or 0))

        def update_transfer(self, n: float | None = 1) -> None:
            """So many bytes more were received: what is not compressed is counted in both ways."""
            self._add(1, int(n or 0))

        def set_transfer_postfix_str(self, *args: Any, **kwargs: Any) -> None:
            """Nothing is drawn."""

        def _add(self, which: int, more: int) -> None:
            before = max(self._counts)
            self._counts[which] += more
            count(max(self._counts) - before)

    return Bar


def cached_folder(repo_id: str, options: HubOptions, file: str = CONFIG) -> Path | None:
    """Where the cache has that file of the repo, and whatever else was downloaded with it."""
    name = str(PurePosixPath(options.subfolder) / file)
    config = try_to_load_from_cache(repo_id, name, cache_dir=options.cache_dir, revision=options.revision)
    return Path(config).parent if isinstance(config, str) else None


def cached_models() -> list[str]:
    """The repos in the cache of which a config.json is there that says GLM-4, in alphabetical order."""
    found = set[str]()
    for config in Path(constants.HF_HUB_CACHE).glob(f"models--*--*/snapshots/*/{CONFIG}"):
        with suppress(OSError, ValueError):
            if re.search(rb'"model_type"\s*:\s*"(glm4?|chatglm)"', config.read_bytes()[:1_000_000]):
                found.add(config.parents[2].name.removeprefix("models--").replace("--", "/", 1))
    return sorted(found, key=str.casefold)


def beginning(repo: Repo, file: str, size: int) -> bytes:
    """The first bytes of a file. Of a server that ignores ranges and sends all of it, no more is read."""
    url = hf_hub_url(repo.repo_id, file, subfolder=repo.options.subfolder or None, revision=repo.commit)
    headers = _headers(repo.options) | {"Range": f"bytes=0-{size - 1}", "Accept-Encoding": "identity"}
    found = bytearray()
    with _session().stream("GET", url, headers=headers, timeout=_SECONDS) as response:
        hf_raise_for_status(response)
        for piece in response.iter_bytes():
            found += piece
            if len(found) >= size:
                break
    return bytes(found[:size])


def _headers(options: HubOptions) -> dict[str, str]:
    """With the user's token, if there is one and it may be sent.

    Raises:
        HubError: the token is none, or its file cannot be read.
    """
    if options.token is False:
        return build_hf_headers(token=False)
    try:
        token = options.token if isinstance(options.token, str) else get_token()
    except (OSError, UnicodeError) as error:
        where, why = constants.HF_TOKEN_PATH, getattr(error, "strerror", None) or error
        raise HubError(
            f"the Hub's token in {where} cannot be read ({why}); run `hf auth login`, or set HF_HOME to your folder"
        ) from None
    if token is None and options.token is True:
        raise HubError("token=True asks for the stored token, and there is none; run `hf auth login` or set HF_TOKEN")
    if token is not None and not _TOKEN.fullmatch(token):
        where = "token" if isinstance(options.token, str) else "HF_TOKEN, or what `hf auth login` stored"
        raise HubError(f"the Hub's token ({where}) holds what no token has; copy it again")
    return build_hf_headers(token=token)


def _session() -> httpx.Client:
    """huggingface_hub's client, with limits that it does not set itself."""
    session = get_session()
    hooks = session.event_hooks
    if _refuse_paths not in hooks["response"]:
        session.event_hooks = {
            "request": [*hooks["request"], _limit_time],
            "response": [*hooks["response"], _refuse_paths],
        }
    return session


def _limit_time(request: httpx.Request) -> None:
    limits = request.extensions.get("timeout") or {}
    if all(limit is None for limit in limits.values()):
        request.extensions["timeout"] = dict.fromkeys(("connect", "read", "write", "pool"), _SECONDS)


def _refuse_paths(response: httpx.Response) -> None:
    """What the answer to HEAD says becomes a path in the cache: `ETag: "../../x"` must not."""
    if response.request.method != "HEAD":
        return
    for name in _NAMES_OF_FILES:
        value = response.headers.get(name, "").removeprefix("W/").strip('"')
        if not value.isprintable() or value == ".." or set(value) & set("/\\:"):
            raise HubError(
                f"{response.url.host} calls a file by the {name} {value[:100]!r}, which leaves the cache's folder; "
                "set HF_ENDPOINT to another mirror, or unset it"
            )
