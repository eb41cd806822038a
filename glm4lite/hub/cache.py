"""The cache's folders, laid out as huggingface_hub lays them out, so that all programs share what one has downloaded.

    models--ORG--NAME/blobs/<entity tag>             the files
    models--ORG--NAME/snapshots/<commit>/<name>      links to them
    models--ORG--NAME/refs/<branch or tag>           the commit that it was
    .locks/models--ORG--NAME/<entity tag>.lock       locked while somebody fetches that file

Where the system has no links (Windows without its developer mode) a snapshot holds the files themselves.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from glm4lite.base.errors import HubError
from glm4lite.base.files import CONFIG
from glm4lite.base.owned_folder import is_abandoned, remove_tree
from glm4lite.base.whole_file import replace, write_whole
from glm4lite.hub.arriving import JOURNAL, UNFINISHED

_GLM = re.compile(rb'"model_type"\s*:\s*"(glm4?|chatglm)"')
_GGUF = re.compile(rb"general\.architecture\x08\0{3}.{8}(glm4|chatglm)", re.DOTALL)
_GGUF_START = 1 << 16  # the kind of model is the first that converters write
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class RepoFolder:
    """All that a cache has of one repo."""

    root: Path
    repo_id: str

    @property
    def path(self) -> Path:
        return self.root / f"models--{self.repo_id.replace('/', '--')}"

    @property
    def blobs(self) -> Path:
        return self.path / "blobs"

    def snapshot(self, commit: str, subfolder: str = "") -> Path:
        return self.path.joinpath("snapshots", commit, *PurePosixPath(subfolder).parts)

    def lock(self, blob: str) -> Path:
        return self.root / ".locks" / self.path.name / f"{blob}.lock"

    def commit(self, revision: str) -> str | None:
        """The commit that a revision was when it was last downloaded."""
        if _COMMIT.fullmatch(revision):
            return revision
        try:
            found = self._ref(revision).read_text(encoding="ascii").strip()
        except (OSError, ValueError):
            return None
        return found if is_name(found) else None

    def remember(self, revision: str, commit: str) -> None:
        """Which commit a revision is. OSError."""
        if revision != commit and self.commit(revision) != commit:
            self._ref(revision).parent.mkdir(parents=True, exist_ok=True)
            write_whole(self._ref(revision), commit.encode())

    def _ref(self, revision: str) -> Path:
        parts = PurePosixPath(revision).parts
        if not parts or not all(is_name(part) for part in parts):
            raise HubError(f"the revision {revision[:100]!r} cannot be kept in a cache; give a branch, tag or commit")
        return self.path.joinpath("refs", *parts)

    def place(self, blob: str, name: Path) -> None:
        """Shows a file of `blobs` under its name in a snapshot. OSError."""
        name.parent.mkdir(parents=True, exist_ok=True)
        source = self.blobs / blob
        with suppress(FileNotFoundError):
            name.unlink()
        try:
            name.symlink_to(os.path.relpath(source, name.parent))
        except FileExistsError:  # another program was quicker
            return
        except (OSError, NotImplementedError):
            replace(source, name)

    def remove_unfinished(self, keep: frozenset[str] = frozenset()) -> list[int]:
        """Removes what killed downloads left and nobody goes on with: the sizes.

        Those of huggingface_hub are `<tag>.<random>.incomplete`, with which it never goes on; of our own those stay
        whose tag is one of `keep`. What is being written holds a lock.
        """
        left = []
        for part in self.blobs.glob("*.incomplete"):
            ours = part.name.endswith(UNFINISHED)
            tag = part.name.removesuffix(UNFINISHED) if ours else part.name.rsplit(".", 2)[0]
            if (ours and tag in keep) or not is_abandoned(self.lock(tag)):
                continue
            with suppress(OSError):
                left.append(part.stat().st_size)
                part.unlink()
                (self.blobs / f"{tag}{JOURNAL}").unlink(missing_ok=True)
        return left

    def remove(self) -> None:
        """All of it. What is left where a program has a file open can be removed again later."""
        remove_tree(self.path)
        remove_tree(self.lock("x").parent)


def is_name(text: str) -> bool:
    """Whether a server's word may become a file's name: it leads out of no folder, on no system."""
    return 0 < len(text) <= 200 and text.isprintable() and text not in (".", "..") and not set(text) & set('/\\:*?"<>|')


def forget(path: Path, blobs: Path) -> None:
    """Takes a file out of the cache, for every program that uses it; `blobs`: the folder that its link leads into."""
    with suppress(OSError):
        kept = Path(os.path.normpath(path.parent / os.readlink(path)))
        if kept.parent == blobs:
            kept.unlink()
    with suppress(OSError):
        path.unlink()


def tag_of(path: Path) -> str:
    """The entity tag that a file of a snapshot came with; "" where the system has no links."""
    try:
        return Path(os.readlink(path)).name
    except OSError:
        return ""


def repos(root: Path) -> Iterator[RepoFolder]:
    """Those of which a cache holds anything, in alphabetical order."""
    with suppress(OSError):
        for path in sorted(root.glob("models--*--*"), key=lambda found: found.name.casefold()):
            if path.is_dir():
                yield RepoFolder(root, path.name.removeprefix("models--").replace("--", "/", 1))


def configs(repo: RepoFolder) -> list[Path]:
    """The config.json of each snapshot that says GLM-4."""
    found = []
    for config in sorted(repo.path.glob(f"snapshots/*/{CONFIG}")):
        with suppress(OSError):
            if _GLM.search(config.read_bytes()[:1_000_000]):
                found.append(config)
    return found


def is_glm_gguf(path: Path) -> bool:
    """Whether a file's beginning says that it is a GLM-4 as GGUF."""
    try:
        with path.open("rb") as file:
            return _GGUF.search(file.read(_GGUF_START)) is not None
    except OSError:
        return False


def size_of(folder: Path) -> int:
    """Bytes of disk. Of unfinished files, which are as long as they will be, what has arrived."""
    total, seen = 0, set[tuple[int, int]]()
    for path in folder.rglob("*"):
        with suppress(OSError):
            about = path.stat()  # of a link too, whose file may lie in a store that all repos share
            if not path.is_dir() and (about.st_dev, about.st_ino) not in seen:
                seen.add((about.st_dev, about.st_ino))
                total += min(about.st_size, getattr(about, "st_blocks", about.st_size) * 512)
    return total


def free_bytes(folder: Path) -> int:
    """What is free on the disk of a folder, which need not be there yet. OSError."""
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    return shutil.disk_usage(there).free
