"""Any device's fallback: some rows of the weight become a matrix, torch multiplies with it, the next rows follow."""

from __future__ import annotations

import torch
from torch import Tensor

from glm4lite_quant.format import ROWS, SCRATCH_ELEMENTS, Planes
from glm4lite_quant.kernels.reference import dequantize_tiles


class DequantBackend:
    """Unlike the reference it multiplies in x's type, so that bfloat16 takes the device's fast matmul.

    The scratch is some six times SCRATCH_ELEMENTS of float32 (100 MiB), whatever the weight's size.
    """

    name = "dequant"
    repacks = False

    def supports(self, weight: Planes) -> bool:
        return True

    def prepack(self, weight: Planes) -> Planes:
        return weight

    def unpack(self, packed: Planes) -> Planes:
        return packed

    def matmul(self, x: Tensor, packed: Planes, bias: Tensor | None, splits: int = 1) -> Tensor:
        """x [M, K] -> [M, N] in x.dtype; with bfloat16 the weight is rounded to it. `splits` means nothing here."""
        n, k = packed.shape
        out = torch.empty(x.shape[0], n, dtype=x.dtype, device=x.device)
        tiles, step = packed.qweight.shape[0], max(1, SCRATCH_ELEMENTS // (k * ROWS))
        for first in range(0, tiles, step):
            rows = dequantize_tiles(packed, first, min(first + step, tiles)).to(x.dtype)
            out[:, first * ROWS : first * ROWS + rows.shape[0]] = x.detach() @ rows.T
        return out if bias is None else out.add_(bias)
