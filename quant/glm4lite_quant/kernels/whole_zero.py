"""The search for 4-bit codes with a whole zero, in torch: the specification and the oracle of csrc/quantize_tile.h.

`w = (code - zero) * scale`, where zero is a whole number of 0 to 15, or always 8, and the scale has 16 bits. What
counts is what counts for int4 (`calibrated.py`): `sum(importance * (|w| + rms) * (w - w')^2)`. Shares of a group's
range say where to begin; each is rounded, the scale that fits these codes best is taken, as it is held, and the best
scale is tried a little smaller and larger. Every float32 operation is done in the same order by the C++ code.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from glm4lite_quant.kernels.reference import TINY

# Of a group's range, of its largest magnitude where zero is 8, and what the best scale is times: GLM4_RANGE_SHARES,
# GLM4_TOP_SHARES and GLM4_POLISH of csrc/qgemm.h. Half as many of the last leave 1 % more of the weighted squares.
SHARES = (1.0, 0.9, 0.8, 0.7)
TOP_SHARES = (1.0, 0.94, 0.88, 0.82, 0.76, 1.08)
POLISH = (1.0, 0.92, 0.96, 1.04, 1.08, 1.0)


class _Group(NamedTuple):
    """One group of every row, over its largest magnitude: x and v are lists of columns [R, G], all else [R, G]."""

    x: list[Tensor]
    v: list[Tensor]
    low: Tensor
    high: Tensor
    vxx_sum: Tensor
    unit: Tensor
    dtype: torch.dtype


class _Fit(NamedTuple):
    """All [R, G]."""

    scale: Tensor
    zero: Tensor
    error: Tensor


def fit(
    rows: Tensor, group: int, dtype: torch.dtype, middle: bool, importance: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(codes uint8 [R, K], scale and zero float32 [R, G]) of finite float32 rows [R, K].

    dtype: of the scales. middle: zero is 8. importance: [K] as `Inputs.normalized` gives it, None: all alike.
    """
    groups = rows.unflatten(1, (-1, group))
    g = _group(groups, None if importance is None else importance.view(-1, group), dtype)
    best = _Fit(torch.zeros_like(g.vxx_sum), torch.zeros_like(g.vxx_sum), torch.full_like(g.vxx_sum, 3e38))
    for scale, zero in _starts(g, middle):
        best = _or_better(best, g, scale, zero)
    for factor in POLISH:
        best = _or_better(best, g, best.scale * factor, best.zero)
    scale = _held(best.scale * g.unit, dtype)
    codes = _codes(groups, (scale * best.zero)[..., None], _inverse(scale)[..., None])
    return codes.flatten(1).to(torch.uint8), scale, best.zero


def _starts(g: _Group, middle: bool) -> Iterator[tuple[Tensor, Tensor]]:
    high, low = g.high, g.low
    if middle:  # what is largest takes the code that has no opposite
        top = torch.where(high > low, 0.0 - high, low)
        yield from ((top * (share / 8), torch.full_like(top, 8.0)) for share in TOP_SHARES)
        return
    for share in SHARES:
        scale = (high + low) * _float32(share, 15)
        below = (low * share * _inverse(scale)).floor()
        yield from ((scale, (below + more).clamp(0, 15)) for more in (0, 1))


def _or_better(best: _Fit, g: _Group, scale: Tensor, zero: Tensor) -> _Fit:
    """Rounds at (scale, zero), then takes the scale that fits these codes best, as it is held."""
    low, inverse = scale * zero, _inverse(scale)
    qx, q2 = torch.zeros_like(scale), torch.zeros_like(scale)
    for x, v in zip(g.x, g.v, strict=True):
        q = _codes(x, low, inverse) - zero
        vq = v * q
        qx, q2 = qx + vq * x, q2 + vq * q
    some = q2 > 0
    fitting = torch.where(some, qx / torch.where(some, q2, torch.ones_like(q2)), scale)
    s = _held(fitting * g.unit, g.dtype) * _inverse(g.unit)
    error = s * s * q2 - 2 * s * qx + g.vxx_sum
    better = error < best.error
    return _Fit(*(torch.where(better, new, old) for new, old in zip((s, zero, error), best, strict=True)))


def _group(groups: Tensor, importance: Tensor | None, dtype: torch.dtype) -> _Group:
    unit = groups.abs().amax(-1)
    x = list((groups * _inverse(unit)[..., None]).unbind(-1))
    stacked = torch.stack(x)
    high, low = stacked.amax(0).clamp(min=0), 0.0 - stacked.amin(0).clamp(max=0)
    squares, vxx_sum = torch.zeros_like(x[0]), torch.zeros_like(x[0])
    for column in x:
        squares = squares + column * column
    rms = (squares * (1 / len(x))).double().sqrt().float()  # float32 sqrt is not exact in every build of torch
    v = []
    for i, column in enumerate(x):
        v.append(torch.ones_like(column) if importance is None else (column.abs() + rms) * importance[:, i])
        vxx_sum = vxx_sum + v[i] * column * column
    return _Group(x, v, low, high, vxx_sum, unit, dtype)


def _held(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """As the type holds it; what is beyond its range stays, for the caller to refuse."""
    rounded = scale.to(dtype).float()
    return torch.where(rounded.isfinite(), rounded, scale)


def _codes(x: Tensor, low: Tensor, inverse: Tensor) -> Tensor:
    return ((x + low) * inverse).clamp(0, 15).round()


def _inverse(scale: Tensor) -> Tensor:
    return torch.where(scale.abs() > TINY, 1.0 / scale, 0.0)


def _float32(share: float, by: int) -> float:
    """The quotient of two numbers of float32, as C++ divides them."""
    return float(torch.tensor(share, dtype=torch.float32) / by)
