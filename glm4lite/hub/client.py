"""The HTTP client of all that is fetched, and what huggingface_hub knows: tokens, folders, proxies, offline mode.

A mirror is trusted with what a model is, not with this machine: what it calls its files never leaves the cache's
folder, one that stops answering is not waited for, and a token goes to the host that it is for and to no other.
"""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import constants, get_token, scan_cache_dir
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status
from huggingface_hub.utils import httpx as httpx  # the client it uses, under its lasting name

from glm4lite.base.errors import HubError
from glm4lite.hub.errors import in_words
from glm4lite.hub.options import HubOptions

RefusedError = HfHubHTTPError
"""What `raise_for_status` raises; its `response` tells why."""
raise_for_status = hf_raise_for_status

SECONDS = 20.0
"""After so much silence a server is given up."""

_TOKEN = re.compile(r"[!-~]+")  # what a header can carry


def endpoint() -> str:
    """The Hub's address, or its mirror's."""
    return constants.ENDPOINT.rstrip("/")


def cache_folder(options: HubOptions) -> Path:
    """Where huggingface_hub keeps what it downloaded."""
    return Path(options.cache_dir or constants.HF_HUB_CACHE)


def silence() -> float:
    """Seconds after which a connection is given up: HF_HUB_DOWNLOAD_TIMEOUT's, where it is set."""
    return float(constants.HF_HUB_DOWNLOAD_TIMEOUT) if "HF_HUB_DOWNLOAD_TIMEOUT" in os.environ else SECONDS


@contextmanager
def explained(repo_id: str, host: str | None = None) -> Iterator[None]:
    """Around what asks a server or the cache, and nothing else: its errors become one line for the user.

    host: the server's address, where it is not the Hub.
    """
    try:
        yield
    except HubError:
        raise
    except Exception as error:
        message = in_words(repo_id, error, host or endpoint())
        if message is None:
            raise
        raise HubError(" ".join(message.split())) from None


def session() -> httpx.Client:
    """huggingface_hub's client (proxies, certificates, offline mode), with limits that it does not set itself."""
    client = get_session()
    if _limit_time not in client.event_hooks["request"]:
        client.event_hooks = {**client.event_hooks, "request": [*client.event_hooks["request"], _limit_time]}
    return client


def _limit_time(request: httpx.Request) -> None:
    limits = request.extensions.get("timeout") or {}
    if all(limit is None for limit in limits.values()):
        request.extensions["timeout"] = dict.fromkeys(("connect", "read", "write", "pool"), SECONDS)


def hub_headers(options: HubOptions) -> dict[str, str]:
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
    where = "token" if isinstance(options.token, str) else "HF_TOKEN, or what `hf auth login` stored"
    return build_hf_headers(token=checked_token(token, f"the Hub's token ({where})"))


def plain_headers() -> dict[str, str]:
    """Without any token."""
    return build_hf_headers(token=False)


def checked_token(token: str | None, what: str) -> str | None:
    """HubError, without the token, where a header cannot carry it."""
    if token is not None and not _TOKEN.fullmatch(token):
        raise HubError(f"{what} holds what no token has; copy it again")
    return token


def beginning(url: str, headers: Mapping[str, str], size: int) -> bytes:
    """The first bytes of a file. Of a server that ignores ranges and sends all of it, no more is read."""
    asked = {**headers, "Range": f"bytes=0-{size - 1}", "Accept-Encoding": "identity"}
    found = bytearray()
    with session().stream("GET", url, headers=asked, follow_redirects=True) as response:
        hf_raise_for_status(response)
        for piece in response.iter_bytes():
            found += piece
            if len(found) >= size:
                break
    return bytes(found[:size])


def remove_from_shared_store(root: Path, folder: Path) -> None:
    """Takes a repo's files out of the cache as huggingface_hub does, which may share them between repos."""
    found = next((repo for repo in scan_cache_dir(root).repos if repo.repo_path == folder), None)
    if found is not None:
        scan_cache_dir(root).delete_revisions(*(one.commit_hash for one in found.revisions)).execute()
