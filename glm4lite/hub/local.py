"""The models on this machine: in the Hub's cache, in ModelScope's beside it, and those that `pull --quant` made."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from glm4lite.base.errors import HubError
from glm4lite.base.files import CONFIG, INDEX, SINGLE
from glm4lite.base.owned_folder import UNFINISHED_FOLDER, OwnedFolder, remove_tree
from glm4lite.base.user_folder import models_folder
from glm4lite.hub.arriving import UNFINISHED
from glm4lite.hub.cache import RepoFolder, configs, repos, size_of
from glm4lite.hub.client import cache_folder, remove_from_shared_store
from glm4lite.hub.hosts import modelscope_cache
from glm4lite.hub.options import MODELSCOPE, HubOptions


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
    return [*_cached(), *_made()]


def cached_models() -> list[str]:
    """The repos in the cache of which a config.json is there that says GLM-4, in alphabetical order."""
    return sorted({name for name, _, _ in _repos()}, key=str.casefold)


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
        unfinished = any(repo.blobs.glob(f"*{UNFINISHED}")) or not any(_has_weights(path.parent) for path in found)
        yield LocalModel(name, repo.path, size_of(repo.path), "unfinished" if unfinished else "whole")


def _has_weights(folder: Path) -> bool:
    """Whether at least one commit's files are there; whether all are, loading says."""
    return any((folder / name).exists() for name in (SINGLE, INDEX)) and any(folder.glob("*.safetensors"))


def _made() -> Iterator[LocalModel]:
    folder = models_folder()
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if path.name.startswith(".") and path.name.endswith(UNFINISHED_FOLDER):
            name = path.name.removeprefix(".").removesuffix(UNFINISHED_FOLDER)
            yield LocalModel(name, path, size_of(path), "unfinished")
        elif path.is_dir() and (path / CONFIG).exists():
            yield LocalModel(path.name, path, size_of(path), "whole")
