"""The tensors of one quantized weight, and how they lie.

Tiles of 16 rows x 32 columns lie one after another along K; scales and mins are planes of one byte per row and group:
`w[n, k] = row_scale[n] * scales[n, j] * q[n, k] - row_min[n] * mins[n, j]` with j = k // group_size.

A tile of codes of fewer than 8 bits is planes of their binary digits, as many in each as `digits` says, the lowest
first. So 3 bits are a plane of two and a plane of one digit: whole bytes, and few instructions to put a code together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

ROWS = 16  # rows of a tile
COLS = 32  # columns of a tile
TILE_BYTES = ROWS * COLS // 8  # of a tile, for each bit of its codes

SCRATCH_ELEMENTS = 4 << 20  # float32 elements dequantized (or quantized) at once: 16 MiB

NAMES = ("qweight", "scales", "mins", "row_scale", "row_min")


def digits(bits: int) -> list[int]:
    """How many binary digits of a code lie in each plane of a tile; byte i of a row holds those of columns i, 4 + i...

    >>> digits(3), digits(6), digits(8)
    ([2, 1], [4, 2], [8])
    """
    return [count for count in (8, 4, 2, 1) if bits & count]


@dataclass
class Planes:
    """A weight [N, K]; codes of fewer than 8 bits (affine) have `mins` and `row_min`, int8 (symmetric) has not."""

    qweight: Tensor  # uint8 [ceil(N/16), K/32, 64 * bits]
    scales: Tensor  # uint8 [ceil(N/16), K/g, 16]
    mins: Tensor | None  # uint8, like scales
    row_scale: Tensor  # float32 [N]
    row_min: Tensor | None  # float32 [N]

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K): rows are outputs, columns inputs; codes are padded to whole tiles, `row_scale` is not."""
        return self.row_scale.shape[0], self.qweight.shape[1] * COLS

    @property
    def bits(self) -> int:
        """Of a code, as large as the codes' tiles are: one of config.BITS."""
        return self.qweight.shape[2] // TILE_BYTES

    @property
    def group_size(self) -> int:
        """How many columns share a scale: 32, 64 or 128."""
        return self.shape[1] // self.scales.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of all planes."""
        return sum(t.nbytes for t in self.tensors().values())

    @property
    def device(self) -> torch.device:
        """Where all planes are."""
        return self.qweight.device

    def tiles(self, start: int, stop: int) -> Self:
        """Rows start to stop, a multiple of 16 each (or the end), over the same memory."""
        tile, end = start // ROWS, -(-stop // ROWS)
        mins = None if self.mins is None else self.mins[tile:end]
        row_min = None if self.row_min is None else self.row_min[start:stop]
        return type(self)(self.qweight[tile:end], self.scales[tile:end], mins, self.row_scale[start:stop], row_min)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by the names a checkpoint gives them."""
        return {name: t for name in NAMES if (t := getattr(self, name)) is not None}


@dataclass(frozen=True)
class Codes:
    """Rows of a weight as another tool's affine codes: `w = values * step - low`, with a step and a low for each group
    of columns. A step may be negative.
    """

    values: Tensor  # uint8 [R, K], below `levels`
    step: Tensor  # float32 [R, G]
    low: Tensor  # float32 [R, G]
    levels: int

    def decoded(self) -> Tensor:
        """float32 [R, K]. Where steps have few digits and zero points are whole, as they mostly are, it is exact."""
        grouped = self.values.float().view(*self.step.shape, -1)
        return grouped.mul_(self.step[..., None]).sub_(self.low[..., None]).flatten(1)

    def __getitem__(self, rows: slice) -> Codes:
        return Codes(self.values[rows], self.step[rows], self.low[rows], self.levels)

    def in_groups(self, size: int) -> Codes:
        """The same with smaller groups."""
        times = self.values.shape[1] // self.step.shape[1] // size
        step, low = (plane.repeat_interleave(times, 1) if times > 1 else plane for plane in (self.step, self.low))
        return Codes(self.values, step, low, self.levels)


def not_finite(row: int, col: int, value: float) -> str:
    """The message for a weight that cannot be quantized."""
    return f"the weight at row {row}, column {col} is {value:g}: not a finite number that can be quantized"
