"""Finding and opening an adapter: a folder of this machine, or a repository that is downloaded."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from glm4lite.base.errors import CheckpointError, ConfigError, shown
from glm4lite.base.files import CONFIG, names_in, open_file, read_json, some
from glm4lite.checkpoint.folders import ADAPTER
from glm4lite.checkpoint.lora import mlx, peft
from glm4lite.checkpoint.lora.factors import AdapterFile
from glm4lite.checkpoint.shard import read_header
from glm4lite.checkpoint.streaming import ProgressCallback
from glm4lite.hub.options import HubOptions

_PICKLE = ("adapter_model.bin", "adapter_model.pt")
_LONGEST_NAME = 64


@dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter that was opened, and how much of it is wanted: `scale` times all that it changes."""

    name: str
    file: AdapterFile
    scale: float = 1.0

    def digest(self) -> bytes:
        """Equal where the adapter is: of all its files' bytes, and the scale."""
        made = hashlib.blake2b(repr(self.scale).encode(), digest_size=16)
        tensors = [tensor for one in self.file.factors for tensor in (one.a, one.b)] + [*self.file.saved.values()]
        for path in (self.file.folder / ADAPTER, *sorted({tensor.path for tensor in tensors})):
            with open_file(path) as file:
                while part := file.read(1 << 20):
                    made.update(part)
        return made.digest()


@dataclass(frozen=True)
class Loras:
    """The adapters that are asked of a load, each FOLDER_OR_REPO or FOLDER_OR_REPO=SCALE.

    always: on for everybody. choices: NAME=FOLDER_OR_REPO[=SCALE], of which a request may take one.

    Raises ConfigError for what cannot be read so.
    """

    always: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    named: Mapping[str, str] = field(init=False, default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        named: dict[str, str] = {}
        for text in self.choices:
            name, equals, source = text.partition("=")
            if not equals or not source or not name or len(name) > _LONGEST_NAME or not _plain(name):
                raise ConfigError(
                    f"--lora-modules is {shown(text)}; use NAME=FOLDER, with a NAME of letters, digits, - and _"
                )
            if name in named:
                raise ConfigError(f"--lora-modules names {name} twice")
            named[name] = source
        object.__setattr__(self, "named", named)
        for text in (*self.always, *named.values()):
            with_scale(text)

    @classmethod
    def of(cls, given: str | Path | Sequence[str | Path] | None, choices: Sequence[str] | None = None) -> Loras:
        """What a caller may write: one adapter, several, or none."""
        several = [given] if isinstance(given, str | Path) else [*(given or ())]
        if not all(isinstance(one, str | Path) for one in several):
            raise ConfigError(f"lora is {shown(given)}; use a folder or repository, or a list of them")
        return cls(tuple(map(str, several)), tuple(choices or ()))

    def __bool__(self) -> bool:
        return bool(self.always or self.choices)

    def opened(
        self, progress: ProgressCallback | None = None, hub: HubOptions = HubOptions()
    ) -> tuple[list[Adapter], dict[str, Adapter]]:
        """Those that are always on, and the choices by name. Raises Glm4liteError."""
        always = [open_adapter(text, progress, hub) for text in self.always]
        return always, {name: open_adapter(text, progress, hub) for name, text in self.named.items()}


def with_scale(text: str) -> tuple[str, float]:
    """(folder or repository, scale) of `FOLDER_OR_REPO[=SCALE]`; a folder of that very name is one."""
    source, equals, number = text.rpartition("=")
    if not equals or os.path.isdir(text):
        return text, 1.0
    try:
        scale = float(number)
    except ValueError:
        scale = math.nan
    if not source or not math.isfinite(scale) or abs(scale) > 1000:
        raise ConfigError(f"the adapter {shown(text)} has no scale behind its last =; use FOLDER=0.5, say")
    return source, scale


def open_adapter(text: str, progress: ProgressCallback | None = None, hub: HubOptions = HubOptions()) -> Adapter:
    """The adapter of `FOLDER_OR_REPO[=SCALE]`; what is not on this machine is downloaded.

    Raises:
        HubError: there is no such folder or repository.
        CheckpointError, ConfigError: it is no adapter, damaged, or of a kind that is not supported.
    """
    from glm4lite.hub.sources import resolve_adapter

    source, scale = with_scale(text)
    return Adapter(source, open_folder(resolve_adapter(source, progress, hub)), scale)


def open_folder(folder: Path) -> AdapterFile:
    """The adapter in a folder; no values are read. Raises CheckpointError, ConfigError."""
    if not os.path.lexists(folder / ADAPTER):
        what = "a model, not an adapter" if os.path.lexists(folder / CONFIG) else "no adapter"
        raise CheckpointError(f"{folder} holds {what}: it has no {ADAPTER}; give the folder that the training wrote")
    config = read_json(folder / ADAPTER)
    by_peft = "peft_type" in config
    name = peft.FILE if by_peft else mlx.FILE
    if not os.path.lexists(folder / name):
        pickled = [one for one in names_in(folder) if one in _PICKLE]
        if pickled:
            raise CheckpointError(
                f"{folder} holds only pickle weights (which can run code when opened): {some(pickled)}; save the "
                "adapter with safe_serialization=True"
            )
        raise CheckpointError(f"{folder} has no {name}; get the adapter again")
    tensors = read_header(folder / name)
    found = (peft.read_peft if by_peft else mlx.read_mlx)(folder, config, tensors)
    if not found.factors and not found.saved:
        raise CheckpointError(f"{folder / name} holds no tensors: the adapter changes nothing")
    return found


def _plain(name: str) -> bool:
    return name.isascii() and name.replace("-", "").replace("_", "").replace(".", "").isalnum()
