"""HQQ in 2, 3, 4 and 8 bits: `X.W_q`, `.scale`, `.zero`, and its settings as small tensors beside them.

`w = (W_q - zero) * scale`. The weight [N, K] is reshaped to rows of a group (axis 1) or to columns of one (axis 0).
Several codes share a word: those of the first rows lie highest, those of as many rows behind them below. A byte has
four codes of 2 bits or two of 4, an int32 ten of 3, whose last rows may be padding. Source: hqq 0.2 (core/quantize.py,
core/bitpack.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from glm4lite.checkpoint.checkpoint import Checkpoint
from glm4lite.checkpoint.formats.imported import ImportedFormat, group_size, one_of
from glm4lite.checkpoint.formats.weight import SCALES, Affine, Opened, PackedWeight, check, finite, held_as, wrong
from glm4lite_quant import QuantError

IN_A_WORD = {2: 4, 3: 10, 4: 2, 8: 1}  # codes, by their bits
_SETTINGS = (
    *("nbits", "group_size", "shape", "axis", "packing", "unpack_view_dtype", "view_as_float", "quant_scale"),
    *("quant_zero", "compute_dtype", "offload_meta", "encoded_state_dict", "stores_quant_config", "channel_wise"),
    *("optimize", "round_zero"),
)


@dataclass(frozen=True)
class Settings:
    """Of all weights; HQQ writes the same beside each of them, where nothing here disagrees with it."""

    bits: int
    group: int | None
    axis: int


class HQQ(ImportedFormat):
    """quant_method "hqq", as Transformers saves it."""

    method = "hqq"

    def settings(self, given: Mapping[str, Any]) -> Settings:
        outer = given.get("quant_config")
        inner = outer.get("weight_quant_params") if isinstance(outer, Mapping) else None
        if not isinstance(outer, Mapping) or not isinstance(inner, Mapping):
            what = "quantization_config.quant_config has no weight_quant_params"
            raise QuantError(f"{what}; one with settings for each kind of layer cannot be read")
        for key in ("scale_quant_params", "zero_quant_params"):
            if outer.get(key):
                raise QuantError(f"quantization_config.quant_config.{key} is set: quantized scales cannot be read")
        return Settings(one_of(inner, "nbits", IN_A_WORD), group_size(inner), one_of(inner, "axis", (0, 1), 1))

    def weights(self, checkpoint: Checkpoint, settings: Settings) -> Iterator[tuple[str, PackedWeight]]:
        for name in checkpoint.names():
            module = name.removesuffix(".W_q")
            if module != name:
                yield f"{module}.weight", _weight(checkpoint, module, settings)


def _weight(checkpoint: Checkpoint, module: str, settings: Settings) -> PackedWeight:
    words, scale, zero, size = (f"{module}.{part}" for part in ("W_q", "scale", "zero", "shape"))
    check(checkpoint, words, ("I32",) if settings.bits == 3 else ("U8",))
    for name in (scale, zero):
        check(checkpoint, name, SCALES)
    check(checkpoint, size, ("I64", "I32"), (2,))
    if not checkpoint.file(size).exists():
        raise wrong(checkpoint, size, "is not here, and only it tells the weight's shape")
    rows, columns = (int(number) for number in checkpoint.tensor(size))
    group = settings.group or (columns if settings.axis == 1 else rows)
    count, room = rows * columns, math.prod(checkpoint.shape(words)) * IN_A_WORD[settings.bits]
    if rows < 1 or columns < 1 or count % group or room != _padded(count, group, settings):
        raise wrong(checkpoint, size, f"says {[rows, columns]}, and there are {room} codes in groups of {group}")
    for name in (scale, zero):
        check(checkpoint, name, SCALES, (count // group, 1) if settings.axis == 1 else (1, count // group))
    parts = (words, scale, zero, *(part for key in _SETTINGS if (part := f"{module}.{key}") in checkpoint))
    in_rows = settings.axis == 1 and columns % group == 0

    def opened(source: Checkpoint) -> Opened:
        step, packed = finite(source, scale), source.mapped(words).flatten()
        low = finite(source, zero) * step

        def unpack(start: int, stop: int) -> Tensor:
            return _codes(packed, start * columns, stop * columns, settings.bits).view(-1, columns)

        if in_rows:
            return Affine(step.view(rows, -1), low.view(rows, -1), 1 << settings.bits, unpack)
        return _Scattered(step.flatten(), low.flatten(), group, settings.axis, unpack)

    held, shared = held_as(checkpoint, scale), group if in_rows else None
    return PackedWeight(parts, (rows, columns), held, settings.bits, shared, opened, settings.bits >= 8)


def _padded(count: int, group: int, settings: Settings) -> int:
    """How many codes are stored: whole words of the reshaped weight's rows."""
    width, in_a_word = group if settings.axis == 1 else count // group, IN_A_WORD[settings.bits]
    return -(-count // (width * in_a_word)) * width * in_a_word


def _codes(packed: Tensor, start: int, stop: int, bits: int) -> Tensor:
    """Codes start to stop-1, counted along the rows."""
    size, top = packed.shape[0], IN_A_WORD[bits] - 1
    fields = range(start // size, max(stop - 1, start) // size + 1)
    parts = (packed[max(start - i * size, 0) : max(stop - i * size, 0)] >> bits * (top - i) for i in fields)
    return (torch.cat(list(parts)) & (1 << bits) - 1).to(torch.uint8)


@dataclass(frozen=True)
class _Scattered:
    """Groups that do not lie within a row."""

    step: Tensor
    low: Tensor
    group: int
    axis: int
    unpack: Any

    def rows(self, start: int, stop: int) -> Tensor:
        codes = self.unpack(start, stop)
        columns = codes.shape[1]
        places = torch.arange(start * columns, stop * columns)
        places = places // self.group if self.axis == 1 else places % self.step.shape[0]
        return (codes.flatten().float() * self.step[places] - self.low[places]).view(-1, columns)
