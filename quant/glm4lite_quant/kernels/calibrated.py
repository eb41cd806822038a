"""The calibrated search for affine codes in plain torch: the specification and the oracle of csrc/quantize_tile.h.

The scale and minimum of each group make `sum(importance * (|w| + rms) * (w - w')^2)` small, where importance is the
mean square of the inputs of a column: what counts is the error of the layer's output. Several starts are rounded, each
is fitted to its codes by weighted least squares (as llama.cpp's make_qkx2_quants does), the best is refined, both are
turned into bytes, and the codes are rounded once more for these bytes.

With feedback the columns go one after the other. What rounding one loses is taken from those behind it, so that a
group's scale, minimum and codes are found for weights that make up for the columns before; only the rows' scales are
those of the weights as they were.

Every float32 operation is done in the same order by the C++ code, so both give the same bytes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from glm4lite_quant.format import Planes
from glm4lite_quant.inputs import Feedback, Inputs
from glm4lite_quant.kernels.reference import TINY, _inverse, _tile_plane, tile_codes

# (minimum, maximum) shares of a group's range to start from; GLM4_STARTS and GLM4_REFITS of csrc/qgemm.h.
STARTS = (
    (1.0, 1.0), (0.93, 1.0), (1.0, 0.93), (0.93, 0.93), (0.86, 1.0), (1.0, 0.86), (0.86, 0.86), (0.86, 0.93),
    (0.93, 0.86), (0.75, 0.75), (0.75, 1.0), (1.0, 0.75), (0.6, 0.6), (1.07, 1.07),
)  # fmt: skip
REFITS = 3


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


class _Rows(NamedTuple):
    """What the groups of a row share, [R]: the sizes of one unit of a scale and of a minimum."""

    scale: Tensor
    minimum: Tensor


def quantize(weight: Tensor, bits: int, group: int, inputs: Inputs) -> Planes:
    """Quantizes float32 [R, K] (finite, |w| <= HUGE) to 2 to 6 bits; `inputs` as `Inputs.normalized` gives them."""
    top, importance = (1 << bits) - 1, inputs.mean_square.view(-1, group)
    g = _group(weight.reshape(weight.shape[0], -1, group), importance, top)
    fit = _search(g)
    rows = _Rows((fit.step * g.unit).amax(1) * (1 / 255), (fit.low * g.unit).amax(1) * (1 / 255))
    if inputs.feedback is None:
        scales, mins = _bytes(g, fit, rows)
        codes, _ = _rounded(weight.reshape(*scales.shape, group), scales, mins, rows, top)
        codes = codes.flatten(1)
    else:
        codes, scales, mins = _with_feedback(weight, importance, inputs.feedback, rows, top)
    return Planes(tile_codes(codes, bits), _tile_plane(scales), _tile_plane(mins), rows.scale, rows.minimum)


def _with_feedback(
    weight: Tensor, importance: Tensor, feedback: Feedback, rows: _Rows, top: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(codes [R, K], scales, mins [R, G])."""
    size, group, rank = weight.shape[1], importance.shape[1], feedback.rank
    codes = torch.empty_like(weight)
    scales, mins = (weight.new_empty(len(weight), len(importance)) for _ in range(2))
    sums = weight.new_zeros(len(weight), rank)
    for first in range(0, size, feedback.block):
        stop = min(first + feedback.block, size)
        source, within = weight[:, first:stop], feedback.within[first:stop, : stop - first]
        onto = feedback.onto[first * rank : stop * rank].view(rank, stop - first)
        x = source.clone()
        for i in range(rank):
            x -= sums[:, i, None] * onto[i]
        for at in range(0, stop - first, group):
            number = (first + at) // group
            g = _group(x[:, None, at : at + group], importance[number, None], top)
            s, m = _bytes(g, _search(g), rows)
            scales[:, number], mins[:, number] = s[:, 0], m[:, 0]
            for column in range(at, at + group):
                code, value = _rounded(x[:, None, column, None], s, m, rows, top)
                codes[:, first + column] = code[:, 0, 0]
                lost = x[:, column] - value[:, 0, 0]
                x[:, column + 1 :] -= lost[:, None] * within[column, column + 1 :]
                x[:, column] = value[:, 0, 0]
        change = source - x
        for i in range(stop - first):
            sums -= change[:, i, None] * feedback.into[first + i]
    return codes, scales, mins


def _bytes(g: _Group, fit: _Fit, rows: _Rows) -> tuple[Tensor, Tensor]:
    """The scales and minima [R, G] of groups, as bytes hold them."""
    used = (rows.scale > TINY)[:, None].float()
    scales = (fit.step * g.unit * _inverse(rows.scale)[:, None]).round().clamp(1, 255) * used
    mins = (fit.low * g.unit * _inverse(rows.minimum)[:, None]).round().clamp(0, 255)
    return _best_bytes(g, (rows.scale[:, None], rows.minimum[:, None], used), scales, mins)


def _rounded(x: Tensor, scales: Tensor, mins: Tensor, rows: _Rows, top: int) -> tuple[Tensor, Tensor]:
    """The codes of x [R, G, g], and what they stand for."""
    step, low = (scales * rows.scale[:, None])[..., None], (mins * rows.minimum[:, None])[..., None]
    codes = _codes(x, low, _inverse(step), top)
    return codes, codes * step - low


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
