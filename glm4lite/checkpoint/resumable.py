"""A checkpoint that is written in units (a layer, the head), so that a later run goes on behind the last whole one.

    .NAME.unfinished/model-*.safetensors     the shards, as they will be
    .NAME.unfinished/work/state.json         how many units are whole, and of what
    .NAME.unfinished/work/state-<n>.bin      the calibration's stream behind the n-th

A unit's tensors are synced before the state says that they are there, so neither a killed process nor a power cut
leaves a state that promises what is not written.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from glm4lite.base.errors import CheckpointError
from glm4lite.base.owned_folder import LOCK, UNFINISHED_FOLDER, OwnedFolder
from glm4lite.base.sizes import readable
from glm4lite.base.whole_file import write_whole
from glm4lite.checkpoint.writer import SHARD_BYTES, FolderWriter, PlannedTensor, sync

logger = logging.getLogger("glm4lite")

SHARDS_IN = "work"
"""The folder within an unfinished one for what is needed only until all is written."""

_STATE = "state.json"


def unfinished(destination: Path) -> Path:
    """The folder in which a destination is written until it is whole."""
    destination = destination.resolve()
    return destination.with_name(f".{destination.name}{UNFINISHED_FOLDER}")


class ResumableWriter(FolderWriter):
    """A FolderWriter of which a run that ends early, however, leaves what it wrote to the next.

    key: what is written, and from what; where it is another than the earlier run's, nothing of that is used. beside:
    bytes of disk that are needed besides, meanwhile.
    """

    _left = "what was done is kept, the next run goes on with it"

    def __init__(
        self,
        destination: Path,
        planned: Sequence[PlannedTensor],
        key: str,
        shard_bytes: int = SHARD_BYTES,
        beside: int = 0,
    ) -> None:
        self._key, self._beside = key, beside
        super().__init__(destination, planned, shard_bytes)
        self.units = 0
        """Whole ones."""
        self.stream: tuple[int, Tensor] | None = None
        """What was given with the last."""

    @property
    def work(self) -> Path:
        """For what is needed only until all is written."""
        return self._folder / SHARDS_IN

    def _begun(self) -> OwnedFolder:
        try:
            return OwnedFolder.of(unfinished(self.destination))
        except BlockingIOError:
            raise CheckpointError(
                f"{self.destination} is being written by another process; wait until it is done, or choose another "
                "folder"
            ) from None

    def _begin(self) -> None:
        old = self._read_state()
        if old is None:
            self._clear()
            self.work.mkdir()
        else:
            self.units, self.stream = old
        if self.units:
            logger.warning("%s was begun by an earlier run: going on behind part %d", self.destination, self.units)
        for file, tensors in self._shards.items():
            self._begin_shard(file, tensors, new=old is None)
        if old is None:
            self._note(None)

    def commit(self, names: Sequence[str], stream: tuple[int, Tensor] | None) -> None:
        """The next unit is whole: its tensors are `names`, and `stream` is what the following one needs."""
        with self._disk():
            for file in {self._places[name].file for name in names}:
                sync(self._folder / file)
            before, self.units = self._stream_file(self.units), self.units + 1
            self._note(stream)
            before.unlink(missing_ok=True)

    def _note(self, stream: tuple[int, Tensor] | None) -> None:
        """Writes the state. OSError."""
        told: dict[str, object] = {"key": self._key, "units": self.units}
        if stream is not None:
            told |= {"layer": stream[0], "shape": list(stream[1].shape)}
            write_whole(self._stream_file(self.units), stream[1].contiguous().numpy().tobytes())
        write_whole(self.work / _STATE, json.dumps(told).encode())

    def whole(self, names: Sequence[str]) -> None:
        """These tensors are there from an earlier run."""
        for name in names:
            self._written[name] = self._places[name].planned.nbytes

    def _stream_file(self, units: int) -> Path:
        return self.work / f"state-{units}.bin"

    def _read_state(self) -> tuple[int, tuple[int, Tensor] | None] | None:
        """None where there is nothing to go on with."""
        try:
            told = json.loads((self.work / _STATE).read_bytes())
            if told["key"] != self._key or not all((self._folder / file).exists() for file in self._shards):
                return None
            units = int(told["units"])
            if "layer" not in told:
                return units, None
            data, shape = self._stream_file(units).read_bytes(), [int(size) for size in told["shape"]]
            if len(data) != math.prod(shape) * torch.float32.itemsize:
                return None
            return units, (int(told["layer"]), torch.frombuffer(bytearray(data), dtype=torch.float32).view(shape))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _clear(self) -> None:
        for path in self._folder.iterdir():
            if path.name == LOCK:
                continue
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()

    def _finish(self) -> None:
        shutil.rmtree(self.work)
        super()._finish()

    def _give_up(self) -> None:
        self._partial.leave()

    def _check_space(self) -> None:
        """What an earlier run wrote, or fetched, is there already."""
        held = (path.stat() for path in unfinished(self.destination).rglob("*"))
        needed = self._size + self._beside - sum(getattr(about, "st_blocks", 0) * 512 for about in held)
        parent = next(folder for folder in self.destination.parents if folder.exists())
        free = shutil.disk_usage(parent).free
        if needed > free:
            raise CheckpointError(
                f"{self.destination} needs {readable(needed)} while it is made, {readable(free)} are free on that "
                "disk; free some space or choose another folder"
            )
