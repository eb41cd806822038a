"""GPTQ's layout, as AutoGPTQ, GPTQModel and AutoRound write it: codes packed along the inputs, a column an output.

Beside `X.qweight` int32 [K b / 32, N] lie `.qzeros` int32 [G, N b / 32] and `.scales` [G, N], and mostly `.g_idx`
int32 [K], the group of each input: `w[n, k] = scales[g, n] * (q[k, n] - zeros[g, n])`. What config.json says for single
layers (`dynamic`, by regular expressions) is in these shapes too, so that the shapes alone are asked. Source: GPTQModel
7.7 (utils/model.py, nn_modules/qlinear).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from glm4lite.checkpoint.checkpoint import Checkpoint
from glm4lite.checkpoint.formats.imported import ImportedFormat, group_size, one_of
from glm4lite.checkpoint.formats.packing import bytes_of, unpacked
from glm4lite.checkpoint.formats.weight import (
    SCALES,
    Affine,
    PackedWeight,
    check,
    finite,
    held_as,
    matrix,
    wrong,
)
from glm4lite_quant import QuantError

BITS = (2, 3, 4, 5, 6, 7, 8)
"""5 to 7 are AutoRound's; all are one stream of codes."""

_ONES = {2: (0x55555555,), 4: (0x11111111,), 8: (0x01010101,)}
"""A one in each code of the words of zero points. Of three bits some lie in two words, so that each is raised alone."""

_ONES_OF_GPTQMODEL = _ONES | {3: (0x24924924, 0x92492492, 0x49249249)}
"""GPTQModel has words for three bits too, in turn, which are not ones: it adds what it has subtracted."""


@dataclass(frozen=True)
class Settings:
    """How zero points are stored: as they are, or one less, subtracted word by word (`ones`, by the bits of a code)."""

    ones: Mapping[int, tuple[int, ...]] | None
    act_order: bool = False


AS_THEY_ARE, ONE_LESS = Settings(None), Settings(_ONES)


class GPTQ(ImportedFormat):
    """quant_method "gptq"."""

    method = "gptq"

    def settings(self, given: Mapping[str, Any]) -> Settings:
        one_of(given, "bits", BITS)
        group_size(given)
        layout = one_of(given, "checkpoint_format", ("gptq", "gptq_v2"), "gptq")
        if given.get("is_marlin_format"):
            raise QuantError("quantization_config.is_marlin_format is true; only GPTQ's own layout can be read")
        ones = None if layout == "gptq_v2" else _ONES_OF_GPTQMODEL if "gptqmodel" in str(given.get("meta")) else _ONES
        return Settings(ones, bool(given.get("desc_act")))

    def weights(self, checkpoint: Checkpoint, settings: Settings) -> Iterator[tuple[str, PackedWeight]]:
        yield from gptq_weights(checkpoint, settings)


def gptq_weights(checkpoint: Checkpoint, settings: Settings) -> Iterator[tuple[str, PackedWeight]]:
    """Every weight in this layout, by its plain name."""
    for name in checkpoint.names():
        module = name.removesuffix(".qweight")
        if module != name:
            yield f"{module}.weight", gptq_weight(checkpoint, module, settings)


def gptq_weight(checkpoint: Checkpoint, module: str, settings: Settings) -> PackedWeight:
    """The description of one weight; CheckpointError where its tensors do not belong together."""
    words, zeros, scales, order = (f"{module}.{part}" for part in ("qweight", "qzeros", "scales", "g_idx"))
    (lines, rows), (groups, columns) = matrix(checkpoint, words, ("I32",)), matrix(checkpoint, scales, SCALES)
    if rows % 32:
        raise wrong(checkpoint, words, f"has {rows} columns, which is no multiple of 32")
    check(checkpoint, zeros, ("I32",), *((groups, rows * bits // 32) for bits in BITS))
    bits = checkpoint.shape(zeros)[1] * 32 // rows
    inputs = lines * 32 // bits
    if columns != rows or lines * 32 % bits or inputs % groups or inputs // groups % 8:
        shapes = " and ".join(str(list(checkpoint.shape(name))) for name in (words, zeros, scales))
        raise wrong(checkpoint, words, f"has shapes that do not belong together: {shapes} with zero points and scales")
    parts: tuple[str, ...] = (words, zeros, scales)
    in_order = not settings.act_order
    if order in checkpoint:
        check(checkpoint, order, ("I32", "I64"), (inputs,))
        parts += (order,)
        if checkpoint.file(order).exists():  # else it is planned, not read
            in_order = bool(torch.equal(_order(checkpoint, order, groups), _side_by_side(inputs, groups)))
    group = inputs // groups

    def opened(source: Checkpoint) -> Affine:
        step = finite(source, scales)
        points = _points(source.mapped(zeros), bits, settings.ones)
        places = _order(source, order, groups) if order in source and not in_order else None
        low = (points.float() * step).T.contiguous()
        packed = source.mapped(words)
        return Affine(step.T.contiguous(), low, 1 << bits, lambda a, b: _rows(packed, a, b, bits), places)

    return PackedWeight(
        parts, (rows, inputs), held_as(checkpoint, scales), bits, group if in_order else None, opened, bits >= 8
    )


def _rows(words: Tensor, start: int, stop: int, bits: int) -> Tensor:
    return unpacked(bytes_of(words[:, start:stop].T), bits)


def _points(words: Tensor, bits: int, ones: Mapping[int, tuple[int, ...]] | None) -> Tensor:
    """Zero points, uint8 [G, N]. Raising them wraps as lowering them did: the whole word, not each code."""
    if ones is None:
        return unpacked(bytes_of(words), bits)
    if bits not in ones:
        return (unpacked(bytes_of(words), bits) + 1) & ((1 << bits) - 1)
    added = torch.tensor(ones[bits]).repeat(-(-words.shape[1] // len(ones[bits])))[: words.shape[1]]
    return unpacked(bytes_of(((words.long() + added) & 0xFFFFFFFF).to(torch.uint32)), bits)


def _order(checkpoint: Checkpoint, name: str, groups: int) -> Tensor:
    """The group of each column; CheckpointError for a group that there is not."""
    places = checkpoint.tensor(name).long()
    if not 0 <= int(places.min()) <= int(places.max()) < groups:
        worst = int(places.min()) if int(places.min()) < 0 else int(places.max())
        raise wrong(checkpoint, name, f"speaks of group {worst}, and there are {groups}")
    return places


def _side_by_side(columns: int, groups: int) -> Tensor:
    return torch.arange(columns) // (columns // groups)
