"""Weights on the grids of other engines' formats: codes with a scale for each group, as those formats can hold them.

    grid = Grid("zero point", torch.bfloat16)
    codes = fit(rows, grid, 128, importance)     # rows of a weight -> Codes

What counts is what counts for int4 (`kernels/calibrated.py`): the sum of `importance * (|w| + rms) * (w - w')^2`. Where
zero is a whole number `kernels/whole_zero.py` searches, or the native kernels, which find the same. Where a minimum is
free the search for int4 says where to begin: what it rounds to is fitted by weighted least squares, scale and minimum
are rounded to their type, and the codes are rounded for these.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from glm4lite_quant.config import GROUP_SIZES, SEARCH, QuantConfig, QuantError
from glm4lite_quant.format import Codes, not_finite
from glm4lite_quant.inputs import Inputs
from glm4lite_quant.kernels import native, whole_zero
from glm4lite_quant.kernels.reference import HUGE, unpack
from glm4lite_quant.tensor import QuantTensor

HELD = 1 / 64  # of a step: how far a zero point may be from a whole number, or a code's value move, to be the same
_AT_ONCE = 1 << 18  # float32 elements: what the dozens of passes over them find in the cache


@dataclass(frozen=True)
class Grid:
    """`w = (code - z) * scale`, or `w = code * scale + minimum`; scales and minima are of `dtype`.

    kind: "middle", z is 8 (Q4_0; compressed-tensors, symmetric); "zero point", z is a whole number of 0 to 15
    (compressed-tensors, AWQ); "minimum" (Q4_1); "bytes", z is 128 and codes have 8 bits (Q8_0).
    """

    kind: Literal["middle", "zero point", "minimum", "bytes"]
    dtype: torch.dtype

    @property
    def levels(self) -> int:
        """How many values a code has."""
        return 256 if self.kind == "bytes" else 16

    @property
    def middle(self) -> int:
        return self.levels // 2

    def rounded(self, plane: Tensor) -> Tensor:
        """Scales or minima as `dtype` holds them, float32. QuantError where it cannot hold one."""
        plane = plane.to(self.dtype).float()
        if not bool(plane.isfinite().all()):
            row = int((~plane.isfinite()).flatten(1).any(1).nonzero()[0])
            raise QuantError(f"a scale of row {row} is larger than {self.dtype} can hold")
        return plane

    def zero_points(self, codes: Codes) -> Tensor:
        """uint8 [R, G]: the code that stands for 0."""
        safe = torch.where(codes.step == 0, 1.0, codes.step)
        return (codes.low / safe).round().clamp(0, self.levels - 1).to(torch.uint8)


def fit(rows: Tensor, grid: Grid, group: int, importance: Tensor | None = None, first_row: int = 0) -> Codes:
    """The codes of rows [R, K], bfloat16 or float32, in groups of `group` columns; R is a multiple of 16 or the end.

    importance: float32 [K], the mean square of each column's inputs; None: by the weights alone.
    first_row: where they lie in the weight, for messages.

    Raises:
        QuantError: a value is not finite, shapes do not fit, or a scale is too large for the grid's type.
    """
    if rows.dim() != 2 or group not in GROUP_SIZES or rows.shape[1] % group:
        raise QuantError(f"a weight of shape {list(rows.shape)} cannot be quantized in groups of {group} columns")
    shares = None if importance is None else Inputs(importance).normalized(rows.shape[1], group).mean_square
    if grid.kind in ("middle", "zero point"):
        return _with_zero(rows, grid, group, shares, first_row)
    _check_finite(rows, first_row)
    if grid.kind == "bytes":
        return _bytes(rows.float(), grid, group)
    start = _start(rows, group, importance)
    step = max(1, _AT_ONCE // rows.shape[1])
    parts = [
        _with_minimum(rows[at : at + step].float(), grid, group, shares, start[at : at + step])
        for at in range(0, len(rows), step)
    ]
    values, scale, low = (torch.cat([getattr(part, plane) for part in parts]) for plane in ("values", "step", "low"))
    return Codes(values, scale, low, grid.levels)


def hold(codes: Codes, grid: Grid, group: int) -> Codes | None:
    """Another format's codes on this grid, in groups that divide theirs; None where they are not on it.

    Only scales and minima are rounded, to the grid's type.
    """
    if codes.levels > grid.levels or (codes.values.shape[1] // codes.step.shape[1]) % group:
        return None
    codes = codes.in_groups(group)
    values, step, low = codes.values, codes.step, codes.low
    scale = grid.rounded(step)
    if grid.kind == "minimum":
        return Codes(values, scale, -grid.rounded(-low), grid.levels)
    safe = torch.where(step == 0, 1.0, step)
    zero = low / safe
    whole = zero.round()
    shift = grid.middle - whole if grid.kind != "zero point" else torch.zeros_like(whole)
    most = float((zero - whole).abs().max())
    low_end, high_end = float((whole + shift).min()), float((whole + shift).max())
    if most > HELD or low_end < 0 or high_end >= grid.levels or bool((step == 0).any()):
        return None
    if bool((shift != 0).any()):
        moved = values.view(*step.shape, -1).float() + shift[..., None]
        if not 0 <= float(moved.min()) <= float(moved.max()) < grid.levels:
            return None
        values = moved.flatten(1).to(torch.uint8)
    return Codes(values, scale, scale * (whole + shift), grid.levels)


def _check_finite(rows: Tensor, first_row: int) -> None:
    if float(rows.abs().amax()) <= HUGE:  # False for NaN, which amax passes on
        return
    row, col = (int(index) for index in (~(rows.abs() <= HUGE)).nonzero()[0])
    raise QuantError(not_finite(first_row + row, col, float(rows[row, col])))


def _bytes(rows: Tensor, grid: Grid, group: int) -> Codes:
    groups = rows.unflatten(1, (-1, group))
    scale = grid.rounded(groups.abs().amax(-1) * (1 / 127))
    codes = (groups * _inverse(scale)[..., None]).round().clamp(-127, 127) + 128
    return Codes(codes.flatten(1).to(torch.uint8), scale, scale * 128, 256)


def _start(rows: Tensor, group: int, importance: Tensor | None) -> Codes:
    """What the search for int4 finds, in float32."""
    made = QuantTensor.empty(rows.shape[0], rows.shape[1], QuantConfig(4, group, method=SEARCH))
    made.quantize_rows(0, rows, None if importance is None else Inputs(importance))
    return as_codes(made)


def as_codes(weight: QuantTensor) -> Codes:
    """The rows of a weight of ours as codes: of int8 128 higher, so that all are above zero."""
    values = unpack(weight.qweight)[: weight.shape[0]]
    step, low, levels = steps(weight)
    return Codes(values if weight.mins is not None else (values ^ -128).view(torch.uint8), step, low, levels)


def steps(weight: QuantTensor) -> tuple[Tensor, Tensor, int]:
    """(step, low, levels) of `as_codes`, float32 [N, G]."""
    n = weight.shape[0]

    def plane(tiled: Tensor, row: Tensor) -> Tensor:
        return tiled.transpose(1, 2).flatten(0, 1)[:n] * row[:, None]

    step = plane(weight.scales, weight.row_scale)
    if weight.mins is None or weight.row_min is None:
        return step, step * 128, 256
    return step, plane(weight.mins, weight.row_min), 1 << weight.bits


@dataclass
class _Groups:
    """x: weights [g, R, G]; v: what an error of each counts. Sums over the first dimension are quick."""

    x: Tensor
    v: Tensor

    def codes(self, scale: Tensor, low: Tensor) -> Tensor:
        return ((self.x + low) * _inverse(scale)).round_().clamp_(0, 15)

    def error(self, scale: Tensor, low: Tensor) -> Tensor:
        off = self.codes(scale, low).mul_(scale).sub_(low).sub_(self.x)
        return off.square_().mul_(self.v).sum(0)


def _with_zero(rows: Tensor, grid: Grid, group: int, importance: Tensor | None, first_row: int) -> Codes:
    """By the native search, else by torch's, which finds the same."""
    middle = grid.kind == "middle"
    found = native.fit(rows, group, grid.dtype, middle, importance, first_row)
    if found is None:
        _check_finite(rows, first_row)
        step = max(1, _AT_ONCE // rows.shape[1])
        parts = [
            whole_zero.fit(rows[at : at + step].float(), group, grid.dtype, middle, importance)
            for at in range(0, len(rows), step)
        ]
        found = _joined(parts)
    codes, scale, zero = found
    scale = grid.rounded(scale)
    return Codes(codes, scale, scale * zero, 16)


def _joined(parts: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    codes, scale, zero = zip(*parts, strict=True)
    return torch.cat(codes), torch.cat(scale), torch.cat(zero)


def _with_minimum(rows: Tensor, grid: Grid, group: int, importance: Tensor | None, start: Codes) -> Codes:
    """Scale and minimum: the start's, or what fits its codes best."""
    x = rows.unflatten(1, (-1, group)).permute(2, 0, 1).contiguous()
    if importance is None:
        v = torch.ones_like(x)
    else:
        v = x.abs().add_(x.square().mean(0).sqrt()).mul_(importance.view(-1, group).T[:, None])
    groups = _Groups(x, v)
    first = grid.rounded(start.step), -grid.rounded(-start.low)
    scale, low = _line(groups, *first)
    second = grid.rounded(scale), -grid.rounded(-low)
    better = groups.error(*second) < groups.error(*first)
    scale, low = torch.where(better, second[0], first[0]), torch.where(better, second[1], first[1])
    return Codes(groups.codes(scale, low).to(torch.uint8).permute(1, 2, 0).flatten(1), scale, low, 16)


def _line(groups: _Groups, scale: Tensor, low: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and minimum that fit best what (scale, low) rounds to."""
    codes = groups.codes(scale, low)
    weighted = codes * groups.v
    v, x, q = groups.v.sum(0), (groups.v * groups.x).sum(0), weighted.sum(0)
    qq, qx = (weighted * codes).sum(0), (weighted * groups.x).sum(0)
    determinant = v * qq - q * q
    regular = determinant > v * qq * 1e-5
    new = (v * qx - q * x) / torch.where(regular, determinant, 1.0)
    keep = regular & (new > 0)
    return torch.where(keep, new, scale), torch.where(keep, (new * q - x) / v, low)


def _inverse(step: Tensor) -> Tensor:
    return torch.where(step != 0, 1.0 / step, 0.0)
