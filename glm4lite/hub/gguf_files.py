"""The GGUF files of a repo, of which one model is chosen: `ORG/NAME:Q4_K_M`, or by the file's name.

A file that is split (`...-00001-of-00003.gguf`) is one model. Repos keep them at the top or in a folder for each.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path, PurePosixPath

from glm4lite.base.errors import HubError
from glm4lite.base.files import some
from glm4lite.base.sizes import readable
from glm4lite.hub.client import explained
from glm4lite.hub.connections import ProgressCallback
from glm4lite.hub.download import Snapshot
from glm4lite.hub.hosts import host_of
from glm4lite.hub.options import MODELSCOPE, HubOptions

SUFFIX = ".gguf"

_PART = re.compile(r"(.*-)(\d{5})(-of-)(\d{5})(\.gguf)", re.IGNORECASE | re.ASCII)
_MOST_PARTS = 500
_NO_MODELS = ("mmproj", "imatrix")  # how the names of other GGUF files of a model's repo begin, or end
_MOST_SHOWN = 12


def parts_of(name: str) -> Sequence[str]:
    """All files of a split one, the first first. HubError."""
    split = _PART.fullmatch(name)
    if split is None:
        return [name]
    count = int(split[4])
    if not 1 <= count <= _MOST_PARTS:
        raise HubError(f"{name} says that it has {count} parts; check the address")
    return [f"{split[1]}{number:05d}{split[3]}{split[4]}{split[5]}" for number in range(1, count + 1)]


def split_choice(name: str) -> tuple[str, str]:
    """(repo, what stands behind its colon or "") of ORG/NAME:CHOICE or ms:ORG/NAME:CHOICE."""
    host = MODELSCOPE if name.startswith(MODELSCOPE) else ""
    repo, _, choice = name.removeprefix(host).partition(":")
    return host + repo, choice


def models_in(names: Iterable[str]) -> list[str]:
    """The GGUF models among a repo's paths, each by its first file."""
    found = []
    for name in names:
        stem = PurePosixPath(name).stem.casefold()
        split = _PART.fullmatch(name)
        other = any(stem.startswith(word) or stem.endswith(word) for word in _NO_MODELS)
        if name.casefold().endswith(SUFFIX) and not other and (split is None or int(split[2]) == 1):
            found.append(name)
    return sorted(found)


def chosen(repo_id: str, choice: str, sizes: Mapping[str, int]) -> str:
    """The path of the one model that a choice means; "" is enough where there is one.

    Raises:
        HubError: none or several may be meant; the choices are listed with their sizes.
    """
    models = models_in(sizes)
    if not models:
        raise HubError(f"{repo_id} holds no GGUF model; leave out what stands behind its name")
    meant = _meant(choice, models)
    if len(meant) == 1:
        return meant[0]
    listed = meant or models
    shown = ", ".join(f"{_called(name)} ({readable(_size(name, sizes))})" for name in listed[:_MOST_SHOWN])
    rest = f" and {len(listed) - _MOST_SHOWN} more" if len(listed) > _MOST_SHOWN else ""
    what = f"{len(listed)} that may be meant by {choice[:100]!r}" if meant and choice else "these GGUF models"
    what = f"no GGUF model {choice[:100]!r}, but these" if not meant else what
    raise HubError(f"{repo_id} holds {what}: {shown}{rest}; give one, as in {repo_id}:{_example(listed[0])}")


def _meant(choice: str, models: Sequence[str]) -> list[str]:
    """By its path or name; else by the end of its name, such as Q4_K_M; else by a part of it."""
    asked = choice.casefold()
    if not asked:
        return list(models)
    exact = [name for name in models if asked in (name.casefold(), PurePosixPath(name).name.casefold())]
    ends = [name for name in models if re.search(rf"(^|[-._/]){re.escape(asked)}$", _called(name).casefold())]
    within = [
        name for name in models if re.search(rf"(^|[-._/]){re.escape(asked)}($|[-._/])", _called(name).casefold())
    ]
    return exact or ends or within


def _called(name: str) -> str:
    """Without what each of them has."""
    split = _PART.fullmatch(name)
    return split[1][:-1] if split else name[: -len(SUFFIX)]


def _example(name: str) -> str:
    return PurePosixPath(_called(name)).name.replace(".", "-").rpartition("-")[2]


def _size(name: str, sizes: Mapping[str, int]) -> int:
    return sum(sizes.get(part, 0) for part in parts_of(name))


def download_gguf(name: str, progress: ProgressCallback | None, options: HubOptions) -> Path:
    """The chosen model's file (the first of several) on this machine, downloaded where it is not there yet.

    name: ORG/NAME:CHOICE, or ORG/NAME of a repo with one GGUF model.

    Raises:
        HubError: the repo cannot be listed, the choice means none or several, or it cannot be downloaded.
    """
    repo_id, choice = split_choice(name)
    host = host_of(repo_id)
    try:
        if options.local_files_only:
            raise HubError(f"{name} is not (or not wholly) in the cache, and local_files_only forbids to download it")
        with explained(repo_id, host.address()):
            listed = host.listing(repo_id, options)
    except HubError:
        kept = None if options.force_download else _from_cache(repo_id, choice, options)
        if kept is None:
            raise
        return kept
    path = PurePosixPath(chosen(repo_id, choice, {path: one.size for path, one in listed.every.items()}))
    return bring(repo_id, options, path, progress)


def bring(repo_id: str, options: HubOptions, path: PurePosixPath, progress: ProgressCallback | None) -> Path:
    """A file of a repo by its path within what `options` name, and the other parts of a split one. HubError."""
    inner = PurePosixPath(options.subfolder) / path.parent
    options = replace(options, subfolder="" if str(inner) == "." else str(inner))
    host = host_of(repo_id)
    with explained(repo_id, host.address()):
        snapshot = Snapshot(host.listing(repo_id, options), progress)
    names = parts_of(path.name)
    lacking = [name for name in names if name not in snapshot.repo.files]
    if lacking:
        raise HubError(f"{repo_id} has no {some(lacking)} at {host.revision(options)}; check the name")
    snapshot.bring(names)
    return snapshot.folder / names[0]


def _from_cache(repo_id: str, choice: str, options: HubOptions) -> Path | None:
    """What the choice means of the files that the cache has whole."""
    host = host_of(repo_id)
    kept = host.folder(repo_id, options)
    commit = kept.commit(host.revision(options))
    if commit is None:
        return None
    folder = kept.snapshot(commit, options.subfolder)
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files_in(folder)}
    with suppress(HubError):
        first = chosen(repo_id, choice, sizes)
        if all(str(PurePosixPath(first).with_name(part)) in sizes for part in parts_of(PurePosixPath(first).name)):
            return folder / first
    return None


def files_in(folder: Path) -> list[Path]:
    """The GGUF files below a folder that are there."""
    return sorted(path for path in folder.rglob(f"*{SUFFIX}") if path.exists())
