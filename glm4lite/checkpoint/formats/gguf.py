"""GGUF as a format: one file (or the files it is split into) that holds a whole model, opened as a checkpoint.

Quantized tensors are rows of blocks; `quantization_config` of the checkpoint made here names the type of each.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glm4lite.base.errors import CheckpointError
from glm4lite.checkpoint.checkpoint import Checkpoint
from glm4lite.checkpoint.formats import gguf_blocks
from glm4lite.checkpoint.formats.imported import ImportedFormat
from glm4lite.checkpoint.formats.weight import Affine, Opened, PackedWeight, matrix, wrong
from glm4lite.gguf.companions import companions_folder
from glm4lite.gguf.header import BLOCKS, PLAIN, read_headers
from glm4lite.gguf.model import model_config, renamed
from glm4lite_quant import QuantError

_SIZES = {name: (weights, size) for name, weights, size in BLOCKS.values() if name not in PLAIN}
_CALIBRATED_BITS = 8


def open_gguf(path: Path) -> Checkpoint:
    """The model of a file. Its `folder` is that of the small files made of the metadata.

    Raises:
        CheckpointError: the file is damaged, or of another model.
    """
    header = read_headers(path)
    config = model_config(path, header)
    folder = companions_folder(path, header.metadata, config)
    tensors, types = {}, {}
    for name, kind, tensor in renamed(path, header, config):
        if name in tensors:
            raise CheckpointError(f"{path} holds {name} twice; download it again")
        tensors[name] = replace(tensor, name=name)
        if kind not in PLAIN:
            types[name] = kind
    declared = {"quantization_config": {"quant_method": GGUF.method, "types": types}} if types else {}
    checkpoint = Checkpoint.of(folder, config | declared, tensors)
    checkpoint.origin = path
    return checkpoint


class GGUF(ImportedFormat):
    """The types of a file's tensors, as `open_gguf` notes them."""

    method = "gguf"

    def settings(self, given: Mapping[str, Any]) -> dict[str, str]:
        types = given.get("types")
        if not isinstance(types, Mapping) or not all(kind in _SIZES for kind in map(str, types.values())):
            raise QuantError(f"quantization_config.types is {reprlib.repr(types)}; give the GGUF file itself")
        return {str(name): str(kind) for name, kind in types.items()}

    def weights(self, checkpoint: Checkpoint, settings: dict[str, str]) -> Iterator[tuple[str, PackedWeight]]:
        for name, kind in settings.items():
            if name in checkpoint:
                yield name, _weight(checkpoint, name, kind)

    def described(self, checkpoint: Checkpoint, stored: Any) -> str:
        counts: dict[str, int] = {}
        for kind in stored.settings.values():
            counts[kind] = counts.get(kind, 0) + 1
        types = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items(), key=lambda item: -item[1]))
        return f"gguf, {types}"


def _weight(checkpoint: Checkpoint, name: str, kind: str) -> PackedWeight:
    weights, size = _SIZES[kind]
    rows, width = matrix(checkpoint, name, ("U8",))
    if width % size:
        raise wrong(checkpoint, name, f"has {width} bytes a row, no number of {kind} blocks")
    bits = size * 8 / weights

    def opened(source: Checkpoint) -> Opened:
        stored = source.mapped(name).unflatten(-1, (-1, size))
        if kind not in gguf_blocks.AFFINE:
            return _Blocks(source, name, stored, gguf_blocks.decoder(kind))
        planes, codes = gguf_blocks.AFFINE[kind]
        step, low = (plane.flatten(1) for plane in planes(stored))
        for plane in (step, low):
            source.check_finite(name, plane)
        return Affine(step, low, 16, lambda start, stop: codes(stored[start:stop]).flatten(1))

    shape, affine = (rows, width // size * weights), kind in gguf_blocks.AFFINE
    group = 32 if affine else None
    return PackedWeight((name,), shape, "F32", 4 if affine else bits, group, opened, bits >= _CALIBRATED_BITS)


@dataclass(frozen=True)
class _Blocks:
    checkpoint: Checkpoint
    name: str
    stored: Tensor
    decode: Any

    def rows(self, start: int, stop: int) -> Tensor:
        values: Tensor = self.decode(self.stored[start:stop]).flatten(1)
        self.checkpoint.check_finite(self.name, values, start)
        return values.to(torch.float32)
