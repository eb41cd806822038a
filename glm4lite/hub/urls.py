"""A GGUF file by its address: of the Hub, as a file of its repo; of any other server into a folder of its own.

`URL#sha256=...` says what the file has to hash to. Of a file that is split (`...-00001-of-00003.gguf`) all parts are
fetched.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import replace
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

from glm4lite.base.errors import HubError
from glm4lite.hub.arriving import Arriving
from glm4lite.hub.cache import is_name
from glm4lite.hub.client import cache_folder, endpoint, explained, plain_headers, session, silence
from glm4lite.hub.connections import Counter, ProgressCallback
from glm4lite.hub.digests import digest_of
from glm4lite.hub.download import check_disk
from glm4lite.hub.gguf_files import bring, parts_of
from glm4lite.hub.hosts import host_of
from glm4lite.hub.options import HubOptions
from glm4lite.hub.patience import Patience, asked
from glm4lite.hub.transfer import Transfer, Wanted, host_address
from glm4lite.hub.verified import Verifier

_IN_REPO = re.compile(r"/([\w.-]+/[\w.-]+)/(?:resolve|blob)/([^/]+)/(.+)", re.ASCII)
_MAGIC = b"GGUF"


def download_url(url: str, progress: ProgressCallback | None, options: HubOptions) -> Path:
    """The file (the first part of several) on this machine, downloaded where it is not there yet.

    Raises:
        HubError: the address is of no GGUF file, the server does not give it out, or it arrives damaged.
    """
    address, _, fragment = url.partition("#")
    name = unquote(urlsplit(address).path).rpartition("/")[2]
    if not name.lower().endswith(".gguf") or not is_name(name):
        raise HubError(f"{_shown(address)} is no address of a .gguf file; of other models give the repo's name")
    digest = fragment.removeprefix("sha256=").lower()
    if fragment and not (fragment.startswith("sha256=") and re.fullmatch("[0-9a-f]{64}", digest)):
        raise HubError(f"what stands behind # in {_shown(address)} is no sha256; use #sha256= and 64 hex digits")
    in_repo = _of_the_hub(address)
    if in_repo is not None:
        found = _from_repo(*in_repo, options, progress)
    else:
        found = _from_server(address, name, digest, options, progress)
    return found


def urls_folder(options: HubOptions) -> Path:
    """Where files of servers that are no hosts of repos lie, beside the Hub's cache."""
    return cache_folder(options).with_name("urls")


def _of_the_hub(address: str) -> tuple[str, str, str] | None:
    """(repo, revision, path) of a file's address on the Hub or the mirror in use."""
    parts = urlsplit(address)
    place = _IN_REPO.fullmatch(unquote(parts.path))
    ours = {urlsplit(endpoint()).netloc, "huggingface.co", "hf.co"}
    return (place[1], place[2], place[3]) if place and parts.netloc in ours else None


def _from_repo(repo_id: str, revision: str, path: str, options: HubOptions, progress: ProgressCallback | None) -> Path:
    where = PurePosixPath(path)
    options = replace(options, revision=revision, subfolder="")
    kept = host_of(repo_id).folder(repo_id, options)
    commit = kept.commit(revision)
    if commit is not None and not options.force_download:
        there = [kept.snapshot(commit) / where.parent / name for name in parts_of(where.name)]
        if all(file.exists() for file in there):
            return there[0]
    return bring(repo_id, options, where, progress)


def _from_server(address: str, name: str, digest: str, options: HubOptions, progress: ProgressCallback | None) -> Path:
    key = hashlib.sha256(address.encode()).hexdigest()[:16]
    folder = urls_folder(options) / key
    names = parts_of(name)
    if len(names) > 1 and digest:
        raise HubError(f"{name} is a file of {len(names)} parts: one sha256 does not tell about all; leave it out")
    wanted = [_wanted(address, name, one, folder, digest, options) for one in names]
    verifier = Verifier(folder, folder)
    damaged = verifier.damaged({one.name: one.digests for one in wanted if one.target.exists()}, lambda *_: None)
    missing = [one for one in wanted if one.anew or not one.target.exists()]
    missing += [replace(one, anew=True) for one in wanted if one.name in damaged and one not in missing]
    with explained(name, host_address(address)):
        sized = [replace(one, size=_told_size(one)) for one in missing]
        check_disk(name, sized, folder, "set HF_HOME to a folder on another disk")
        failed = Transfer(session(), sized, Counter(progress), _place, Patience(silence=silence())).run()
        if failed is not None:
            raise failed
    return wanted[0].target


def _wanted(address: str, asked: str, name: str, folder: Path, digest: str, options: HubOptions) -> Wanted:
    url = address if name == asked else address.replace(asked, name)
    digests = digest_of(digest) if digest else frozenset[str]()
    target = folder / name
    lock = folder / f".{name}.lock"
    return Wanted(name, _shown(address), url, plain_headers(), target, 0, digests, None, lock, options.force_download)


def _told_size(wanted: Wanted) -> int:
    """0 where the server does not say; what is wrong with it is said where the file is asked for."""
    response = asked(lambda: session().head(wanted.url, headers=dict(wanted.headers), follow_redirects=True))
    length = response.headers.get("Content-Length", "")
    plain = response.status_code == 200 and "text/html" not in response.headers.get("Content-Type", "")
    return int(length) if plain and re.fullmatch(r"\d{1,19}", length, re.ASCII) else 0


def _place(wanted: Wanted, arriving: Arriving) -> None:
    """Where nothing tells what the file has to be, at least it is a GGUF."""
    if not arriving.path.exists():  # another program brought it
        return
    with arriving.path.open("rb") as file:
        beginning = file.read(len(_MAGIC))
    if beginning != _MAGIC:
        arriving.discard()
        raise HubError(f"{wanted.whose} gives out no GGUF file (it begins with {beginning!r}); check the address")
    arriving.publish(wanted.target)


def _shown(address: str) -> str:
    """Without what may be a name, a password or a signature."""
    parts = urlsplit(address)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"[:200]
