"""The models on this machine: in the caches of the Hub and of ModelScope, GGUF files that were pulled, and those that
`pull --quant` made.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from glm4lite.base.errors import HubError
from glm4lite.base.files import CONFIG, INDEX, SINGLE
from glm4lite.base.owned_folder import UNFINISHED_FOLDER, OwnedFolder, remove_tree
from glm4lite.base.user_folder import models_folder
from glm4lite.hub.arriving import UNFINISHED
from glm4lite.hub.cache import RepoFolder, configs, forget, is_glm_gguf, repos, size_of
from glm4lite.hub.client import cache_folder, remove_from_shared_store
from glm4lite.hub.gguf_files import SUFFIX, files_in, models_in, parts_of
from glm4lite.hub.hosts import modelscope_cache
from glm4lite.hub.options import MODELSCOPE, HubOptions
from glm4lite.hub.urls import urls_folder


@dataclass(frozen=True)
class LocalModel:
    """A model as it is named on the command line, its folder, its bytes on disk.

    state: "whole", or "unfinished" where a download or a quantization was begun and goes on when it is asked for again.
    """

    name: str
    path: Path
    nbytes: int
    state: str


def local_models() -> list[LocalModel]:
    """GLM-4 models alone: other programs' models are theirs to list."""
    return [*_cached(), *_gguf(), *_made()]


def runnable_models() -> list[str]:
    """The names of those that are whole, as far as that shows at a glance, in alphabetical order."""
    names = {name for name, _, found in _repos() if any(_has_weights(path.parent) for path in found)}
    names |= {name for name, _ in _gguf_files()} | {path.name for path in _made_folders() if _is_whole(path)}
    return sorted(names, key=str.casefold)


def remove(name: str) -> LocalModel:
    """Removes a model by its name.

    Raises:
        HubError: there is none of that name, or it cannot be removed.
    """
    found = next((one for one in local_models() if one.name == name), None)
    if found is None:
        raise HubError(f"{name} is not on this machine; `glm4lite list` names the models that are")
    for named, repo, _ in _repos():
        if named == name:
            remove_from_shared_store(repo.root, repo.path)
            repo.remove()
    if found.path.suffix == SUFFIX:
        _remove_gguf(found.path)
    if found.path.parent == models_folder():
        _remove_made(found)
    if found.path.exists():
        raise HubError(f"{name} cannot be removed wholly: {found.path} is still there; end the programs that use it")
    return found


def _remove_made(made: LocalModel) -> None:
    if made.state == "whole":
        return remove_tree(made.path)
    try:
        OwnedFolder.of(made.path).discard()
    except BlockingIOError:
        raise HubError(f"{made.name} is being made by another process; end that first") from None


def _repos() -> Iterator[tuple[str, RepoFolder, list[Path]]]:
    """Each repo of both caches that is a GLM-4 model: how it is named, and the config.json of each of its commits."""
    options = HubOptions()
    for prefix, root in (("", cache_folder(options)), (MODELSCOPE, modelscope_cache(options))):
        for repo in repos(root):
            found = configs(repo)
            if found:
                yield prefix + repo.repo_id, repo, found


def _cached() -> Iterator[LocalModel]:
    for name, repo, found in _repos():
        has_weights = any(_has_weights(path.parent) for path in found)
        if not has_weights and any(files_in(repo.path / "snapshots")):  # each of these is a model
            continue
        unfinished = any(repo.blobs.glob(f"*{UNFINISHED}")) or not has_weights
        yield LocalModel(name, repo.path, size_of(repo.path), "unfinished" if unfinished else "whole")


def _has_weights(folder: Path) -> bool:
    """Whether at least one commit's files are there; whether all are, loading says."""
    return any((folder / name).exists() for name in (SINGLE, INDEX)) and any(folder.glob("*.safetensors"))


def _gguf() -> Iterator[LocalModel]:
    for name, path in _gguf_files():
        parts = [path.with_name(part) for part in parts_of(path.name)]
        there = [part.stat().st_size for part in parts if part.exists()]
        yield LocalModel(name, path, sum(there), "whole" if len(there) == len(parts) else "unfinished")


def _gguf_files() -> Iterator[tuple[str, Path]]:
    """The first file of each GGUF model that was pulled, by the name that it is run by."""
    options = HubOptions()
    for prefix, root in (("", cache_folder(options)), (MODELSCOPE, modelscope_cache(options))):
        for repo in repos(root):
            seen = dict[str, Path]()
            for commit in sorted((repo.path / "snapshots").glob("*")):
                files = {path.relative_to(commit).as_posix(): path for path in files_in(commit)}
                seen |= {name: files[name] for name in models_in(files) if is_glm_gguf(files[name])}
            yield from ((f"{prefix}{repo.repo_id}:{name}", path) for name, path in seen.items())
    by_address = files_in(urls_folder(options))
    first = models_in(str(path) for path in by_address)
    yield from ((name, Path(name)) for name in first if is_glm_gguf(Path(name)))


def _remove_gguf(first: Path) -> None:
    """Its files, the folders that are then empty, and what was made of its metadata."""
    for part in parts_of(first.name):
        forget(first.with_name(part), _blobs_of(first))
    for folder in first.parents:
        try:
            folder.rmdir()
        except OSError:
            break


def _blobs_of(file: Path) -> Path:
    """The folder of the files that a snapshot's links lead to; of any other file its own."""
    snapshots = next((folder for folder in file.parents if folder.name == "snapshots"), None)
    return file.parent if snapshots is None else snapshots.parent / "blobs"


def _made() -> Iterator[LocalModel]:
    for path in _made_folders():
        if path.name.startswith(".") and path.name.endswith(UNFINISHED_FOLDER):
            name = path.name.removeprefix(".").removesuffix(UNFINISHED_FOLDER)
            yield LocalModel(name, path, size_of(path), "unfinished")
        elif _is_whole(path):
            yield LocalModel(path.name, path, size_of(path), "whole")


def _made_folders() -> list[Path]:
    folder = models_folder()
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _is_whole(made: Path) -> bool:
    return not made.name.startswith(".") and made.is_dir() and (made / CONFIG).exists()
