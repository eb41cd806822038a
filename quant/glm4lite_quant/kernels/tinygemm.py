"""torch's own CUDA kernel for int4 (`_weight_int4pack_mm`, "tinygemm"): the fallback where there is no Triton."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from glm4lite_quant.config import QuantConfig, QuantError
from glm4lite_quant.format import Planes
from glm4lite_quant.kernels import reference

K_TILE, N_TILE = 16, 8
ROWS_AT_ONCE = 1024  # of the identity that codes are read back with


@dataclass(frozen=True)
class Packed:
    """torch's layout of the codes, its scales, and everything of the weight but the codes (`qweight` is on meta)."""

    codes: Tensor  # int32
    scales_and_zeros: Tensor  # bfloat16 [K/g, N, 2]
    weight: Planes


class TinygemmBackend:
    """bfloat16 in, bfloat16 out, each group's scale and zero rounded to bfloat16 (8 bits; the format has 8 + 24).

    float32 inputs are rounded to bfloat16 too. The codes are packed anew, so the layer drops its own: 5.5 bits a weight
    in groups of 32 instead of 4.5.
    """

    name = "tinygemm"
    repacks = True

    def supports(self, weight: Planes) -> bool:
        n, k = weight.shape
        fits = weight.bits == 4 and n % N_TILE == 0 and k % (2 * K_TILE) == 0
        return fits and weight.device.type == "cuda"

    def prepack(self, weight: Planes) -> Packed:
        codes = torch._convert_weight_to_int4pack(pairs(weight), _inner_tiles(weight.shape[1]))
        return Packed(codes, scales_and_zeros(weight), replace(weight, qweight=weight.qweight.to("meta")))

    def unpack(self, packed: Packed) -> Planes:
        """The weight with its codes, read back by multiplying the identity with scale 1 and zero 8."""
        n, k = packed.weight.shape
        device = packed.codes.device
        plain = torch.tensor([1.0, 8.0], dtype=torch.bfloat16, device=device).expand(k // 32, n, 2).contiguous()
        codes = torch.empty(n, k, dtype=torch.uint8, device=device)
        for start in range(0, k, ROWS_AT_ONCE):
            one = torch.arange(start, min(start + ROWS_AT_ONCE, k), device=device)
            unit = torch.zeros(len(one), k, dtype=torch.bfloat16, device=device)
            unit[torch.arange(len(one), device=device), one] = 1
            codes[:, one] = torch._weight_int4pack_mm(unit, packed.codes, 32, plain).T.to(torch.uint8)
        return replace(packed.weight, qweight=reference.tile_codes(codes, 4))

    def matmul(self, x: Tensor, packed: Packed, bias: Tensor | None, splits: int = 1) -> Tensor:
        """x [M, K] -> [M, N] in x.dtype; `splits` means nothing here."""
        if x.device != packed.codes.device:
            raise QuantError(f"the input of a layer is on {x.device} but its weight on {packed.codes.device}")
        rows = x.detach().to(torch.bfloat16).contiguous()
        if rows.shape[0] == 0:
            return x.new_empty(0, packed.weight.shape[0])
        out = torch._weight_int4pack_mm(rows, packed.codes, packed.weight.group_size, packed.scales_and_zeros)
        return (out if bias is None else out + bias).to(x.dtype)


def pairs(weight: Planes) -> Tensor:
    """The codes as torch packs them from: uint8 [N, K/2], the even column in the high half."""
    codes = reference.unpack(weight.qweight)[: weight.shape[0]]
    return (codes[:, ::2] << 4) | codes[:, 1::2]


def scales_and_zeros(weight: Planes) -> Tensor:
    """bfloat16 [K/g, N, 2] of w = (code - 8) * scale + zero."""
    if weight.mins is None or weight.row_min is None:
        raise QuantError("only int4 weights have the minima that torch's int4 kernel needs")
    step, low = (
        plane.transpose(1, 2).flatten(0, 1)[: weight.shape[0]] * row[:, None]
        for plane, row in ((weight.scales, weight.row_scale), (weight.mins, weight.row_min))
    )
    return torch.stack((step, 8 * step - low), dim=2).transpose(0, 1).to(torch.bfloat16).contiguous()


def _inner_tiles(k: int) -> int:
    return next(inner for inner in (8, 4, 2) if k % (inner * K_TILE) == 0)


@lru_cache(maxsize=16)
def problem(device: torch.device) -> str:
    """Why torch's kernel cannot run on a device, or "" where a first product came out right."""
    if device.type != "cuda":
        return f"not written for {device.type}"
    try:
        weight = reference.quantize(torch.eye(128, device=device), 4, QuantConfig(4).group_size)
        whole = reference.dequantize_tiles(weight, 0, weight.qweight.shape[0])
        backend = TinygemmBackend()
        packed, x = backend.prepack(weight), torch.arange(128, device=device).to(torch.bfloat16).expand(1, 128)
        got, want = backend.matmul(x, packed, None), x.float() @ whole.T
        right = bool(torch.allclose(got.float(), want, rtol=2e-2, atol=2.0))
        right &= torch.equal(backend.unpack(packed).qweight, weight.qweight)
    except Exception as error:  # RuntimeError, NotImplementedError, AttributeError: an operator that this build lacks
        text = str(error).strip()
        return f"torch's int4 kernel cannot run here ({text.splitlines()[0] if text else type(error).__name__})"
    return "" if right else "torch's int4 kernel computes wrong products here"
