"""A checkpoint: a folder with config.json and safetensors shards, under the Hugging Face tensor names.

Everything is checked when the folder is opened (each shard's header, the index against the shards, file names that
would leave the folder), so what is read later is there and has the shape it claims. Pickle files are never opened:
loading one runs whatever code it holds.
"""

from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from glm4lite.config import Glm4Config
from glm4lite.errors import CheckpointError
from glm4lite.weights import legacy
from glm4lite.weights.files import CONFIG, INDEX, SINGLE, UNREADABLE, read_index, read_json, some
from glm4lite.weights.shard import ShardMaps, StoredTensor, read, read_header


class Checkpoint:
    """A folder of safetensors. Names are the Hugging Face ones; older `chatglm` files are renamed on the way in.

    Example::

        checkpoint = Checkpoint.open("GLM-4-9B-0414")
        checkpoint.shape("lm_head.weight")             # (151552, 4096)
        checkpoint.rows("lm_head.weight", 0, 16)       # tensor [16, 4096], only these rows are read
    """

    def __init__(self, folder: Path, config: dict[str, Any], tensors: dict[str, StoredTensor]) -> None:
        self.folder = folder
        self.config = config
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
        config = read_json(folder / CONFIG)
        return cls.of(folder, config, _merge(folder, _shard_files(folder)))

    @classmethod
    def of(cls, folder: Path, config: dict[str, Any], tensors: dict[str, StoredTensor]) -> "Checkpoint":
        """From the tensors of all headers, under the names the files give them."""
        if config.get("model_type") == "chatglm":
            tensors = legacy.rename(tensors, Glm4Config.from_dict(config, folder / CONFIG))
        kept = {name: tensor for name, tensor in tensors.items() if not legacy.IGNORED.fullmatch(name)}
        return cls(folder, config, kept)

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

    def shape(self, name: str) -> tuple[int, ...]:
        return self.stored(name).shape

    def dtype(self, name: str) -> str:
        """The element type by its safetensors name: "BF16", "F32", "F16", "U8", ..."""
        return self.stored(name).dtype

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

    def mapped(self, name: str) -> torch.Tensor:
        """The whole tensor over the memory-mapped shard: no copy, and a write to it stays private to this process."""
        return self._maps.mapped(self.stored(name))

    @cached_property
    def generation_config(self) -> dict[str, Any]:
        """generation_config.json, or {} where the checkpoint has none."""
        return read_json(self.folder / "generation_config.json", optional=True)


def _shard_files(folder: Path) -> dict[str, frozenset[str]]:
    """File name -> names the index expects in it (empty for a single file)."""
    if (folder / SINGLE).exists():
        return {SINGLE: frozenset()}
    if (folder / INDEX).exists():
        return read_index(folder / INDEX)
    raise CheckpointError(_no_weights(folder))


def _no_weights(folder: Path) -> str:
    other = sorted(path.name for path in folder.iterdir() if path.suffix in UNREADABLE)
    if other:
        kind = UNREADABLE[Path(other[0]).suffix]
        why = " (which can run code when opened)" if kind == "pickle" else ""
        return (
            f"{folder} holds only {kind} weights{why}: {other[0]}; use the model's safetensors version, "
            "or convert it with transformers' save_pretrained on a machine where you trust it"
        )
    return f"{folder} has neither {SINGLE} nor {INDEX}; download the checkpoint again"


def _merge(folder: Path, files: Mapping[str, frozenset[str]]) -> dict[str, StoredTensor]:
    """The tensors of all shards; the index and the shards must agree, and each tensor is in one shard."""
    absent = [file for file in files if not _exists(folder / file)]
    if absent:
        raise CheckpointError(f"{folder} lacks {some(absent)}, named by {INDEX}; download the checkpoint again")
    merged: dict[str, StoredTensor] = {}
    for file, expected in files.items():
        found = read_header(folder / file)
        gone = sorted(expected - found.keys())
        if gone:
            raise CheckpointError(f"{folder / INDEX} puts {some(gone)} in {file}, which lacks it; download both again")
        for name, tensor in found.items():
            if name in merged:
                both = f"{merged[name].path.name} and {file}"
                raise CheckpointError(f"{folder} holds {some([name])} twice, in {both}; download it again")
            merged[name] = tensor
    return merged


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name that no file can have
        return False
