"""A model from the Hugging Face Hub: only the files needed, with progress, and refused early where it cannot work.

huggingface_hub does the downloading and keeps its cache. It runs in a thread of its own, so that the caller's thread
reports progress and can stop the download at once (Ctrl-C, or an exception from the progress callback).
"""

import errno
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

if os.environ.get("HF_ENDPOINT") and "huggingface_hub" not in sys.modules:
    # Xet asks its own servers, which a mirror does not have; huggingface_hub reads this when it is imported.
    os.environ.setdefault("HF_HUB_DISABLE_XET", "1")

from huggingface_hub import HfApi, constants, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import httpx  # type: ignore[attr-defined]  # the client it uses, under its lasting name
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from glm4lite.errors import HubError
from glm4lite.events import Progress
from glm4lite.weights.files import COMPANIONS, CONFIG, INDEX, SHARDS, SINGLE, UNREADABLE
from glm4lite.weights.memory import readable

WANTED = (CONFIG, *COMPANIONS, SINGLE, INDEX, SHARDS)
ELSEWHERE = ("*/*",)
"""Files of subfolders are other formats of the same weights."""

_POLL_SECONDS = 0.1
_LISTING_SECONDS = 20


class _Stopped(Exception):
    """Ends huggingface_hub's threads after the caller stopped."""


class _Counter:
    """Bytes so far, counted by huggingface_hub's progress bars."""

    def __init__(self) -> None:
        self.stopped = False
        self._counts: dict[int, float] = {}

    @property
    def done(self) -> int:
        # One bar counts bytes received, another bytes written: the larger is how far the download is.
        return int(max(self._counts.values(), default=0))

    def bar_class(self) -> type[Any]:
        counter = self

        class Bar(tqdm):
            """Draws nothing; counts, and raises once the download was stopped."""

            def __init__(self, *args: Any, **kwargs: Any) -> None:
                self._counts_bytes = kwargs.get("unit") == "B"
                super().__init__(*args, **{**kwargs, "disable": True})

            def update(self, n: float | None = 1) -> None:
                if counter.stopped:
                    raise _Stopped
                if self._counts_bytes:
                    counter._counts[id(self)] = counter._counts.get(id(self), 0) + (n or 0)

        return Bar


def download(repo_id: str, progress: Callable[[Progress], None] | None = None) -> Path:
    """The local folder of a Hub repo, downloaded where the cache lacks it.

    Only config, tokenizer, chat template and safetensors are fetched: no pickle, no Python code. HF_ENDPOINT, HF_TOKEN,
    HF_HUB_OFFLINE and HF_HOME hold as usual.

    Raises:
        HubError: the repo does not exist, is gated, holds no safetensors, cannot be reached, or does not fit the disk.
    """
    with explained(repo_id):
        files = _listing_if_told(repo_id)
        missing = 0
        if files is not None:
            check_files(repo_id, files)
            missing = _missing_bytes(repo_id, files)
        _check_disk(repo_id, missing)
    return _fetch(repo_id, missing, progress)


@contextmanager
def explained(repo_id: str) -> Iterator[None]:
    """Around what asks the Hub or the cache, and nothing else: its errors become one line for the user."""
    try:
        yield
    except Exception as error:
        message = _explain(repo_id, error)
        if message is None:
            raise
        raise HubError(" ".join(message.split())) from None


def listing(repo_id: str) -> dict[str, int]:
    """Size of every file at the top of the repo, as the Hub tells; its client's errors where it does not."""
    siblings = HfApi().model_info(repo_id, files_metadata=True, timeout=_LISTING_SECONDS).siblings or []
    return {entry.rfilename: entry.size or 0 for entry in siblings if "/" not in entry.rfilename}


def _listing_if_told(repo_id: str) -> dict[str, int] | None:
    """None where the Hub does not answer (the cache may still have the repo)."""
    try:
        return listing(repo_id)
    except (RepositoryNotFoundError, httpx.HTTPError, OfflineModeIsEnabled, HfHubHTTPError):
        return None  # snapshot_download looks in the cache, and raises the same error if it is not there


def check_files(repo_id: str, files: dict[str, int]) -> None:
    if not any(_wanted(file, (SINGLE, SHARDS)) for file in files):
        other = sorted(file for file in files if Path(file).suffix in UNREADABLE)
        if other and UNREADABLE[Path(other[0]).suffix] == "pickle":
            raise HubError(
                f"{repo_id} holds only pickle weights ({other[0]}), which can run code when opened; "
                "choose a repo with safetensors (the zai-org 0414 and -hf repos have them)"
            )
        found = f" (found {other[0]})" if other else ""
        raise HubError(f"{repo_id} holds no safetensors weights{found}; choose a repo with safetensors")
    if CONFIG not in files:
        raise HubError(f"{repo_id} has no config.json; choose a repo that holds a whole model, not an adapter")


def _wanted(file: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(file, pattern) for pattern in patterns)


def _missing_bytes(repo_id: str, files: dict[str, int]) -> int:
    wanted = [file for file in files if _wanted(file, WANTED)]
    return sum(files[file] for file in wanted if not isinstance(try_to_load_from_cache(repo_id, file), str))


def _check_disk(repo_id: str, needed: int) -> None:
    cache = Path(constants.HF_HUB_CACHE)
    folder = next(parent for parent in (cache, *cache.parents) if parent.exists())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise HubError(
            f"{repo_id} needs {readable(needed)} of disk, {readable(free)} are free in {cache}; "
            "free some space, or set HF_HOME to a folder on another disk"
        )


def _fetch(repo_id: str, total: int, progress: Callable[[Progress], None] | None) -> Path:
    """snapshot_download in a thread; this thread reports, and stops it."""
    counter, outcome = _Counter(), list[str | Exception]()

    def work() -> None:
        try:
            outcome.append(
                snapshot_download(
                    repo_id,
                    allow_patterns=[*WANTED],
                    ignore_patterns=[*ELSEWHERE],
                    tqdm_class=counter.bar_class(),
                )
            )
        except Exception as error:  # raised again in the caller's thread
            outcome.append(error)

    thread = threading.Thread(target=work, name="glm4lite-download", daemon=True)
    thread.start()
    try:
        shown = -1
        while thread.is_alive():
            thread.join(_POLL_SECONDS)
            done = min(counter.done, total)
            if progress is not None and total and done != shown:
                shown = done
                progress(Progress("download", done, total, "bytes"))
    except BaseException:
        counter.stopped = True
        thread.join(2)  # time to remove its partial files; a stalled connection is not waited for
        raise
    if not outcome:
        raise HubError(f"{repo_id}: the download ended without a result; run it again")
    with explained(repo_id):
        if isinstance(outcome[0], Exception):
            raise outcome[0]
        return Path(outcome[0])


def _explain(repo_id: str, error: Exception) -> str | None:
    """One line for a user, or None for an error that is not the user's."""
    endpoint = constants.ENDPOINT
    if isinstance(error, HubError):
        return str(error)
    if isinstance(error, GatedRepoError):
        return (
            f"{repo_id} is gated: accept its terms on {endpoint}/{repo_id}, "
            "then run `hf auth login` or set HF_TOKEN to a token that may read it"
        )
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"{repo_id} does not exist on {endpoint}, or is private; "
            "check the name (for example zai-org/GLM-4-9B-0414), or set HF_TOKEN to a token that may read it"
        )
    if isinstance(error, HFValidationError):
        return f"{repo_id!r} is not a valid Hub repo id ({error}); use organisation/name"
    if isinstance(error, HfHubHTTPError):
        return _explain_status(repo_id, error.response.status_code)
    if isinstance(error, LocalEntryNotFoundError | OfflineModeIsEnabled):
        return _explain_absent(repo_id, error)
    if isinstance(error, httpx.HTTPError):
        return f"{repo_id} cannot be downloaded from {endpoint} ({_reason(error)}); check the network and run it again"
    if isinstance(error, OSError):
        return _explain_os_error(repo_id, error)
    return None


def _explain_status(repo_id: str, status: int) -> str:
    if status in (401, 403):
        what = "set HF_TOKEN to a token that may read it"
        return f"{repo_id}: {constants.ENDPOINT} refused access (HTTP {status}); {what}"
    return f"{repo_id}: {constants.ENDPOINT} answered HTTP {status}; try again later, or set HF_ENDPOINT to a mirror"


def _explain_absent(repo_id: str, error: Exception) -> str:
    """The cache does not have it (or not all of it) and the Hub was not asked or did not answer."""
    if constants.HF_HUB_OFFLINE:
        return f"{repo_id} is not (or not wholly) in the cache and HF_HUB_OFFLINE is set; unset it to download"
    cause = error.__cause__
    if isinstance(cause, HfHubHTTPError):
        return _explain_status(repo_id, cause.response.status_code)
    why = f" ({_reason(cause)})" if cause is not None else ""
    return (
        f"{constants.ENDPOINT} cannot be reached{why} and {repo_id} is not (or not wholly) in the cache; "
        "check the network, or set HF_ENDPOINT to a mirror"
    )


def _reason(error: BaseException) -> str:
    return str(error) or type(error).__name__


def _explain_os_error(repo_id: str, error: OSError) -> str:
    where = error.filename or constants.HF_HUB_CACHE
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{repo_id}: the disk is full ({where}); free some space, or set HF_HOME to a folder on another disk"
    if error.errno is None:  # huggingface_hub's own: a file that is not as long as the Hub said, for example
        return f"{repo_id} cannot be downloaded from {constants.ENDPOINT} ({error}); run it again"
    return f"{repo_id} cannot be stored in {where} ({error.strerror or error}); set HF_HOME to a folder you can write"
