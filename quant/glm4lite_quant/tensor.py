"""One quantized weight: the ways in and out of the format, and its checks."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from glm4lite_quant.config import BITS, GROUP_SIZES, MINMAX, QuantConfig, QuantError
from glm4lite_quant.format import COLS, NAMES, ROWS, SCRATCH_ELEMENTS, TILE_BYTES, Codes, Planes, not_finite
from glm4lite_quant.inputs import Inputs
from glm4lite_quant.kernels import calibrated, native, reference
from glm4lite_quant.pages import HUGE, zeros


class QuantTensor(Planes):
    """A weight [N, K], which is filled by quantizing rows, or from tensors as they are stored."""

    @classmethod
    def of(cls, planes: Planes) -> QuantTensor:
        """The same tensors; itself where it is one already."""
        return planes if isinstance(planes, cls) else cls(*(getattr(planes, name) for name in NAMES))

    @classmethod
    def empty(cls, n: int, k: int, config: QuantConfig, device: str | torch.device = "cpu") -> QuantTensor:
        """A zero weight to be filled by `quantize_rows` (on "meta": shapes only)."""
        if n < 1 or k < 1 or k % config.group_size:
            raise QuantError(f"a weight of {n} x {k} cannot be quantized in groups of {config.group_size} columns")
        tiles, affine = -(-n // ROWS), config.bits < 8
        planes = [_plane((tiles, k // config.group_size, ROWS), device) for _ in range(2)]
        rows = [torch.zeros(n, dtype=torch.float32, device=device) for _ in range(2)]
        codes = _plane((tiles, k // COLS, TILE_BYTES * config.bits), device)
        return cls(codes, planes[0], planes[1] if affine else None, rows[0], rows[1] if affine else None)

    @classmethod
    def quantize(cls, weight: Tensor, config: QuantConfig) -> QuantTensor:
        """Quantizes bfloat16 or float32 [N, K] by its values alone; QuantError for other types, NaN, odd K."""
        if weight.dim() != 2:
            raise QuantError(f"a weight has shape {tuple(weight.shape)}; only matrices can be quantized")
        out = cls.empty(weight.shape[0], weight.shape[1], config, weight.device)
        out.quantize_rows(0, weight, fast=config.method == MINMAX)
        return out

    def quantize_rows(self, start: int, weight: Tensor, inputs: Inputs | None = None, fast: bool = False) -> None:
        """Fills rows start.. from bfloat16 or float32 [R, K]; start and R are multiples of 16 (R may end at N instead).

        inputs: what the weight is multiplied with; affine codes then make the error of the output small instead of that
            of the weight (int8 needs none). fast: a group's whole range, no search.

        Raises QuantError for a shape or type that does not fit and for a value that is not finite, naming its place.
        """
        n, k = self.shape
        stop = start + weight.shape[0]
        if weight.dim() != 2 or weight.shape[1] != k or start < 0 or stop > n:
            raise QuantError(f"rows {start}.. of shape {tuple(weight.shape)} do not fit a weight of {n} x {k}")
        if start % ROWS or (stop % ROWS and stop != n):
            raise QuantError(f"rows {start} to {stop} do not begin and end at multiples of {ROWS} (or at {n})")
        if weight.dtype not in (torch.bfloat16, torch.float32):
            raise QuantError(f"a weight has dtype {weight.dtype}; convert it to bfloat16 or float32")
        if stop == start:
            return
        given = None if inputs is None or self.bits == 8 else inputs.normalized(k, self.group_size)
        how = native.Search(1 if fast else len(reference.SHARES), given)
        target, source = self.tiles(start, stop), weight.detach().to(self.device)
        if not native.quantize(source, target, how, start):
            target._quantize_reference(source, start, how)

    def take_codes(self, start: int, codes: Codes) -> Tensor:
        """Fills rows start.. of an int4 weight with another tool's codes; only their scales are rounded to bytes.

        Rows are as in `quantize_rows`, groups as large as this weight's.

        Returns bool [R]: the rows whose rounded scales would cost more than a tenth of what rounding to these codes
        has cost (a minimum above zero, a group far larger than its row's others). Those are better quantized anew.

        Raises QuantError for shapes that do not fit and for a step or minimum that is not finite, naming its row.
        """
        n, k = self.shape
        stop, groups = start + codes.values.shape[0], k // self.group_size
        shape = (stop - start, groups)
        if self.bits != 4 or codes.values.shape[1] != k or codes.step.shape != shape or codes.low.shape != shape:
            what = f"codes of {list(codes.values.shape)} with steps of {list(codes.step.shape)}"
            raise QuantError(f"{what} do not fit an int{self.bits} weight of {n} x {k} in groups of {self.group_size}")
        if start % ROWS or not 0 <= start < stop <= n or (stop % ROWS and stop != n):
            raise QuantError(f"rows {start} to {stop} do not begin and end at multiples of {ROWS} (or at {n})")
        for what, plane in (("step", codes.step), ("minimum", codes.low)):
            if not float(plane.abs().max()) <= reference.HUGE:  # NaN too
                row = int((~(plane.abs() <= reference.HUGE)).nonzero()[0][0])
                value = float(plane[row].abs().max())
                raise QuantError(f"the {what} of row {start + row} is {value:g}: not a number that codes can have")
        planes, lost = reference.kept(codes)
        for name, old in self.tiles(start, stop).tensors().items():
            old.copy_(getattr(planes, name))
        return lost > codes.step.square().mean(1) * (reference.KEPT_SHARE / 12)

    def _quantize_reference(self, weight: Tensor, first_row: int, how: native.Search = native.SEARCH) -> None:
        n, k = self.shape
        step = max(ROWS, SCRATCH_ELEMENTS // k // ROWS * ROWS)
        for start in range(0, n, step):
            stop = min(start + step, n)
            rows = weight[start:stop].float()
            bad = ~(rows.abs() <= reference.HUGE)
            if bool(bad.any()):
                row, col = (int(i) for i in bad.nonzero()[0])
                raise QuantError(not_finite(first_row + start + row, col, float(rows[row, col])))
            if how.inputs is None:
                planes = reference.quantize(rows, self.bits, self.group_size, how.shares)
            else:
                planes = calibrated.quantize(rows, self.bits, self.group_size, how.inputs.to(self.device))
            part = self.tiles(start, stop)
            for name, old in part.tensors().items():
                old.copy_(getattr(planes, name))

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The whole weight [N, K]; float32 scratch stays within a few MiB."""
        out = torch.empty(self.shape, dtype=dtype, device=self.device)
        tiles, step = self.qweight.shape[0], max(1, SCRATCH_ELEMENTS // (self.shape[1] * ROWS))
        for first in range(0, tiles, step):
            part = reference.dequantize_tiles(self, first, min(first + step, tiles))
            out[first * ROWS : first * ROWS + part.shape[0]] = part
        return out

    def rows(self, index: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Rows `index` (any shape [...]) as [..., K]; only these rows are read. IndexError outside 0..N-1."""
        flat = index.reshape(-1).to(self.device)
        if flat.device.type == "cpu" and flat.numel() and not 0 <= int(flat.min()) <= int(flat.max()) < self.shape[0]:
            raise IndexError(f"row {int(flat.min())} or {int(flat.max())} is outside 0..{self.shape[0] - 1}")
        return reference.dequantize_rows(self, flat).to(dtype).reshape(*index.shape, self.shape[1])

    @classmethod
    def from_tensors(cls, d: Mapping[str, Tensor]) -> QuantTensor:
        """Takes tensors as a checkpoint names them, without copying; QuantError names the one that is wrong."""
        for name in ("qweight", "scales", "row_scale"):
            if name not in d:
                raise QuantError(f"{name} is missing from a quantized weight (found: {', '.join(sorted(d))})")
        for name in sorted(d.keys() - set(NAMES)):
            raise QuantError(f"{name} is not part of a quantized weight")
        out = cls(d["qweight"], d["scales"], d.get("mins"), d["row_scale"], d.get("row_min"))
        out._check()
        return out

    def check_finite(self) -> None:
        """Raises QuantError where the scale or minimum of a row is none that quantizing gives (the codes are bytes)."""
        for name, plane in self.tensors().items():
            if name.startswith("row_") and not float(plane.abs().max()) <= reference.HUGE:
                row = int((~(plane.abs() <= reference.HUGE)).nonzero()[0])
                raise QuantError(f"{name} is {float(plane[row]):g} at row {row}, which no weight has")

    def _check(self) -> None:
        for name, t in self.tensors().items():
            dtype, dims = (torch.float32, 1) if name.startswith("row_") else (torch.uint8, 3)
            if t.dtype != dtype or t.dim() != dims:
                raise QuantError(f"{name} is {t.dtype} {list(t.shape)}; expected {dtype} with {dims} dimension(s)")
            if not t.is_contiguous():
                raise QuantError(f"{name} is not contiguous")
            if t.device != self.device:
                raise QuantError(f"{name} is on {t.device} but qweight on {self.device}")
        tiles, blocks, size = self.qweight.shape
        if size not in [TILE_BYTES * bits for bits in BITS] or blocks == 0:
            sizes = f"[tiles, K/32, {TILE_BYTES} times one of {', '.join(map(str, BITS))}]"
            raise QuantError(f"qweight has shape {list(self.qweight.shape)}; expected {sizes}")
        n, groups = self.row_scale.shape[0], self.scales.shape[1]
        if n < 1 or tiles != -(-n // ROWS):
            raise QuantError(f"row_scale has {n} rows but qweight {tiles} tiles of {ROWS}")
        if groups == 0 or blocks * COLS % groups or blocks * COLS // groups not in GROUP_SIZES:
            raise QuantError(f"scales has {groups} groups for {blocks * COLS} columns; groups are of 32, 64 or 128")
        self._check_planes(tiles, groups, n)

    def _check_planes(self, tiles: int, groups: int, n: int) -> None:
        affine = self.bits < 8
        for name, t in (("mins", self.mins), ("row_min", self.row_min)):
            if (t is not None) != affine:
                raise QuantError(f"{name} is {'missing from' if affine else 'not part of'} an int{self.bits} weight")
        planes = {"scales": (tiles, groups, ROWS), "mins": (tiles, groups, ROWS), "row_min": (n,)}
        for name, t in self.tensors().items():
            if name in planes and tuple(t.shape) != planes[name]:
                raise QuantError(f"{name} has shape {list(t.shape)}; expected {list(planes[name])}")


def _plane(shape: tuple[int, int, int], device: str | torch.device) -> Tensor:
    """uint8 zeros; large ones of a CPU in huge pages."""
    nbytes = math.prod(shape)
    if torch.device(device).type == "cpu" and nbytes >= HUGE:
        return zeros(nbytes).view(shape)
    return torch.zeros(shape, dtype=torch.uint8, device=device)
