"""The format in plain torch: the specification, the oracle of the native kernels and the fallback where there are none.

Every float32 operation below is done in the same order by csrc/quantize.cpp, so both give the same bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from glm4lite_quant.format import COLS, ROWS, SCRATCH_ELEMENTS, Codes, Planes, digits

# Shares of a group's (minimum, maximum) that the search tries: cutting an outlier short can cost less than a coarser
# step. On normal weights in groups of 32 these five give 22.5 dB, the whole range alone 22.1, five equal cuts 22.4.
SHARES = ((1.0, 1.0), (0.9, 1.0), (1.0, 0.9), (0.9, 0.9), (0.82, 0.82))
KEPT_SHARE = 0.1  # of the mean square error of rounding (step^2 / 12): what rounding the scales of kept codes may add
TINY = 1e-30  # a step below this is zero: its reciprocal would leave float32
HUGE = 1e18  # a weight above this is refused: its square would leave float32


def quantize(weight: Tensor, bits: int, group: int, shares: int = len(SHARES)) -> Planes:
    """Quantizes float32 [R, K] (finite, |w| <= HUGE); rows are padded to 16 with zeros in the tiles.

    Affine codes try the first `shares` of SHARES.
    """
    groups, top = weight.reshape(weight.shape[0], -1, group), (1 << bits) - 1
    if bits == 8:
        codes, scales, row_scale = _quantize_int8(groups)
        return Planes(tile_codes(codes.flatten(1), bits), _tile_plane(scales), None, row_scale, None)
    step, low = _search(groups, shares, top)
    row_scale, row_min = step.amax(1) * (1 / 255), low.amax(1) * (1 / 255)
    scales = (step * _inverse(row_scale)[:, None]).round().clamp(1, 255) * (row_scale > TINY)[:, None]
    mins = (low * _inverse(row_min)[:, None]).round().clamp(0, 255)
    step, low = scales * row_scale[:, None], mins * row_min[:, None]
    codes = ((groups + low[..., None]) * _inverse(step)[..., None]).round().clamp(0, top)
    return Planes(tile_codes(codes.flatten(1), bits), _tile_plane(scales), _tile_plane(mins), row_scale, row_min)


def kept(given: Codes) -> tuple[Planes, Tensor]:
    """Codes of another tool as int4 planes, and the mean square of what rounding their scales changes in each row [R].

    A step's rounding shifts the middle code by what the minimum's byte can take back: symmetric codes stay symmetric.
    """
    codes, step, low, levels = given.values, given.step, given.low, given.levels
    turned = step < 0
    if bool(turned.any()):
        groups = codes.view(*step.shape, -1)
        codes = torch.where(turned[..., None], levels - 1 - groups, groups).flatten(1)
        low, step = torch.where(turned, low - (levels - 1) * step, low), step.abs()
    middle = (levels - 1) / 2
    row_scale, row_min = step.amax(1) * (1 / 255), low.amax(1).clamp(min=0) * (1 / 255)
    scales = (step * _inverse(row_scale)[:, None]).round()
    off = scales * row_scale[:, None] - step
    mins = ((low + middle * off) * _inverse(row_min)[:, None]).round().clamp(0, 255)
    shift = mins * row_min[:, None] - low - middle * off
    lost = (off.square() * ((levels * levels - 1) / 12) + shift.square()).mean(1)
    return Planes(tile_codes(codes, 4), _tile_plane(scales), _tile_plane(mins), row_scale, row_min), lost


def _search(groups: Tensor, shares: int, top: int) -> tuple[Tensor, Tensor]:
    """[R, G, g] -> the step and the minimum's size (>= 0, [R, G]) with the least squared error over `shares` cuts."""
    low, high = 0.0 - groups.amin(-1).clamp(max=0), groups.amax(-1)
    best_step, best_low, best_error = low, low, None
    for low_share, high_share in SHARES[:shares]:
        m = low * low_share
        s = (high * high_share + m) * (1 / top)
        codes = ((groups + m[..., None]) * _inverse(s)[..., None]).clamp(0, top).round()
        off = codes * s[..., None] - m[..., None] - groups
        error = _tree_sum(off * off)
        if best_error is None:
            best_step, best_error = s, error
            continue
        better = error < best_error
        best_step, best_low = torch.where(better, s, best_step), torch.where(better, m, best_low)
        best_error = torch.where(better, error, best_error)
    return best_step, best_low


def _quantize_int8(groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    step = groups.abs().amax(-1) * (1 / 127)
    row_scale = step.amax(1) * (1 / 255)
    # Rounded up: a step rounded down would cut off the group's largest weight.
    scales = (step * _inverse(row_scale)[:, None]).ceil().clamp(1, 255) * (row_scale > TINY)[:, None]
    step = scales * row_scale[:, None]
    return (groups * _inverse(step)[..., None]).clamp(-127, 127).round(), scales, row_scale


def _inverse(step: Tensor) -> Tensor:
    return torch.where(step > TINY, torch.ones_like(step) / step, torch.zeros_like(step))


def _tree_sum(x: Tensor) -> Tensor:
    """Sums the last dimension (a power of two) by halves: an order that SIMD code can follow exactly."""
    while x.shape[-1] > 1:
        half = x.shape[-1] // 2
        x = x[..., :half] + x[..., half:]
    return x[..., 0]


def _pad_rows(x: Tensor) -> Tensor:
    return torch.nn.functional.pad(x, (0, 0, 0, -x.shape[0] % ROWS)).view(-1, ROWS, x.shape[1])


def _tile_plane(x: Tensor) -> Tensor:
    return _pad_rows(x).to(torch.uint8).transpose(1, 2).contiguous()


def tile_codes(codes: Tensor, bits: int) -> Tensor:
    """[R, K] of 0..2^bits - 1, or -127..127 with 8 bits -> [T, K/32, 64 * bits], plane by plane."""
    v = _pad_rows(codes).to(torch.int8 if bits == 8 else torch.uint8)
    quads = v.view(torch.int32).view(v.shape[0], ROWS, -1, COLS // 4)  # four codes at a time: a code leaves no byte
    planes, at = [], 0
    for count in digits(bits):
        fields = ((quads >> at) & _each_byte(count)).unflatten(3, (count, 8 // count))
        word = fields[..., 0]
        for field in range(1, 8 // count):
            word = word | (fields[..., field] << (field * count))
        planes.append(word.permute(0, 2, 3, 1))
        at += count
    return torch.cat(planes, dim=2).contiguous().view(torch.uint8).flatten(2)


def _each_byte(count: int) -> int:
    """The lowest `count` binary digits of each byte of a word, as an int32."""
    return ((1 << count) - 1) * 0x01010101 if count < 8 else -1


def _words(qweight: Tensor) -> Tensor:
    """[T, K/32, 64 * bits] -> int32 [T, K/32, bits, 16]: a row's bytes of each vector."""
    return qweight.view(torch.int32).view(qweight.shape[0], qweight.shape[1], -1, ROWS)


def _codes(words: Tensor) -> Tensor:
    """Words [..., bits] of a row's block -> codes [..., 32], uint8, or int8 of 8 bits."""
    bits, at, first = words.shape[-1], 0, 0
    quads = torch.zeros(*words.shape[:-1], COLS // 4, dtype=torch.int32, device=words.device)
    for count in digits(bits):
        vectors = words[..., first : first + count]
        fields = [(vectors >> shift) & _each_byte(count) for shift in range(0, 8, count)]
        quads |= torch.stack(fields, dim=-1).flatten(-2) << at
        at, first = at + count, first + count
    return quads.view(torch.int8 if bits == 8 else torch.uint8)


def unpack(qweight: Tensor) -> Tensor:
    """Tiles [T, K/32, 64 * bits] -> codes [16 T, K], uint8 0..2^bits - 1, or int8."""
    return _codes(_words(qweight).permute(0, 3, 1, 2).contiguous()).flatten(2).flatten(0, 1)


def dequantize_tiles(weight: Planes, first: int, last: int) -> Tensor:
    """Row tiles first..last of a weight as float32 [rows, K], without the padding rows."""
    start, stop = first * ROWS, min(last * ROWS, weight.shape[0])
    codes = unpack(weight.qweight[first:last])[: stop - start].float()
    step = weight.scales[first:last].transpose(1, 2).flatten(0, 1)[: stop - start] * weight.row_scale[start:stop, None]
    out = codes.view(*step.shape, weight.group_size) * step[..., None]
    if weight.mins is not None and weight.row_min is not None:
        mins = weight.mins[first:last].transpose(1, 2).flatten(0, 1)[: stop - start]
        out -= (mins * weight.row_min[start:stop, None])[..., None]
    return out.flatten(1)


def dequantize_rows(weight: Planes, index: Tensor) -> Tensor:
    """Rows `index` [R] (0 <= index < N) as float32 [R, K]; reads only these rows."""
    tile, row = index // ROWS, index % ROWS
    codes = _codes(_words(weight.qweight)[tile, :, :, row]).flatten(1).float()
    step = weight.scales[tile, :, row] * weight.row_scale[index, None]
    out = codes.view(*step.shape, weight.group_size) * step[..., None]
    if weight.mins is not None and weight.row_min is not None:
        out -= (weight.mins[tile, :, row] * weight.row_min[index, None])[..., None]
    return out.flatten(1)


class ReferenceBackend:
    """Dequantizes a few rows at a time and multiplies in float32; any device, differentiable in x."""

    name = "reference"
    repacks = False

    def supports(self, weight: Planes) -> bool:
        return True

    def prepack(self, weight: Planes) -> Planes:
        return weight

    def unpack(self, packed: Planes) -> Planes:
        return packed

    def matmul(self, x: Tensor, packed: Planes, bias: Tensor | None, splits: int = 1) -> Tensor:
        """x [M, K] -> [M, N] in x.dtype; x is not rounded, so `splits` means nothing here."""
        k = packed.shape[1]
        tiles, rows = packed.qweight.shape[0], x.float()
        step = max(1, SCRATCH_ELEMENTS // (k * ROWS))
        columns = [rows @ dequantize_tiles(packed, t, min(t + step, tiles)).T for t in range(0, tiles, step)]
        out = torch.cat(columns, dim=1) if len(columns) != 1 else columns[0]
        return (out if bias is None else out + bias).to(x.dtype)
