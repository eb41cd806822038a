"""MLX's affine layout: `X.weight` uint32 [N, K b / 32], one stream of codes a row, with `.scales` and `.biases` [N, G].

`w = q * scale + bias`, and scales may be negative. config.json's `quantization` says bits and groups, and of single
modules others. Source: MLX 0.32 (mlx.core.quantize), mlx-lm's utils.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Mapping
from typing import Any

from glm4lite.checkpoint.checkpoint import Checkpoint
from glm4lite.checkpoint.formats.imported import ImportedFormat, one_of
from glm4lite.checkpoint.formats.packing import bytes_of, unpacked
from glm4lite.checkpoint.formats.weight import SCALES, Affine, PackedWeight, check, finite, held_as, matrix, wrong
from glm4lite_quant import QuantError

BITS = (2, 3, 4, 5, 6, 8)
GROUPS = (32, 64, 128)
_KEYS = ("group_size", "bits", "mode", "quant_method", "linear_class", "quantize_input")

Scheme = tuple[int, int]  # bits, columns of a group


class MLX(ImportedFormat):
    """The key `quantization`, which no other tool writes."""

    method = "mlx"

    def declared(self, config: Mapping[str, Any]) -> Mapping[str, Any] | None:
        given = config.get("quantization")
        return given if isinstance(given, Mapping) else None

    def settings(self, given: Mapping[str, Any]) -> dict[str, Scheme]:
        """By the module's name; "" for all others."""
        schemes = {"": _scheme(given)}
        for name, value in given.items():
            if name in _KEYS or value is False or value is True:
                continue
            if not isinstance(value, Mapping):
                raise QuantError(f"quantization.{name} is {reprlib.repr(value)}; expected an object or false")
            schemes[name] = _scheme({**given, **value})
        return schemes

    def weights(self, checkpoint: Checkpoint, settings: dict[str, Scheme]) -> Iterator[tuple[str, PackedWeight]]:
        for name in checkpoint.names():
            module = name.removesuffix(".weight")
            if module != name and f"{module}.scales" in checkpoint:
                yield name, _weight(checkpoint, module, settings.get(module, settings[""]))


def _scheme(given: Mapping[str, Any]) -> Scheme:
    one_of(given, "mode", ("affine",), "affine")
    return int(one_of(given, "bits", BITS)), int(one_of(given, "group_size", GROUPS))


def _weight(checkpoint: Checkpoint, module: str, scheme: Scheme) -> PackedWeight:
    words, scales, biases = (f"{module}.{part}" for part in ("weight", "scales", "biases"))
    bits, group = scheme
    rows, width = matrix(checkpoint, words, ("U32",))
    columns = width * 32 // bits
    if width * 32 % bits or columns % group:
        what = f"has {width} words a row, which is no number of codes of {bits} bits in groups of {group}"
        raise wrong(checkpoint, words, what)
    for name in (scales, biases):
        check(checkpoint, name, SCALES, (rows, columns // group))

    def opened(source: Checkpoint) -> Affine:
        packed = source.mapped(words)
        step, low = finite(source, scales), finite(source, biases).neg_()
        return Affine(step, low, 1 << bits, lambda a, b: unpacked(bytes_of(packed[a:b]), bits))

    parts, dtype = (words, scales, biases), held_as(checkpoint, scales)
    return PackedWeight(parts, (rows, columns), dtype, bits, group, opened, bits >= 8)
