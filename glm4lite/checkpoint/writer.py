"""Writing a checkpoint: an ordinary folder of safetensors shards, complete or not there at all.

The sizes of all tensors are known before the first is made, so each shard's header is written first and every tensor
goes to its place as soon as it exists; nothing is collected in memory. All of it happens in a temporary folder beside
the destination, which is synced and renamed at the end, and removed if anything goes wrong. Where files of an existing
folder are to be replaced, the temporary one lies in it.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import struct
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

import torch
from torch import Tensor

from glm4lite.base.errors import CheckpointError
from glm4lite.base.files import INDEX, SINGLE
from glm4lite.base.owned_folder import OwnedFolder
from glm4lite.base.sizes import readable
from glm4lite.checkpoint.partial import partial_folder, remove_abandoned
from glm4lite.checkpoint.replacing import replace_files
from glm4lite.checkpoint.shard import DTYPE_NAMES

SHARD_BYTES = 2 << 30
HEADER_ALIGNMENT = 64
_IN_USE = (5, 32, 33, 1224)  # Windows: access denied, open in another program, locked, mapped
"""A multiple of every element size: mapped tensors start at addresses their type can be read at."""


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor that will be written: all of its header entry."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()


@dataclass(frozen=True)
class Place:
    """Where in a file a tensor's bytes begin."""

    file: str
    offset: int
    planned: PlannedTensor


class FolderWriter:
    """Writes a checkpoint folder; use as a context manager. Leaving it normally puts the folder in its place.

    replace: the folder may hold files already; those of other names stay, but for the weights of another checkpoint.

    Example::

        with FolderWriter(destination, planned) as writer:
            for name, tensor in tensors:
                writer.write(name, tensor)
            writer.write_json("config.json", config)

    Raises:
        CheckpointError: the destination is taken, the disk is full, or not all planned tensors were written.
    """

    _left = "nothing was left behind"

    def __init__(
        self,
        destination: Path,
        planned: Sequence[PlannedTensor],
        shard_bytes: int = SHARD_BYTES,
        replace: bool = False,
    ) -> None:
        check_destination(destination, replace)
        self.destination = destination.resolve()
        self._replaces = replace and self.destination.exists()
        self._built_as = self.destination / "save" if self._replaces else self.destination
        self._size = sum(tensor.nbytes for tensor in planned)
        remove_abandoned(self._built_as)
        self._check_space()
        self._shards = _group(planned, shard_bytes)
        self._places: dict[str, Place] = {}
        self._written: dict[str, int] = {}

    def __enter__(self) -> Self:
        with self._disk():
            self.destination.parent.mkdir(parents=True, exist_ok=True)
            self._partial = self._begun()
            self._folder = self._partial.path
        try:
            with self._disk():
                self._begin()
        except BaseException:
            self._give_up()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is not None:
            return self._give_up()
        try:
            with self._disk():
                self._finish()
        except BaseException:
            self._give_up()
            raise

    def _begun(self) -> OwnedFolder:
        """The folder that is written. OSError."""
        return partial_folder(self._built_as)

    def _begin(self) -> None:
        """Makes the shards, with their headers. OSError."""
        for file, tensors in self._shards.items():
            self._begin_shard(file, tensors)

    def _give_up(self) -> None:
        """What was written is of no use."""
        self._partial.discard()

    def write(self, name: str, tensor: Tensor) -> None:
        """Write a whole planned tensor."""
        self.append(name, tensor)

    def append(self, name: str, rows: Tensor) -> None:
        """Write the next rows of a planned tensor."""
        place, done = self._places[name], self._written.get(name, 0)
        if rows.dtype != place.planned.dtype or done + rows.nbytes > place.planned.nbytes:
            raise CheckpointError(f"{name}: {rows.dtype} {list(rows.shape)} does not fit the planned {place.planned}")
        data = rows.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
        with self._disk(), (self._folder / place.file).open("r+b", buffering=0) as file:
            file.seek(place.offset + done)
            _write_all(file.fileno(), memoryview(cast(Any, data)))
        self._written[name] = done + rows.nbytes

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
        with self._disk():
            (self._folder / name).write_bytes(text.encode())  # with the same line ends on every system

    def copy(self, files: Iterable[Path]) -> None:
        """Copy small files as they are; those that are missing are left out."""
        for file in files:
            try:
                data = file.read_bytes()
            except FileNotFoundError:
                continue
            except OSError as error:
                why = error.strerror or error
                raise CheckpointError(f"{file} cannot be read ({why}); make it readable or remove it") from None
            with self._disk():
                (self._folder / file.name).write_bytes(data)

    def _begin_shard(self, file: str, tensors: list[PlannedTensor], new: bool = True) -> None:
        """Write the header (of a `new` file) and remember each tensor's place."""
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        position = 0
        for tensor in tensors:
            entries[tensor.name] = {
                "dtype": DTYPE_NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [position, position + tensor.nbytes],
            }
            position += tensor.nbytes
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % HEADER_ALIGNMENT)
        if new:
            (self._folder / file).write_bytes(struct.pack("<Q", len(text)) + text)
        for tensor in tensors:
            offset = 8 + len(text) + entries[tensor.name]["data_offsets"][0]
            self._places[tensor.name] = Place(file, offset, tensor)

    def _check_whole(self) -> None:
        for name, place in self._places.items():
            if self._written.get(name, 0) != place.planned.nbytes:
                raise CheckpointError(f"{self.destination}: {name} was not written in full")

    def _finish(self) -> None:
        self._check_whole()
        if len(self._shards) > 1:
            weight_map = {name: place.file for name, place in self._places.items()}
            self.write_json(INDEX, {"metadata": {"total_size": self._size}, "weight_map": weight_map})
        for path in self._partial.files():
            sync(path)
        sync(self._folder)
        if self._replaces:
            replace_files(self.destination, self._partial.files(), self._folder / "replaced")
            sync(self.destination)
            return self._partial.discard()
        self._folder.chmod(0o777 & ~_umask())  # a temporary folder starts as its owner's only
        self._partial.publish(self.destination)
        sync(self.destination.parent)

    @contextmanager
    def _disk(self) -> Iterator[None]:
        """Around what writes, and nothing else: an error of the disk becomes a message for the user."""
        try:
            yield
        except OSError as error:
            if error.errno == errno.EFBIG:
                why = f"{self.destination} cannot be written: its files are larger than `ulimit -f` or that disk allows"
                raise CheckpointError(f"{why}; raise the limit or choose another folder ({self._left})") from None
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise _unwritable(self.destination, error) from None
            raise CheckpointError(
                f"{self.destination} cannot be written: the disk is full; {readable(self._size)} are needed, "
                f"free some space and run it again ({self._left})"
            ) from None

    def _check_space(self) -> None:
        parent = next(folder for folder in self.destination.parents if folder.exists())
        free = shutil.disk_usage(parent).free
        if self._size > free:
            raise CheckpointError(
                f"{self.destination} needs {readable(self._size)}, {readable(free)} are free on that disk; "
                "free some space or choose another folder"
            )


def check_destination(destination: Path, replace: bool = False) -> None:
    """Only a folder that does not exist, or is empty, is written to; with `replace` any folder.

    Raises:
        CheckpointError: something is there, or nothing can be there.
    """
    try:
        destination = destination.resolve()
        exists, is_folder = destination.exists(), destination.is_dir()
        taken = exists and not is_folder if replace else exists and (not is_folder or any(destination.iterdir()))
    except RuntimeError:  # Python 3.11 and 3.12 raise it for a loop of links
        raise _unwritable(destination, OSError(errno.ELOOP, os.strerror(errno.ELOOP))) from None
    except OSError as error:
        raise _unwritable(destination, error) from None
    if taken and replace:
        raise CheckpointError(f"{destination} is a file; choose a folder")
    if taken:
        raise CheckpointError(f"{destination} exists and is not empty; choose another folder or remove it first")
    places = (destination, *destination.parents) if replace else destination.parents
    nearest = next(folder for folder in places if folder.exists())
    if nearest.is_dir() and not os.access(nearest, os.W_OK | os.X_OK):
        raise CheckpointError(f"{destination} cannot be written ({nearest} is read-only); choose another folder")


def _unwritable(destination: Path, error: OSError) -> CheckpointError:
    if getattr(error, "winerror", None) in _IN_USE:
        return CheckpointError(
            f"{destination} cannot be written while a program has its files open, as one that has loaded this model "
            "has them on Windows; end that program, or choose another folder"
        )
    return CheckpointError(f"{destination} cannot be written ({error.strerror or error}); choose another folder")


def _group(planned: Sequence[PlannedTensor], shard_bytes: int) -> dict[str, list[PlannedTensor]]:
    """Shards of at most shard_bytes (a larger tensor gets its own); within one, wide alignments first."""
    groups: list[list[PlannedTensor]] = [[]]
    size = 0
    for tensor in planned:
        if groups[-1] and size + tensor.nbytes > shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.nbytes
    ordered = [sorted(group, key=_alignment, reverse=True) for group in groups]
    if len(ordered) == 1:
        return {SINGLE: ordered[0]}
    return {f"model-{i:05d}-of-{len(ordered):05d}.safetensors": group for i, group in enumerate(ordered, 1)}


def _alignment(tensor: PlannedTensor) -> int:
    """The power of two that divides the size: what follows the tensor is aligned to it (64 is enough)."""
    return min(HEADER_ALIGNMENT, tensor.nbytes & -tensor.nbytes) if tensor.nbytes else HEADER_ALIGNMENT


def _write_all(descriptor: int, data: memoryview) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def sync(path: Path) -> None:
    """Force a file's or folder's content to disk; folders cannot be opened on Windows."""
    if path.is_dir() and sys.platform == "win32":
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
