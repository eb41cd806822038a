"""AWQ's layouts: GEMM packs eight outputs into a word, in an order of its own, GEMV eight inputs, in theirs.

GEMM: `X.qweight` int32 [K, N / 8], `.qzeros` int32 [G, N / 8] in the same order, `.scales` [G, N]. GEMV: `.qweight`
int32 [N, K / 8], `.qzeros` int32 [N, W] and `.scales` [N, 8 W] with W words a row, rounded up for its kernel.
`w = (q - zero) * scale`, always in 4 bits. Source: AutoAWQ 0.2 (modules/linear/gemm.py, gemv.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from glm4lite.checkpoint.checkpoint import Checkpoint
from glm4lite.checkpoint.formats.imported import ImportedFormat, group_size, groups_in, one_of
from glm4lite.checkpoint.formats.packing import bytes_of, unpacked
from glm4lite.checkpoint.formats.weight import SCALES, Affine, Opened, PackedWeight, check, finite, held_as, matrix

BITS = 4
_NIBBLE_OF = (0, 4, 1, 5, 2, 6, 3, 7)
"""Which four bits of a word hold column 0, 1, ... of its eight."""

_WORDS_OF_32_BYTES = {32: 4, 64: 2}  # of a row of GEMV's zero points, by the group size; 1 for larger groups


@dataclass(frozen=True)
class Settings:
    """gemv: by rows. group: None for one of all columns."""

    gemv: bool
    group: int | None


class AWQ(ImportedFormat):
    """quant_method "awq"."""

    method = "awq"

    def settings(self, given: Mapping[str, Any]) -> Settings:
        one_of(given, "bits" if "bits" in given else "w_bit", (BITS,))
        version = str(given.get("version", "gemm")).lower()
        one_of({"version": version}, "version", ("gemm", "gemv"))
        size = group_size(given, "group_size" if "group_size" in given else "q_group_size")
        return Settings(version == "gemv", size)

    def weights(self, checkpoint: Checkpoint, settings: Settings) -> Iterator[tuple[str, PackedWeight]]:
        for name in checkpoint.names():
            module = name.removesuffix(".qweight")
            if module != name:
                describe = _gemv if settings.gemv else awq_gemm
                yield f"{module}.weight", describe(checkpoint, module, settings.group)


def awq_gemm(checkpoint: Checkpoint, module: str, group: int | None) -> PackedWeight:
    """A weight that is packed by columns; CheckpointError where its tensors do not belong together."""
    words, zeros, scales = (f"{module}.{part}" for part in ("qweight", "qzeros", "scales"))
    inputs, rows = matrix(checkpoint, words, ("I32",))
    rows *= 8
    groups = groups_in(checkpoint, words, inputs, group)
    check(checkpoint, zeros, ("I32",), (groups, rows // 8))
    check(checkpoint, scales, SCALES, (groups, rows))

    def opened(source: Checkpoint) -> Affine:
        step, packed = finite(source, scales).T.contiguous(), source.mapped(words)
        low = _columns(source.mapped(zeros), 0, rows).float() * step
        return Affine(step, low, 16, lambda start, stop: _columns(packed, start, stop))

    return _described(checkpoint, (words, zeros, scales), (rows, inputs), groups, opened)


def _gemv(checkpoint: Checkpoint, module: str, group: int | None) -> PackedWeight:
    words, zeros, scales = (f"{module}.{part}" for part in ("qweight", "qzeros", "scales"))
    rows, inputs = matrix(checkpoint, words, ("I32",))
    inputs *= 8
    groups = groups_in(checkpoint, words, inputs, group)
    multiple = _WORDS_OF_32_BYTES.get(inputs // groups, 1)
    width = -(-groups // (8 * multiple)) * multiple
    check(checkpoint, zeros, ("I32",), (rows, width))
    check(checkpoint, scales, SCALES, (rows, 8 * width))

    def opened(source: Checkpoint) -> Affine:
        step, packed = finite(source, scales)[:, :groups].contiguous(), source.mapped(words)
        points = unpacked(bytes_of(source.mapped(zeros)), BITS)[:, :groups]
        return Affine(step, points.float() * step, 16, lambda start, stop: _along_rows(packed, start, stop))

    return _described(checkpoint, (words, zeros, scales), (rows, inputs), groups, opened)


def _described(
    checkpoint: Checkpoint,
    parts: tuple[str, str, str],
    shape: tuple[int, int],
    groups: int,
    opened: Callable[[Checkpoint], Opened],
) -> PackedWeight:
    return PackedWeight(parts, shape, held_as(checkpoint, parts[2]), BITS, shape[1] // groups, opened)


def _along_rows(words: Tensor, start: int, stop: int) -> Tensor:
    return unpacked(bytes_of(words[start:stop]), BITS)


def _columns(words: Tensor, start: int, stop: int) -> Tensor:
    """Columns start to stop-1 of [K, N / 8] as rows: uint8 [stop - start, K]."""
    first, last = start // 8, -(-stop // 8)
    turned = words[:, first:last].T.contiguous()  # [words, K]
    codes = torch.empty(turned.shape[0], 8, turned.shape[1], dtype=torch.uint8)
    for column, nibble in enumerate(_NIBBLE_OF):
        codes[:, column] = (turned >> (4 * nibble)) & 15
    return codes.flatten(0, 1)[start - 8 * first : stop - 8 * first]
