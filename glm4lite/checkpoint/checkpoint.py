"""A checkpoint: a folder with config.json and safetensors shards, under the Hugging Face tensor names.

Everything is checked when the folder is opened (each shard's header, the files that the index names, names that would
leave the folder), so what is read later is there and has the shape it claims. Pickle files are never opened:
loading one runs whatever code it holds.
"""

import math
import os
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from glm4lite.base.errors import CheckpointError
from glm4lite.base.files import COMPUTED, CONFIG, HEAD, INDEX, SINGLE, may_be_missing, read_index, read_json, some
from glm4lite.base.stored_tensor import StoredTensor
from glm4lite.checkpoint import legacy
from glm4lite.checkpoint.folders import described, unfinished
from glm4lite.checkpoint.shard import ShardMaps, read, read_header, torch_dtype
from glm4lite.model.config import Glm4Config
from glm4lite_quant.config import QuantConfig
from glm4lite_quant.format import Codes

BLOCK_BYTES = 16 << 20
"""Bytes of a checkpoint in memory at a time: enough rows for every thread, little beside the model."""


class Checkpoint:
    """A folder of safetensors. Names are the Hugging Face ones; older `chatglm` files are renamed on the way in.

    Example::

        checkpoint = Checkpoint.open("GLM-4-9B-0414")
        checkpoint.shape("lm_head.weight")             # (151552, 4096)
        checkpoint.rows("lm_head.weight", 0, 16)       # tensor [16, 4096], only these rows are read
    """

    def __init__(
        self,
        folder: Path,
        config: dict[str, Any],
        tensors: dict[str, StoredTensor],
        absent: Mapping[str, str] | None = None,
    ) -> None:
        """absent: tensors that the index lists but no shard holds -> the shard that should; not all are needed."""
        self.folder = folder
        self.origin = folder  # what a user calls it: the folder, or a file that holds all of it
        self.config = config
        self.absent = absent or {}
        self._tensors = tensors
        self._maps = ShardMaps()

    @classmethod
    def open(cls, folder: str | Path) -> "Checkpoint":
        """Open and check a checkpoint folder; no tensor data is read.

        Raises:
            CheckpointError: the folder, its index or a shard is missing or damaged, or holds only pickle weights.
            ConfigError: config.json is missing, is not JSON, or is not an object.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise CheckpointError(
                f"{folder} is not a folder; give the one that holds config.json and the safetensors files"
            )
        what = None if os.path.lexists(folder / CONFIG) else described(folder)
        if what is not None:
            raise CheckpointError(what)
        config = read_json(folder / CONFIG)
        files = _present(folder, _shard_files(folder), config)
        tensors = _merge(folder, files)
        absent = {name: file for file, names in files.items() for name in names if name not in tensors}
        return cls.of(folder, config, tensors, absent)

    @classmethod
    def of(
        cls,
        folder: Path,
        config: dict[str, Any],
        tensors: dict[str, StoredTensor],
        absent: Mapping[str, str] | None = None,
    ) -> "Checkpoint":
        """From the tensors of all headers, under the names the files give them."""
        if config.get("model_type") == "chatglm":
            tensors = legacy.rename(tensors, Glm4Config.from_dict(config, folder / CONFIG))
        kept = {name: tensor for name, tensor in tensors.items() if not COMPUTED.fullmatch(name)}
        if any(name.startswith("embed_tokens.") for name in kept):  # the trunk alone, saved under its own names
            kept = {f"model.{name}": tensor for name, tensor in kept.items()}
        if config.get("tie_word_embeddings") is True and HEAD in kept:
            kept.setdefault(_EMBEDDING, kept[HEAD])  # of two names of one tensor a file may keep either
            if kept[_EMBEDDING] is kept[HEAD]:
                del kept[HEAD]
        return cls(folder, config, kept, absent)

    def names(self) -> list[str]:
        """Every tensor's name, in file order."""
        return list(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def stored(self, name: str) -> StoredTensor:
        """Where a tensor lies.

        Raises:
            CheckpointError: there is no such tensor.
        """
        if name not in self._tensors:
            raise CheckpointError(f"{self.folder} has no tensor {name}; download the checkpoint again")
        return self._tensors[name]

    def parts(self, name: str) -> list[StoredTensor]:
        """All that is read of the files where a tensor is."""
        return [self.stored(name)]

    def shape(self, name: str) -> tuple[int, ...]:
        return self.stored(name).shape

    def dtype(self, name: str) -> str:
        """The element type by its safetensors name: "BF16", "F32", "F16", "U8", ..."""
        return self.stored(name).dtype

    def outline(self, name: str) -> torch.Tensor:
        """The tensor's shape and type, without values (on the meta device)."""
        return torch.empty(self.shape(name), dtype=torch_dtype(self.stored(name)), device="meta")

    def nbytes(self, name: str) -> int:
        return self.stored(name).nbytes

    def file(self, name: str) -> Path:
        """The shard that holds the tensor."""
        return self.stored(name).path

    def tensor(self, name: str) -> torch.Tensor:
        """The whole tensor, read into fresh memory."""
        return read(self.stored(name))

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows start..stop-1 of the first dimension, read into fresh memory; the rest of the file is not touched."""
        return read(self.stored(name).rows(start, stop))

    def row_blocks(
        self, name: str, max_bytes: int, multiple: int = 16, held: torch.Tensor | None = None
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """(first row, rows) over the whole matrix, at most about max_bytes at a time, a multiple of `multiple` rows.

        `held`: the whole tensor where it has been read already; the rows are then views of it.
        """
        stored = self.stored(name)
        count = stored.shape[0]
        row_bytes = max(1, stored.nbytes // max(1, count))
        step = max(multiple, max_bytes // row_bytes // multiple * multiple)
        for start in range(0, count, step):
            stop = min(start + step, count)
            yield start, self.rows(name, start, stop) if held is None else held[start:stop]

    def adapted_by(self, folder: Path) -> bool:
        """Whether the adapter in a folder is laid over this checkpoint."""
        return False

    def quant_for(self, name: str, config: QuantConfig) -> QuantConfig:
        """How a weight that shall be quantized with `config` is: otherwise, where its own codes can be kept."""
        return config

    def outcome(self, quants: Mapping[str, object]) -> str | None:
        """What becomes of another tool's weights, in one line; quants: what each tensor is quantized to."""
        return None

    def codes(self, name: str, start: int, stop: int, group: int) -> Codes:
        """Rows of a weight that `quant_for` said is kept, as codes with a scale for each `group` columns."""
        raise CheckpointError(f"{name} in {self.file(name)} is not quantized, so that it has no codes to be kept")

    def check_finite(self, name: str, values: torch.Tensor, first_row: int = 0) -> None:
        """Raises CheckpointError where what was read of a tensor (rows from `first_row` on) holds NaN or infinity."""
        if math.isfinite(float(values.sum())):  # at the memory's speed; isfinite takes 40 times as long
            return
        values = values if values.dim() else values[None]
        bad = (~values.isfinite()).nonzero()
        if len(bad):  # else the sum was too large
            place = [int(index) for index in bad[0]]
            value, place[0] = float(values[tuple(place)]), place[0] + first_row
            raise CheckpointError(f"{name} in {self.file(name)} holds {value} at {place}; download the file again")

    def mapped(self, name: str) -> torch.Tensor:
        """The whole tensor over the memory-mapped shard: no copy, and a write to it stays private to this process."""
        return self._maps.mapped(self.stored(name))

    def release(self, path: Path) -> None:
        """A shard is removed, or replaced: nothing of it is held any more."""
        self._maps.forget(path)

    @cached_property
    def generation_config(self) -> dict[str, Any]:
        """generation_config.json, or {} where the checkpoint has none."""
        return read_json(self.folder / "generation_config.json", optional=True)


_EMBEDDING = "model.embed_tokens.weight"


def _shard_files(folder: Path) -> dict[str, frozenset[str]]:
    """File name -> names the index expects in it (empty for a single file)."""
    if os.path.lexists(folder / SINGLE):
        return {SINGLE: frozenset()}
    if os.path.lexists(folder / INDEX):
        return read_index(folder / INDEX)
    neither = f"{folder} has neither {SINGLE} nor {INDEX}; download the checkpoint again"
    raise CheckpointError(described(folder) or neither)


def _present(
    folder: Path, files: Mapping[str, frozenset[str]], config: Mapping[str, Any]
) -> Mapping[str, frozenset[str]]:
    """The shards that are there."""
    absent = {file: names for file, names in files.items() if not os.path.lexists(folder / file)}
    needed = [file for file, names in absent.items() if not may_be_missing(names, config)]
    if needed:
        partial = unfinished(folder)
        why = f" (its download was not finished: {some([partial])})" if partial else ""
        raise CheckpointError(f"{folder} lacks {some(needed)}, named by {INDEX}{why}; download the checkpoint again")
    return {file: names for file, names in files.items() if file not in absent}


def _merge(folder: Path, files: Mapping[str, frozenset[str]]) -> dict[str, StoredTensor]:
    """The tensors of all shards; each is in one. What the index expects and no shard holds, a model may not need."""
    merged: dict[str, StoredTensor] = {}
    for file in files:
        for name, tensor in read_header(folder / file).items():
            if name in merged:
                both = f"{merged[name].path.name} and {file}"
                raise CheckpointError(f"{folder} holds {some([name])} twice, in {both}; download it again")
            merged[name] = tensor
    return merged
