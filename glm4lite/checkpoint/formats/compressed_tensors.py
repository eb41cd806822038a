"""compressed-tensors, as llm-compressor writes it: pack-quantized, int-quantized and float-quantized weights.

pack-quantized: `X.weight_packed` int32 [N, .], codes along a row; `.weight_scale` [N, G]; `.weight_shape` int64 [2];
where they are not symmetric `.weight_zero_point`, packed along the rows to [., G]; with act-order `.weight_g_idx` [K].
Codes and zero points are stored 2^(b-1) higher. Until 0.17, codes of 3, 5, 6 and 7 bits left the rest of a word empty;
since 0.18 they are one stream: the number of columns tells. What the others store is `scaled.py`'s. The tensors say
what is quantized and how, not config.json's lists. Source: compressed-tensors 0.20 (compressors/).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from glm4lite.checkpoint.checkpoint import Checkpoint
from glm4lite.checkpoint.formats.imported import ImportedFormat, one_of
from glm4lite.checkpoint.formats.packing import bytes_of, unpacked, unpacked_words
from glm4lite.checkpoint.formats.scaled import NUMBERS, scaled_weight
from glm4lite.checkpoint.formats.weight import SCALES, Affine, PackedWeight, check, finite, held_as, matrix, wrong
from glm4lite_quant import QuantError

FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mixed-precision", "dense")


class CompressedTensors(ImportedFormat):
    """quant_method "compressed-tensors"."""

    method = "compressed-tensors"

    def settings(self, given: Mapping[str, Any]) -> frozenset[int]:
        """The bits that its groups of layers have."""
        one_of(given, "format", FORMATS)
        for key in ("transform_config", "sparsity_config"):
            if given.get(key):
                what = "weights that were transformed, or are sparse, cannot be read"
                raise QuantError(f"quantization_config.{key} is set: {what}")
        groups = given.get("config_groups")
        if not isinstance(groups, Mapping) or not all(isinstance(group, Mapping) for group in groups.values()):
            raise QuantError("quantization_config.config_groups is no object of groups")
        bits = set()
        for name, group in groups.items():
            if group.get("format") is not None:
                one_of(group, "format", FORMATS)
            weights = group.get("weights")
            if isinstance(weights, Mapping):
                bits.add(one_of(weights, "num_bits", range(2, 9)))
            elif weights is not None:
                raise QuantError(f"quantization_config.config_groups.{name}.weights is no object")
        return frozenset(bits)

    def weights(self, checkpoint: Checkpoint, settings: frozenset[int]) -> Iterator[tuple[str, PackedWeight]]:
        for name in checkpoint.names():
            module = name.removesuffix(".weight_packed")
            if module != name:
                yield f"{module}.weight", _packed(checkpoint, module, settings)
            elif name.endswith(".weight") and checkpoint.dtype(name) in NUMBERS:
                yield name, _whole(checkpoint, name)


def _packed(checkpoint: Checkpoint, module: str, declared: frozenset[int]) -> PackedWeight:
    words, scale, size, zero, order = (
        f"{module}.{part}"
        for part in ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx")
    )
    rows, width = matrix(checkpoint, words, ("I32",))
    check(checkpoint, size, ("I32", "I64"), (2,))
    columns = _columns(checkpoint, size, rows, width, declared)
    bits, dense = _bits(checkpoint, words, columns, width, declared)
    scales = matrix(checkpoint, scale, SCALES)
    groups = scales[1]
    if scales[0] != rows or columns % groups:
        raise wrong(checkpoint, scale, f"has shape {list(scales)}, which does not fit a weight of {[rows, columns]}")
    parts = [words, scale, size]
    if zero in checkpoint:
        lines = {-(-rows * bits // 32), -(-rows // (32 // bits))}
        if checkpoint.dtype(zero) == "I8":  # before they were packed
            check(checkpoint, zero, ("I8",), (rows, groups))
        else:
            check(checkpoint, zero, ("I32",), *((count, groups) for count in sorted(lines)))
        parts.append(zero)
    if order in checkpoint:
        check(checkpoint, order, ("I32", "I64"), (columns,))
        parts.append(order)

    def opened(source: Checkpoint) -> Affine:
        step, packed = finite(source, scale), source.mapped(words)
        points = _zero_points(source, zero, rows, bits) if zero in source else 1 << (bits - 1)
        places = _places(source, order, groups) if order in source else None
        return Affine(step, step * points, 1 << bits, lambda a, b: _codes(packed[a:b], bits, dense, columns), places)

    group = None if order in checkpoint else columns // groups
    return PackedWeight(tuple(parts), (rows, columns), held_as(checkpoint, scale), bits, group, opened, bits >= 8)


def _columns(checkpoint: Checkpoint, size: str, rows: int, width: int, declared: frozenset[int]) -> int:
    """K, as `weight_shape` says; of a file that is not here, from the number of words."""
    if not checkpoint.file(size).exists():
        return width * 32 // min(declared, default=4)
    shape = [int(count) for count in checkpoint.tensor(size)]
    if shape[0] != rows or not 0 < shape[1] <= width * 16:
        raise wrong(checkpoint, size, f"says {shape}, and there are {rows} rows of {width} words")
    return shape[1]


def _bits(checkpoint: Checkpoint, words: str, columns: int, width: int, declared: frozenset[int]) -> tuple[int, bool]:
    """How many bits a code has, and whether codes are one dense stream."""
    fits = [bits for bits in sorted(declared) if width in (-(-columns * bits // 32), -(-columns // (32 // bits)))]
    if len(fits) != 1:
        bits = " or ".join(map(str, sorted(declared)))
        raise wrong(
            checkpoint, words, f"has {width} words for {columns} codes, which config.json says have {bits} bits"
        )
    dense = width == -(-columns * fits[0] // 32)
    if dense and width * 32 % (8 * fits[0]):
        raise wrong(checkpoint, words, f"has {columns} columns, no multiple of 32")
    return fits[0], dense


def _codes(words: Tensor, bits: int, dense: bool, columns: int) -> Tensor:
    codes = unpacked(bytes_of(words), bits) if dense else unpacked_words(words, bits)
    return codes[:, :columns].contiguous()


def _zero_points(checkpoint: Checkpoint, name: str, rows: int, bits: int) -> Tensor:
    """[N, G], as high as the codes are."""
    stored = checkpoint.mapped(name)
    if stored.dtype == torch.int8:
        points = stored.float() + (1 << (bits - 1))
        if not 0 <= float(points.min()) <= float(points.max()) < 1 << bits:
            raise wrong(checkpoint, name, f"holds a zero point that {bits} bits cannot have")
        return points
    turned = stored.T.contiguous()
    dense = stored.shape[0] == -(-rows * bits // 32) and turned.shape[1] * 4 % bits == 0
    points = unpacked(bytes_of(turned), bits) if dense else unpacked_words(turned, bits)
    return points[:, :rows].T.float()


def _places(checkpoint: Checkpoint, name: str, groups: int) -> Tensor:
    places = checkpoint.tensor(name).long()
    if not 0 <= int(places.min()) <= int(places.max()) < groups:
        raise wrong(
            checkpoint, name, f"speaks of groups {int(places.min())} to {int(places.max())}, there are {groups}"
        )
    return places


def _whole(checkpoint: Checkpoint, name: str) -> PackedWeight:
    """int8 and 8-bit floats as they are: int8 ones may have zero points, floats come in blocks too."""
    module = name.removesuffix(".weight")
    zero, scale = f"{module}.weight_zero_point", f"{module}.weight_scale"
    if checkpoint.dtype(name) != "I8":
        return scaled_weight(checkpoint, name, _block(checkpoint, name, scale))
    if zero not in checkpoint:
        return scaled_weight(checkpoint, name)
    weight = scaled_weight(checkpoint, name)
    rows = weight.shape[0]
    groups = math.prod(checkpoint.shape(scale)) // rows or 1
    check(checkpoint, zero, ("I8",), checkpoint.shape(scale))

    def opened(source: Checkpoint) -> Affine:
        step = finite(source, scale).view(-1, groups).expand(rows, groups).contiguous()
        points = source.mapped(zero).float().view(-1, groups) + 128
        values = source.mapped(name)
        return Affine(step, step * points, 256, lambda a, b: (values[a:b] ^ -128).view(torch.uint8))

    return PackedWeight((*weight.parts, zero), weight.shape, weight.dtype, 8, None, opened, calibrate=True)


def _block(checkpoint: Checkpoint, name: str, scale: str) -> tuple[int, int] | None:
    """The rows and columns that share a scale, where rows do: blocks are squares of 128 there."""
    rows, columns = matrix(checkpoint, name, NUMBERS)
    shape = checkpoint.shape(scale) if scale in checkpoint else ()
    return (128, 128) if shape == (-(-rows // 128), -(-columns // 128)) and rows > 1 else None
