"""Which state of a Hub repository is taken, and how it is fetched."""

import os
from dataclasses import dataclass, fields
from pathlib import Path, PurePosixPath
from typing import Any, Self

from glm4lite.base.errors import HubError, shown

MODELSCOPE = "ms:"
"""How the name of a repo of ModelScope begins."""


@dataclass(frozen=True)
class HubOptions:
    """Which state of a Hub repo is taken, and how it is fetched. Names and meanings are huggingface_hub's.

    revision: a branch, a tag or a commit (None: main). cache_dir: instead of HF_HOME's. token: True is the stored one,
    False none, None the stored one where there is one. subfolder: of the repo, or of a local folder.

    Raises HubError for a value that cannot be used.
    """

    revision: str | None = None
    cache_dir: str | Path | None = None
    token: str | bool | None = None
    local_files_only: bool = False
    force_download: bool = False
    subfolder: str = ""

    def __post_init__(self) -> None:
        for name in ("local_files_only", "force_download"):
            if not isinstance(getattr(self, name), bool):
                raise HubError(f"{name} is {shown(getattr(self, name))}; use True or False")
        if not isinstance(self.token, str | bool | None):
            raise HubError("token must be a token's text, True for the stored one, or False for none")
        if self.cache_dir is not None:
            if not isinstance(self.cache_dir, str | os.PathLike) or not str(self.cache_dir).strip():
                raise HubError(f"cache_dir is {shown(self.cache_dir)}; use a folder")
            object.__setattr__(self, "cache_dir", Path(self.cache_dir).absolute())
        if self.revision is not None and (not isinstance(self.revision, str) or not self.revision.strip()):
            raise HubError(f"revision is {shown(self.revision)}; use a branch, a tag or a commit")
        if not isinstance(self.subfolder, str) or not _stays_within(self.subfolder):
            raise HubError(f"subfolder is {shown(self.subfolder)}; use a path within the model, such as 'int4'")
        if self.local_files_only and self.force_download:
            raise HubError("local_files_only and force_download contradict each other; leave one out")

    @classmethod
    def taken_from(cls, names: dict[str, Any]) -> Self:
        """Of arguments by name, those that are meant for the Hub, which are taken out; None is as not given."""
        own = {field.name: names.pop(field.name, None) for field in fields(cls)}
        return cls(**{name: value for name, value in own.items() if value is not None})

    @property
    def depth(self) -> int:
        """How many folders the subfolder lies deep."""
        return len(PurePosixPath(self.subfolder).parts)


def _stays_within(path: str) -> bool:
    parts = PurePosixPath(path).parts
    return ".." not in parts and not path.startswith("/") and not set(path) & set('\\:*?"<>|') and path.isprintable()
