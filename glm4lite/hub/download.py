"""A model from the Hugging Face Hub: only the files needed, each verified, and refused early where it cannot work.

The downloads run in threads of their own, so that the caller's thread reports progress and can stop them at once
(Ctrl-C, or an exception from the progress callback).
"""

import logging
import queue
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from glm4lite.base.errors import CheckpointError, HubError, one_line
from glm4lite.base.events import Progress
from glm4lite.base.files import (
    COMPANIONS,
    CONFIG,
    INDEX,
    SINGLE,
    TOKENIZER,
    UNREADABLE,
    may_be_missing,
    read_index,
    read_json,
    some,
)
from glm4lite.base.owned_folder import is_abandoned
from glm4lite.base.sizes import readable
from glm4lite.hub.client import (
    Repo,
    cache,
    cached_as,
    cached_folder,
    endpoint,
    explained,
    fetch,
    forget,
    listing,
)
from glm4lite.hub.options import HubOptions
from glm4lite.hub.verified import Damage, Verifier

logger = logging.getLogger("glm4lite")

ProgressCallback = Callable[[Progress], None]

_POLL_SECONDS = 0.1
_LEAVING_SECONDS = 2  # to remove partial files; a stalled connection is not waited for
_AT_ONCE = 8
_REPEATS = 2  # of a file that arrived damaged


def download(repo_id: str, progress: ProgressCallback | None, options: HubOptions, weights: bool = True) -> Path:
    """The local folder of a Hub repo, downloaded where the cache lacks it.

    Only config, tokenizer, chat template and safetensors are fetched: no pickle, no Python code. HF_ENDPOINT, HF_TOKEN,
    HF_HUB_OFFLINE and HF_HOME hold as usual. Where the Hub does not answer, what the cache has is taken. Without
    `weights` the small files are enough, also of a repo that holds no others.

    Raises:
        HubError: the repo does not exist, is gated, holds no safetensors, cannot be reached, does not fit the disk, or
            arrives damaged.
    """
    if options.local_files_only:
        return _from_cache(repo_id, options, _absent(repo_id, options), progress, weights)
    try:
        snapshot = Snapshot.of(repo_id, options, progress, weights)
    except HubError as error:
        if options.force_download:
            raise
        return _from_cache(repo_id, options, error, progress, weights)
    snapshot.bring([name for name in (CONFIG, *COMPANIONS, INDEX) if name in snapshot.repo.files])
    if weights:
        snapshot.bring(snapshot.weights())
    return snapshot.folder


def download_config(repo_id: str, options: HubOptions) -> Path:
    """A repo's config.json alone, whatever weights it has. HubError as `download`."""
    try:
        if options.local_files_only:
            raise _absent(repo_id, options)
        with explained(repo_id):
            return fetch(repo_id, CONFIG, options, lambda _: None, anew=options.force_download)
    except HubError:
        with explained(repo_id):
            folder = None if options.force_download else cached_folder(repo_id, options)
        if folder is None:
            raise
        return folder / CONFIG


def _absent(repo_id: str, options: HubOptions) -> HubError:
    return HubError(
        f"{repo_id} is not (or not wholly) in {cache(options)}, and local_files_only forbids to download it"
    )


class Snapshot:
    """One commit of a repo, as the Hub lists it and as far as the cache's folder of it has been filled."""

    def __init__(self, repo: Repo, folder: Path, progress: ProgressCallback | None) -> None:
        self.repo = repo
        self.folder = folder
        self._kept = _kept(folder, repo.options)
        self._progress = progress
        self._verifier = Verifier(folder, self._kept)
        self._counter = _Counter(progress)

    @classmethod
    def of(
        cls, repo_id: str, options: HubOptions, progress: ProgressCallback | None = None, weights: bool = True
    ) -> "Snapshot":
        """The newest commit (of the revision asked for), with config.json in its folder (or a tokenizer alone).

        Raises:
            HubError: the repo cannot be listed, or cannot be a model (without `weights`: has no tokenizer.json).
        """
        with explained(repo_id):
            repo = listing(repo_id, options)
            _check_files(repo, weights)
            # At the revision and not at its commit, so that the cache knows which commit that is now.
            first = CONFIG if CONFIG in repo.files else TOKENIZER
            folder = fetch(repo_id, first, options, lambda _: None).parent
            commit = folder.relative_to(_kept(folder, options) / "snapshots").parts[0]
            if repo.commit not in (None, commit):  # something was committed just now
                repo = listing(repo_id, options, commit)
            _remove_unfinished(repo_id, _kept(folder, options), cache(options))
        return cls(replace(repo, commit=commit), folder, progress)

    def weights(self) -> list[str]:
        """The files that hold the weights: what the index names. It has been brought before, where there is one.

        Raises:
            HubError: the index is damaged, or names what the repo does not hold.
        """
        if SINGLE in self.repo.files:
            return [SINGLE]
        try:
            names = _listed_shards(self.folder, self.repo.files.__contains__)
        except CheckpointError as error:
            raise HubError(f"{self.repo.repo_id} is damaged where it comes from: {error}") from None
        lacking = [name for name in names if name not in self.repo.files]
        if lacking:
            raise HubError(f"{self.repo.repo_id} lacks {some(lacking)}, named by its {INDEX}; choose another repo")
        return names

    def bring(self, names: Sequence[str]) -> None:
        """Downloads what is not here, and again what is damaged.

        Raises:
            HubError: it cannot be downloaded or stored, or is damaged each time.
        """
        forced = self.repo.options.force_download
        missing = [name for name in names if forced or not (self.folder / name).exists()]
        with explained(self.repo.repo_id):
            _check_disk(self.repo, sum(self.repo.files[name].size for name in missing))
        self._download(missing, anew=forced)
        self._say_unverified(missing)
        for again in range(_REPEATS + 1):
            damaged = self._damaged(names, missing)
            if not damaged:
                return
            if again == _REPEATS:
                raise self._given_up(damaged)
            for name, damage in damaged.items():
                where = "arrived" if name in missing else "lay in the cache"
                what = f"{name} of {self.repo.repo_id} {where} damaged ({_compared(damage)})"
                logger.warning("%s; it is downloaded again", what)
            missing = list(damaged)
            self._download(missing, anew=True)

    def _download(self, names: Sequence[str], anew: bool = False) -> None:
        repo, counter = self.repo, self._counter
        counter.total += sum(repo.files[name].size for name in names)

        def bring(name: str) -> Path:
            return fetch(repo.repo_id, name, repo.options, counter.add, repo.commit, anew)

        failed = _in_threads(bring, names, counter)
        if failed is not None:
            with explained(repo.repo_id):
                raise failed
        if names:
            counter.finish()

    def _damaged(self, names: Sequence[str], new: Sequence[str]) -> dict[str, Damage]:
        looked_at = names if self._verifier.can_remember() else new
        expected = {name: _digests(self.repo, self.folder, name) for name in looked_at}
        return self._verifier.damaged(expected, _verifying(self._progress))

    def _say_unverified(self, names: Sequence[str]) -> None:
        unknown = [name for name in names if not _digests(self.repo, self.folder, name)]
        if unknown:
            logger.warning(
                "%s: %s tells no checksum of %s: what arrived could not be verified",
                self.repo.repo_id,
                endpoint(),
                some(unknown),
            )

    def _given_up(self, damaged: Mapping[str, Damage]) -> HubError:
        """What is known to be wrong is not left in the cache, for no other program either."""
        for name in damaged:
            forget(self.folder / name, self._kept / "blobs")
        name, damage = next(iter(damaged.items()))
        return HubError(
            f"{self.repo.repo_id}: {name} arrives damaged from {endpoint()} each time "
            f"({_compared(damage)}); run it again later, or set HF_ENDPOINT to another mirror"
        )


def _digests(repo: Repo, folder: Path, name: str) -> frozenset[str]:
    """What a file may hash to: of a large one the sha256 is told, of a small one git's id, or the ETag is a hash."""
    told = repo.files[name].digests if name in repo.files else frozenset()
    return told if any(one.startswith("sha256:") for one in told) else told | cached_as(folder / name)


def _kept(folder: Path, options: HubOptions) -> Path:
    """All that the cache has of a repo; `folder` is where one commit's config.json lies."""
    return folder.parents[1 + options.depth]


def whole_in_cache(repo_id: str, options: HubOptions) -> Path | None:
    """The repo's folder in the cache, None where files are missing that a model needs."""
    folder = cached_folder(repo_id, options)
    if folder is None:
        return None
    try:
        return folder if all((folder / name).exists() for name in _weights_in(folder)) else None
    except CheckpointError:
        return None


def _from_cache(
    repo_id: str, options: HubOptions, error: HubError, progress: ProgressCallback | None, weights: bool
) -> Path:
    """Where the Hub cannot or may not be asked; its `error` where the cache has not all of the repo."""
    with explained(repo_id):
        folder = whole_in_cache(repo_id, options) if weights else cached_folder(repo_id, options, TOKENIZER)
    if folder is None:
        raise error
    verifier = Verifier(folder, _kept(folder, options))
    if verifier.can_remember():
        names = (CONFIG, *COMPANIONS, INDEX, *(_weights_in(folder) if weights else ()))
        expected = {name: cached_as(folder / name) for name in names if (folder / name).exists()}
        for name, damage in verifier.damaged(expected, _verifying(progress)).items():
            raise HubError(
                f"{name} of {repo_id} lies in the cache damaged ({_compared(damage)}); "
                "run it again with a network and without HF_HUB_OFFLINE, it is downloaded anew then"
            )
    return folder


def _weights_in(folder: Path) -> list[str]:
    """The files that a folder's weights are in, whether or not they are there; CheckpointError where nothing says."""
    has_file = (folder / SINGLE).exists()
    return [SINGLE] if has_file else _listed_shards(folder, lambda name: (folder / name).exists())


def _listed_shards(folder: Path, has: Callable[[str], bool]) -> list[str]:
    """The shards that a folder's index names, without those that are not there and that a model does without."""
    config, listed = read_json(folder / CONFIG, CheckpointError), read_index(folder / INDEX)
    return [file for file, names in listed.items() if has(file) or not may_be_missing(names, config)]


def _verifying(progress: ProgressCallback | None) -> Callable[[int, int], None]:
    def report(done: int, total: int) -> None:
        if progress is not None:
            progress(Progress("verify", done, total, "bytes"))

    return report


def _compared(damage: Damage) -> str:
    return f"{damage.found} instead of {damage.expected}"


def _check_files(repo: Repo, weights: bool) -> None:
    """Whether the repo can be a model, or at least its tokenizer, before anything of it is fetched."""
    if not weights:
        if TOKENIZER not in repo.files:
            raise HubError(f"{repo.repo_id} has no {TOKENIZER}; choose another repo (an '-hf' conversion has it)")
        return
    if SINGLE not in repo.files and INDEX not in repo.files:
        raise HubError(f"{repo.repo_id} {_no_weights(sorted(repo.files))}")
    if CONFIG not in repo.files:
        raise HubError(f"{repo.repo_id} has no config.json; choose a repo that holds a whole model, not an adapter")


def _no_weights(names: Sequence[str]) -> str:
    other = [name for name in names if Path(name).suffix in UNREADABLE]
    if other:
        return (
            f"holds only pickle weights ({some(other[:1])}), which can run code when opened; "
            "choose a repo with safetensors (the zai-org 0414 and -hf repos have them)"
        )
    gguf = [name for name in names if name.endswith(".gguf")]
    if gguf:
        return f"holds GGUF files ({some(gguf[:1])}), of which none is chosen; download one, and give the file itself"
    if "adapter_config.json" in names:
        return "holds an adapter (LoRA), no whole model; choose the repo of a model that it was merged into"
    strange = [name for name in names if name.endswith(".safetensors")]
    if strange:
        return f"has neither {SINGLE} nor {INDEX}, which would say what {some(strange)} hold; choose another repo"
    return "holds no safetensors weights; choose a repo with safetensors"


def _check_disk(repo: Repo, needed: int) -> None:
    kept_in = cache(repo.options)
    folder = next(parent for parent in (kept_in, *kept_in.absolute().parents) if parent.exists())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise HubError(
            f"{repo.repo_id} needs {readable(needed)} of disk, {readable(free)} are free in {kept_in}; "
            "free some space, or set HF_HOME to a folder on another disk"
        )


def _remove_unfinished(repo_id: str, kept: Path, cache: Path) -> None:
    """What killed downloads left: huggingface_hub goes on with none of it. It holds a lock on what it is writing."""
    left = []
    for part in (kept / "blobs").glob("*.*.incomplete"):
        name = part.name.removesuffix(".incomplete").rpartition(".")[0]
        if is_abandoned(cache / ".locks" / kept.name / f"{name}.lock"):
            left.append(part.stat().st_size)
            part.unlink()
    if left:
        what = f"{len(left)} unfinished files of {repo_id} ({readable(sum(left))})"
        logger.warning("removed %s, which downloads that were killed had left in the cache", what)


class _Stopped(Exception):
    """Ends the downloading threads after the caller stopped."""


class _Counter:
    """Bytes that arrived so far, of `total`."""

    def __init__(self, progress: ProgressCallback | None) -> None:
        self.total = 0
        self.stopped = False
        self._done, self._shown = 0, 0
        self._progress = progress
        self._lock = threading.Lock()

    def add(self, count: int) -> None:
        """Called by the downloading threads."""
        if self.stopped:
            raise _Stopped
        with self._lock:
            self._done += count

    def show(self) -> None:
        """Called by the caller's thread."""
        done = max(self._shown, min(self._done, self.total))  # a server that began again does not turn the bar back
        if self._progress is not None and done != self._shown:
            self._shown = done
            self._progress(Progress("download", done, self.total, "bytes"))

    def finish(self) -> None:
        """All of it is here, also what needed no bytes from the Hub."""
        self._done = self.total
        self.show()


def _in_threads(work: Callable[[str], object], names: Sequence[str], counter: _Counter) -> Exception | None:
    """Works on all names, some at once; the first error, if any. The caller's thread shows the count meanwhile."""
    waiting, ended = queue.SimpleQueue[str](), queue.SimpleQueue[Exception | None]()
    for name in names:
        waiting.put(name)

    def run() -> None:
        try:
            while not counter.stopped:
                work(waiting.get_nowait())
        except queue.Empty:
            ended.put(None)
        except Exception as error:
            ended.put(error)
        except BaseException as error:  # a panic of native code
            ended.put(HubError(f"the download failed ({one_line(error)}); run it again"))
        else:
            ended.put(None)

    threads = [threading.Thread(target=run, daemon=True) for _ in range(min(_AT_ONCE, len(names)))]
    for thread in threads:
        thread.start()
    try:
        left = len(threads)
        while left:
            try:
                error = ended.get(timeout=_POLL_SECONDS)
            except queue.Empty:
                counter.show()
                continue
            if error is not None:
                return error
            left -= 1
        return None
    finally:
        counter.stopped = left > 0
        deadline = time.monotonic() + _LEAVING_SECONDS
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
