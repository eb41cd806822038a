"""A model from the Hugging Face Hub or ModelScope: only the files needed, and refused early where it cannot work.

How files come is glm4lite/hub/transfer.py's.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path

from glm4lite.base.errors import CheckpointError, HubError
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
from glm4lite.base.sizes import readable
from glm4lite.hub.arriving import Arriving, arrived_of
from glm4lite.hub.cache import free_bytes, tag_of
from glm4lite.hub.client import explained, session, silence
from glm4lite.hub.connections import Counter, ProgressCallback
from glm4lite.hub.digests import Damage, digest_of
from glm4lite.hub.hosts import Repo, host_of
from glm4lite.hub.options import HubOptions
from glm4lite.hub.patience import Patience
from glm4lite.hub.transfer import Transfer, Wanted
from glm4lite.hub.verified import Verifier

logger = logging.getLogger("glm4lite")


ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapters.safetensors")
"""What an adapter is, as PEFT and mlx-lm call it."""


class OnlyGguf(HubError):
    """A repo holds GGUF files and no safetensors, so that one of those is to be chosen."""


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
        snapshot.remember()
    return snapshot.folder


def download_config(repo_id: str, options: HubOptions) -> Path:
    """The local folder of a repo's config.json, downloaded alone, whatever weights it has. HubError as `download`."""
    try:
        if options.local_files_only:
            raise _absent(repo_id, options)
        host = host_of(repo_id)
        with explained(repo_id, host.address()):
            repo = host.listing(repo_id, options)
        if CONFIG not in repo.files:
            _check_gguf(repo)
            raise HubError(f"{repo_id} has no config.json; choose a repo that holds a whole model")
        snapshot = Snapshot(repo, None)
        snapshot.bring([CONFIG])
        return snapshot.folder
    except HubError:
        folder = None if options.force_download else cached_folder(repo_id, options)
        if folder is None:
            _check_cached_gguf(repo_id, options)
            raise
        return folder


def download_adapter(repo_id: str, progress: ProgressCallback | None, options: HubOptions) -> Path:
    """The local folder of a repo that holds a LoRA adapter. HubError as `download`, and where it holds none."""
    try:
        if options.local_files_only:
            raise _absent(repo_id, options)
        host = host_of(repo_id)
        with explained(repo_id, host.address()):
            repo = host.listing(repo_id, options)
        names = [name for name in ADAPTER_FILES if name in repo.files]
        if len(names) < 2:
            has = "pickle weights alone" if "adapter_model.bin" in repo.files else "no adapter in safetensors"
            raise HubError(f"{repo_id} holds {has}; choose a repo with {' and '.join(ADAPTER_FILES[:2])}")
        snapshot = Snapshot(repo, progress)
        snapshot.bring(names)
        return snapshot.folder
    except HubError:
        folder = None if options.force_download else cached_folder(repo_id, options, ADAPTER_FILES[0])
        if folder is None:
            raise
        return folder


def _absent(repo_id: str, options: HubOptions) -> HubError:
    root = host_of(repo_id).folder(repo_id, options).root
    return HubError(f"{repo_id} is not (or not wholly) in {root}, and local_files_only forbids to download it")


def cached_folder(repo_id: str, options: HubOptions, file: str = CONFIG) -> Path | None:
    """Where the cache has that file of the repo at the revision, and whatever else was downloaded with it."""
    host = host_of(repo_id)
    kept = host.folder(repo_id, options)
    commit = kept.commit(host.revision(options))
    folder = None if commit is None else kept.snapshot(commit, options.subfolder)
    return folder if folder is not None and (folder / file).exists() else None


class Snapshot:
    """One commit of a repo, as its host lists it and as far as the cache's folder of it has been filled."""

    def __init__(self, repo: Repo, progress: ProgressCallback | None) -> None:
        self.repo = repo
        self.folder = repo.snapshot
        self._kept = repo.folder
        self._progress = progress
        self._verifier = Verifier(self.folder, self._kept.path)
        self._counter = Counter(progress)

    @classmethod
    def of(
        cls, repo_id: str, options: HubOptions, progress: ProgressCallback | None = None, weights: bool = True
    ) -> "Snapshot":
        """The newest commit (of the revision asked for); nothing of it is fetched.

        Raises:
            HubError: the repo cannot be listed, or cannot be a model (without `weights`: has no tokenizer.json).
        """
        host = host_of(repo_id)
        with explained(repo_id, host.address()):
            repo = host.listing(repo_id, options)
            _check_files(repo, weights)
        return cls(repo, progress)

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
        damaged = self._found_damaged([name for name in names if name not in missing])
        with self._explained():
            self._remove_unfinished()
        while missing or damaged:
            with self._explained():
                wanted = [self.wanted(name, anew=forced or name in damaged) for name in [*missing, *damaged]]
                check_disk(self.repo.repo_id, wanted, self._kept.root, "set HF_HOME to a folder on another disk")
            self._say_unverified(wanted)
            self.fetch(wanted, self._place)
            damaged = self._found_damaged(missing)  # of what another program brought: ours is noted
            missing = []
        if self._kept.commit(self._revision) is None:
            self.remember()

    def remember(self) -> None:
        """That the revision is this commit, of which all that a model needs is here."""
        with self._explained(), suppress(PermissionError):  # a cache of another user's
            self._kept.remember(self._revision, self.repo.commit)

    def wanted(self, name: str, target: Path | None = None, anew: bool = False) -> Wanted:
        """A file of the repo, to be fetched into the cache, or as `target`, where it is not to stay."""
        listed, repo = self.repo.files[name], self.repo
        size, digests = listed.size, listed.digests
        if digests:
            blob = min(digests, key=_by_kind).partition(":")[2]
        else:
            blob, told = repo.host.tag(repo, name)
            size, digests = size or told, digest_of(blob)
        commit = None if repo.at else repo.commit
        lock = self._kept.lock(blob) if target is None else None
        place = self._kept.blobs / blob if target is None else target
        url, headers = repo.url(name), repo.headers()
        return Wanted(name, repo.repo_id, url, headers, place, size, digests, commit, lock, anew, target is None)

    def fetch(self, wanted: Sequence[Wanted], arrived: Callable[[Wanted, Arriving], None]) -> None:
        """Brings files, each of which is handed to `arrived`. HubError."""
        self.finish(self.begin(wanted, arrived))

    def begin(
        self, wanted: Sequence[Wanted], arrived: Callable[[Wanted, Arriving], None], room: int | None = None
    ) -> Transfer:
        """Starts to bring files, beside what the caller does; `room` as `Transfer.start` takes it."""
        transfer = Transfer(session(), wanted, self._counter, arrived, Patience(silence=silence()))
        transfer.start(room)
        return transfer

    def finish(self, transfer: Transfer) -> None:
        """Returns when the files are here. HubError."""
        failed = transfer.wait()
        if failed is not None:
            with self._explained():
                raise failed

    def _place(self, wanted: Wanted, arriving: Arriving) -> None:
        ours = arriving.path.exists()
        if ours:
            arriving.publish(wanted.target)
        self._kept.place(wanted.target.name, self.folder / wanted.name)
        if ours:
            self._verifier.note(wanted.name, wanted.digests)

    @property
    def _revision(self) -> str:
        return self.repo.host.revision(self.repo.options)

    def _explained(self) -> AbstractContextManager[None]:
        return explained(self.repo.repo_id, self.repo.host.address())

    def _remove_unfinished(self) -> None:
        tags = frozenset(one.partition(":")[2] for listed in self.repo.files.values() for one in listed.digests)
        left = self._kept.remove_unfinished(keep=tags)
        if left:
            what = f"{len(left)} unfinished files of {self.repo.repo_id} ({readable(sum(left))})"
            logger.warning("removed %s, which downloads that were killed had left in the cache", what)

    def _found_damaged(self, names: Sequence[str]) -> dict[str, Damage]:
        found = self.damaged(names)
        for name, damage in found.items():
            what = f"{name} of {self.repo.repo_id} lay in the cache damaged ({damage})"
            logger.warning("%s; it is downloaded again", what)
        return found

    def damaged(self, names: Sequence[str]) -> dict[str, Damage]:
        """Of what lies in the cache. One that cannot be written was filled by another user."""
        if not names or not self._verifier.can_remember():
            return {}
        expected = {name: self._digests(name) for name in names}
        return self._verifier.damaged(expected, _verifying(self._progress))

    def _digests(self, name: str) -> frozenset[str]:
        """What a file may hash to: of a large one the sha256 is told, of a small one git's id, or the tag is a hash."""
        told = self.repo.files[name].digests
        by_tag = digest_of(tag_of(self.folder / name))
        return told if any(one.startswith("sha256:") for one in told) else told | by_tag

    def _say_unverified(self, wanted: Sequence[Wanted]) -> None:
        unknown = [one.name for one in wanted if not one.digests]
        if unknown:
            where = self.repo.host.address()
            what = f"{self.repo.repo_id}: {where} tells no checksum of {some(unknown)}"
            logger.warning("%s: what arrives cannot be verified", what)


def _by_kind(digest: str) -> bool:
    """Files of Git LFS are called by their sha256, small ones by git's id."""
    return digest.startswith("git:")


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
        _check_cached_gguf(repo_id, options)
        raise error
    verifier = Verifier(folder, host_of(repo_id).folder(repo_id, options).path)
    if verifier.can_remember():
        names = (CONFIG, *COMPANIONS, INDEX, *(_weights_in(folder) if weights else ()))
        expected = {name: digest_of(tag_of(folder / name)) for name in names if (folder / name).exists()}
        for name, damage in verifier.damaged(expected, _verifying(progress)).items():
            raise HubError(
                f"{name} of {repo_id} lies in the cache damaged ({damage}); "
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


def _check_files(repo: Repo, weights: bool) -> None:
    """Whether the repo can be a model, or at least its tokenizer, before anything of it is fetched."""
    if not weights:
        if TOKENIZER not in repo.files:
            _check_gguf(repo)
            raise HubError(f"{repo.repo_id} has no {TOKENIZER}; choose another repo (an '-hf' conversion has it)")
        return
    if SINGLE not in repo.files and INDEX not in repo.files:
        _check_gguf(repo)
        raise HubError(f"{repo.repo_id} {_no_weights(sorted(repo.files))}")
    if CONFIG not in repo.files:
        raise HubError(f"{repo.repo_id} has no config.json; choose a repo that holds a whole model, not an adapter")


def _check_gguf(repo: Repo) -> None:
    """Raises OnlyGguf where what a repo lacks lies in its GGUF files."""
    gguf = [name for name in repo.every if name.endswith(".gguf")]
    if gguf:
        raise OnlyGguf(f"{repo.repo_id} holds GGUF files ({some(gguf[:1])}); pull one, and give the file itself")


def _check_cached_gguf(repo_id: str, options: HubOptions) -> None:
    """Raises OnlyGguf where nothing but GGUF files is kept of a repo."""
    kept = host_of(repo_id).folder(repo_id, options)
    commit = kept.commit(host_of(repo_id).revision(options))
    gguf = [] if commit is None else sorted(kept.snapshot(commit, options.subfolder).rglob("*.gguf"))
    if gguf:
        raise OnlyGguf(f"of {repo_id} the cache has GGUF files ({some([gguf[0].name])}); give one")


def _no_weights(names: Sequence[str]) -> str:
    other = [name for name in names if Path(name).suffix in UNREADABLE]
    if other:
        return (
            f"holds only pickle weights ({some(other[:1])}), which can run code when opened; "
            "choose a repo with safetensors (the zai-org 0414 and -hf repos have them)"
        )
    if "adapter_config.json" in names:
        return "holds an adapter (LoRA), no whole model; give its base model, and the adapter as --lora"
    strange = [name for name in names if name.endswith(".safetensors")]
    if strange:
        return f"has neither {SINGLE} nor {INDEX}, which would say what {some(strange)} hold; choose another repo"
    return "holds no safetensors weights; choose a repo with safetensors"


def check_disk(whose: str, wanted: Sequence[Wanted], folder: Path, otherwise: str) -> None:
    """Whether a folder's disk has room for what has not arrived yet of files. HubError."""
    needed = sum(max(0, one.size - arrived_of(one.target)) for one in wanted)
    free = free_bytes(folder)
    if needed > free:
        raise HubError(
            f"{whose} needs {readable(needed)} of disk, {readable(free)} are free in {folder}; "
            f"free some space, or {otherwise}"
        )
