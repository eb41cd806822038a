"""The calibrated search for affine codes in plain torch: the specification and the oracle of csrc/quantize_tile.h.

The scale and minimum of each group make `sum(importance * (|w| + rms) * (w - w')^2)` small, where importance is the
mean square of the inputs of a column: what counts is the error of the layer's output. Several starts are rounded, each
is fitted to its codes by weighted least squares (as llama.cpp's make_qkx2_quants does), the best is refined, both are
turned into bytes, and the codes are rounded once more for these bytes.

Every float32 operation is done in the same order by the C++ code, so both give the same bytes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from glm4lite_quant.config import QuantError
from glm4lite_quant.format import Planes
from glm4lite_quant.kernels.reference import TINY, _inverse, _tile_plane, tile_codes

# (minimum, maximum) shares of a group's range to start from; GLM4_STARTS and GLM4_REFITS of csrc/qgemm.h.
STARTS = (
    (1.0, 1.0), (0.93, 1.0), (1.0, 0.93), (0.93, 0.93), (0.86, 1.0), (1.0, 0.86), (0.86, 0.86), (0.86, 0.93),
    (0.93, 0.86), (0.75, 0.75), (0.75, 1.0), (1.0, 0.75), (0.6, 0.6), (1.07, 1.07),
)  # fmt: skip
REFITS = 3
FLOOR = 1e-6  # of a group's largest importance: a column that calibration never saw used is not worth nothing


class _Group(NamedTuple):
    """One group of every row: x and v are lists of g columns [R, G], all else [R, G]."""

    x: list[Tensor]
    v: list[Tensor]
    low: Tensor
    high: Tensor
    v_sum: Tensor
    vx_sum: Tensor
    vxx_sum: Tensor
    unit: Tensor
    top: int  # the largest code


class _Fit(NamedTuple):
    step: Tensor
    low: Tensor
    error: Tensor


def normalized(importance: Tensor, columns: int, group: int) -> Tensor:
    """Importance [K] as the search takes it: the largest of each group is 1; a group of zeros counts evenly.

    Raises QuantError for another shape, NaN, infinities and negative numbers.
    """
    if importance.dim() != 1 or importance.shape[0] != columns:
        raise QuantError(f"importance has shape {list(importance.shape)}; expected one number for each of {columns}")
    values = importance.detach().to(torch.float32).cpu().view(-1, group)
    if not bool(((values >= 0) & values.isfinite()).all()):
        raise QuantError("importance holds a number that is negative or not finite; it is a mean of squares")
    top = values.amax(1, keepdim=True)
    shares = torch.where(top > 0, values / torch.where(top > 0, top, 1.0), 1.0)
    return shares.clamp(min=FLOOR).flatten()


def quantize(weight: Tensor, bits: int, group: int, importance: Tensor) -> Planes:
    """Quantizes float32 [R, K] (finite, |w| <= HUGE) to 2 to 6 bits; `importance` [K] as `normalized` gives it."""
    groups, top = weight.reshape(weight.shape[0], -1, group), (1 << bits) - 1
    g = _group(groups, importance.view(-1, group), top)
    fit = _search(g)
    step, low = fit.step * g.unit, fit.low * g.unit
    row_scale, row_min = step.amax(1) * (1 / 255), low.amax(1) * (1 / 255)
    used = (row_scale > TINY)[:, None].float()
    scales = (step * _inverse(row_scale)[:, None]).round().clamp(1, 255) * used
    mins = (low * _inverse(row_min)[:, None]).round().clamp(0, 255)
    scales, mins = _best_bytes(g, (row_scale[:, None], row_min[:, None], used), scales, mins)
    step, low = scales * row_scale[:, None], mins * row_min[:, None]
    codes = _codes(groups, low[..., None], _inverse(step)[..., None], top)
    return Planes(tile_codes(codes.flatten(1), bits), _tile_plane(scales), _tile_plane(mins), row_scale, row_min)


def _codes(x: Tensor, low: Tensor, inverse: Tensor, top: int) -> Tensor:
    return ((x + low) * inverse).clamp(0, top).round()


def _group(groups: Tensor, importance: Tensor, top: int) -> _Group:
    unit = groups.abs().amax(-1)
    x = list((groups * _inverse(unit)[..., None]).unbind(-1))
    zero = torch.zeros_like(unit)
    squares, v_sum, vx_sum, vxx_sum = zero, zero, zero, zero
    for column in x:
        squares = squares + column * column
    rms = (squares * (1 / len(x))).double().sqrt().float()  # float32 sqrt is not exact in every build of torch
    v = []
    for i, column in enumerate(x):
        v.append((column.abs() + rms) * importance[:, i])
        v_sum = v_sum + v[i]
        vx_sum = vx_sum + v[i] * column
        vxx_sum = vxx_sum + v[i] * column * column
    stacked = torch.stack(x)
    return _Group(x, v, stacked.amin(0).clamp(max=0), stacked.amax(0), v_sum, vx_sum, vxx_sum, unit, top)


def _search(g: _Group) -> _Fit:
    best = None
    for low_share, high_share in STARTS:
        low = (0.0 - g.low) * low_share
        best = _better(best, _refit(g, (g.high * high_share + low) * (1 / g.top), low))
    for _ in range(REFITS):
        best = _better(best, _refit(g, best.step, best.low))  # type: ignore[union-attr]  # there are starts
    return best  # type: ignore[return-value]


def _better(best: _Fit | None, other: _Fit) -> _Fit:
    if best is None:
        return other
    better = other.error < best.error
    return _Fit(*(torch.where(better, new, old) for new, old in zip(other, best, strict=True)))


def _refit(g: _Group, step: Tensor, low: Tensor) -> _Fit:
    """Rounds at (step, low), then solves the weighted least squares for the pair that fits these codes best."""
    inverse, zero, one = _inverse(step), torch.zeros_like(step), torch.ones_like(step)
    q1, q2, qx = zero, zero, zero
    for x, v in zip(g.x, g.v, strict=True):
        q = _codes(x, low, inverse, g.top)
        vq = v * q
        q1, q2, qx = q1 + vq, q2 + vq * q, qx + vq * x
    determinant = g.v_sum * q2 - q1 * q1
    regular = determinant > g.v_sum * q2 * 1e-5
    s = (g.v_sum * qx - g.vx_sum * q1) / torch.where(regular, determinant, one)
    m = (s * q1 - g.vx_sum) / torch.where(regular, g.v_sum, one)
    s = torch.where(m < 0, qx / torch.where(q2 > 0, q2, one), s)
    m = torch.where(m > 0, m, zero)
    keep = regular & (s > 0)  # else the codes say nothing
    s, m = torch.where(keep, s, step), torch.where(keep, m, low)
    error = s * s * q2 - 2 * s * m * q1 + m * m * g.v_sum - 2 * s * qx + 2 * m * g.vx_sum + g.vxx_sum
    return _Fit(s, m, error)


def _error_at(g: _Group, step: Tensor, low: Tensor) -> Tensor:
    inverse, error = _inverse(step), torch.zeros_like(step)
    for x, v in zip(g.x, g.v, strict=True):
        off = _codes(x, low, inverse, g.top) * step - low - x
        error = error + v * off * off
    return error


def _best_bytes(
    g: _Group, rows: tuple[Tensor, Tensor, Tensor], scale: Tensor, minimum: Tensor
) -> tuple[Tensor, Tensor]:
    """The bytes next to the fit that give the least error with codes rounded for them."""
    row_scale, row_min, used = rows
    inverse = _inverse(g.unit)
    step, low = row_scale * inverse, row_min * inverse
    best = _error_at(g, scale * step, minimum * low)
    best_scale, best_min = scale, minimum
    for ds in (-1, 0, 1):
        for dm in (-1, 0, 1):
            if ds == dm == 0:
                continue
            s, m = (scale + ds).clamp(1, 255) * used, (minimum + dm).clamp(0, 255)
            error = _error_at(g, s * step, m * low)
            better = error < best
            best_scale, best_min = torch.where(better, s, best_scale), torch.where(better, m, best_min)
            best = torch.where(better, error, best)
    return best_scale, best_min
