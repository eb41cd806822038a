"""The formats of other tools that can be read."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from glm4lite.base.files import INDEX, SINGLE
from glm4lite.checkpoint.checkpoint import Checkpoint
from glm4lite.checkpoint.formats.auto_round import AutoRound
from glm4lite.checkpoint.formats.awq import AWQ
from glm4lite.checkpoint.formats.bitsandbytes import BITSANDBYTES
from glm4lite.checkpoint.formats.compressed_tensors import CompressedTensors
from glm4lite.checkpoint.formats.format import ForeignWeight, Format, Stored
from glm4lite.checkpoint.formats.gguf import GGUF, open_gguf
from glm4lite.checkpoint.formats.gptq import GPTQ
from glm4lite.checkpoint.formats.hqq import HQQ
from glm4lite.checkpoint.formats.mlx import MLX
from glm4lite.checkpoint.formats.scaled import FP8
from glm4lite.gguf.companions import file_in
from glm4lite.gguf.header import SUFFIX

FORMATS: tuple[Format, ...] = (
    *(BITSANDBYTES, GPTQ(), AWQ(), CompressedTensors(), AutoRound(), MLX(), HQQ(), FP8(), GGUF()),
)


def open_source(path: Path) -> Checkpoint:
    """The checkpoint of a folder or of a GGUF file, which may be the only model of a folder.

    Raises:
        Glm4liteError: what `Checkpoint.open` raises; the file is damaged, or of another model.
    """
    if path.name.endswith(SUFFIX) and not path.is_dir():
        return open_gguf(path)
    if path.is_dir() and not any(os.path.lexists(path / name) for name in (SINGLE, INDEX)):
        file = file_in(path)
        if file is not None:
            return open_gguf(file)
    return Checkpoint.open(path)


def declared_format(config: Mapping[str, Any]) -> tuple[Format, Mapping[str, Any]] | None:
    """The format that config.json names, with what it says of it; None where it names none of these."""
    found = ((known, known.declared(config)) for known in FORMATS)
    return next(((known, given) for known, given in found if given is not None), None)


def format_of(stored: Stored) -> Format:
    """The format of another tool that weights of this config, which is not ours, are held in."""
    return next(known for known in FORMATS if known.owns(stored))


def foreign_weight(checkpoint: Checkpoint, name: str) -> ForeignWeight | None:
    """What the checkpoint says of a weight that is computed with as another tool stores it; None for any other.

    Raises:
        CheckpointError: its tensors contradict each other or its description, or one is missing.
    """
    found = (known.find(checkpoint, name) for known in FORMATS)
    return next((weight for weight in found if weight is not None), None)
