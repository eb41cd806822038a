"""Weights that are numbers times a scale: 8-bit floats, and the int8 of compressed-tensors.

`X.weight` [N, K] with `.weight_scale` or, its name in DeepSeek's files, `.weight_scale_inv`: one number for all, for
each row, for each group of a row, or for each block of rows and columns. Scales of activations beside it are not used.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from glm4lite.checkpoint.checkpoint import Checkpoint
from glm4lite.checkpoint.formats.imported import ImportedFormat
from glm4lite.checkpoint.formats.weight import SCALES, PackedWeight, check, finite, held_as, matrix, wrong
from glm4lite_quant import QuantError

FLOATS = ("F8_E4M3", "F8_E5M2")
NUMBERS = (*FLOATS, "I8")
SCALE_NAMES = ("weight_scale", "weight_scale_inv")
UNUSED = ("input_scale", "input_zero_point", "output_scale", "output_zero_point", "activation_scale")


class FP8(ImportedFormat):
    """quant_method "fp8", as Transformers and vLLM write it."""

    method = "fp8"

    def settings(self, given: Mapping[str, Any]) -> tuple[int, int] | None:
        """The block's rows and columns, where there are blocks."""
        size = given.get("weight_block_size")
        if size is None:
            return None
        if not isinstance(size, list) or len(size) != 2 or not all(type(n) is int and 0 < n < 1 << 24 for n in size):
            raise QuantError(f"quantization_config.weight_block_size is {reprlib.repr(size)}; expected two sizes")
        return size[0], size[1]

    def weights(self, checkpoint: Checkpoint, settings: tuple[int, int] | None) -> Iterator[tuple[str, PackedWeight]]:
        for name in checkpoint.names():
            if name.endswith(".weight") and checkpoint.dtype(name) in FLOATS:
                yield name, scaled_weight(checkpoint, name, settings)


def scaled_weight(checkpoint: Checkpoint, name: str, block: tuple[int, int] | None = None) -> PackedWeight:
    """The description of one weight; CheckpointError where its scale is missing or of another shape."""
    module = name.removesuffix(".weight")
    rows, columns = matrix(checkpoint, name, NUMBERS)
    beside = [f"{module}.{suffix}" for suffix in SCALE_NAMES if f"{module}.{suffix}" in checkpoint]
    if len(beside) != 1:
        raise wrong(checkpoint, name, f"has {len(beside)} scales beside it, expected one (`{module}.weight_scale`)")
    scale = beside[0]
    check(checkpoint, scale, SCALES)
    shape = checkpoint.shape(scale)
    height, width = block or (1, 1)
    if len(shape) == 2 and shape == (-(-rows // height), -(-columns // width)) and block:
        size = (height, width)
    elif shape in ((), (1,), (1, 1)):
        size = (rows, columns)
    elif len(shape) in (1, 2) and shape[0] == rows and (len(shape) == 1 or (shape[1] and columns % shape[1] == 0)):
        size = (1, columns // (shape[1] if len(shape) == 2 else 1))
    else:
        raise wrong(checkpoint, scale, f"has shape {list(shape)}, which does not fit a weight of {[rows, columns]}")
    parts = (name, scale, *(part for suffix in UNUSED if (part := f"{module}.{suffix}") in checkpoint))

    def opened(source: Checkpoint) -> _Scaled:
        steps = finite(source, scale).view(-(-rows // size[0]), -(-columns // size[1]))
        return _Scaled(source, name, source.mapped(name), steps, size)

    return PackedWeight(parts, (rows, columns), held_as(checkpoint, scale), 8, None, opened, calibrate=True)


@dataclass(frozen=True)
class _Scaled:
    checkpoint: Checkpoint
    name: str
    values: Tensor
    steps: Tensor  # float32 [N / size[0], K / size[1]], both rounded up
    size: tuple[int, int]

    def rows(self, start: int, stop: int) -> Tensor:
        height, width = self.size
        values = self.values[start:stop].float()
        self.checkpoint.check_finite(self.name, values, start)
        first = start // height
        steps = self.steps[first : -(-stop // height)].repeat_interleave(height, 0)[start - first * height :]
        steps = steps[: stop - start].repeat_interleave(width, 1)[:, : values.shape[1]]
        return values.mul_(steps)
