"""Products with quantized weights on a GPU, in Triton: which kernel with which settings. Imported on first use.

No weight is packed anew: the kernels (`triton_kernels`) read the tiles where they are, so a weight
lies on the GPU once, in the bytes of its file, and can be saved from there.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from glm4lite_quant.config import QuantConfig, QuantError
from glm4lite_quant.format import ROWS, Planes
from glm4lite_quant.kernels import reference
from glm4lite_quant.kernels import triton_kernels as kernels

GEMV_TOKENS = 8  # up to here a code is multiplied in the registers where it was decoded
DENSE_TOKENS = 256  # from here on a weight is decoded once, for torch's own matmul
SCRATCH_BYTES = 128 << 20  # of a weight that is decoded so, at most
MAX_ROWS = 65535 * ROWS  # tiles are the second dimension of a launch
SIXTEEN, TWO_FIFTY_SIX = 0x41800000, 0x43800000  # the bits of 16.0 and 256.0
INTERPRETED = not isinstance(kernels.gemv, triton.JITFunction)  # TRITON_INTERPRET=1: on the CPU, for tests


@dataclass(frozen=True)
class Gemv:
    """Warps that share 16 rows, each with 8 blocks of 32 columns at a time, and how many turns are loaded ahead."""

    warps: int
    stages: int


@dataclass(frozen=True)
class Gemm:
    """A tile of the output: `tokens` x 16 * `tiles`, from 32 * `blocks` columns at a time."""

    tokens: int
    tiles: int
    blocks: int
    warps: int
    stages: int


# (bits, N, K) of the 9B and the 32B. A tile of 4096 columns is 32 KiB of int4: eight warps have all of it on its way at
# once, which 4096 rows need (two tiles on each of an H200's multiprocessors) and 27392 do not. Derived, not yet
# measured: `python -m bench.gpu --tune` prints the fastest of all.
GEMV: Mapping[tuple[int, int, int], Gemv] = {
    (4, 4096, 4096): Gemv(8, 3),
    (4, 4096, 13696): Gemv(8, 3),
    (4, 27392, 4096): Gemv(4, 3),
    (8, 256, 4096): Gemv(8, 3),
    (8, 151552, 4096): Gemv(4, 3),
    (4, 6144, 6144): Gemv(8, 3),
    (4, 6144, 23040): Gemv(8, 3),
    (4, 46080, 6144): Gemv(4, 3),
    (8, 256, 6144): Gemv(8, 3),
    (8, 1024, 6144): Gemv(8, 3),
    (8, 151552, 6144): Gemv(4, 3),
}
GEMM = (Gemm(16, 4, 2, 4, 3), Gemm(32, 4, 2, 4, 3), Gemm(64, 4, 2, 4, 3), Gemm(128, 8, 2, 8, 3))  # by tokens


def gemv_config(bits: int, n: int, k: int) -> Gemv:
    """How one to eight tokens are multiplied: the table's row, or for other shapes eight warps where tiles are few."""
    return GEMV.get((bits, n, k)) or Gemv(8 if n <= 8192 else 4, 3)


def gemm_config(tokens: int) -> Gemm:
    return next((config for config in GEMM if tokens <= config.tokens), GEMM[-1])


@dataclass(frozen=True)
class Packed:
    """A weight as the kernels take it; `words` is a view of `weight.qweight`, not a copy."""

    words: Tensor  # int32
    weight: Planes

    def planes(self) -> tuple[Tensor | None, ...]:
        w = self.weight
        return self.words, w.scales, w.mins, w.row_scale, w.row_min


class TritonBackend:
    """The kernels above; x is neither rounded nor cast, sums are float32, and a result is the same at every run.

    From 9 tokens on bfloat16 inputs meet weights that are rounded to bfloat16; float32 inputs never do.
    """

    name = "triton"
    repacks = False

    def supports(self, weight: Planes) -> bool:
        whole = all(t.is_contiguous() for t in weight.tensors().values())
        return weight.device.type == "cuda" and whole and weight.shape[0] <= MAX_ROWS

    def prepack(self, weight: Planes) -> Packed:
        return Packed(weight.qweight.view(torch.int32), weight)

    def unpack(self, packed: Packed) -> Planes:
        return packed.weight

    def matmul(self, x: Tensor, packed: Packed, bias: Tensor | None, splits: int = 1) -> Tensor:
        """x [M, K] bfloat16 or float32 -> [M, N] in x.dtype; x stays what it is, so `splits` means nothing here."""
        if x.device != packed.words.device:
            raise QuantError(f"the input of a layer is on {x.device} but its weight on {packed.words.device}")
        x = x.detach() if x.stride(-1) == 1 else x.detach().contiguous()
        tokens, n = x.shape[0], packed.weight.shape[0]
        out = torch.empty(tokens, n, dtype=x.dtype, device=x.device)
        with _device(x):
            if tokens == 0:
                pass
            elif tokens <= GEMV_TOKENS:
                gemv(x, packed, bias, out, gemv_config(packed.weight.bits, *packed.weight.shape))
            elif x.dtype == torch.bfloat16 and tokens < DENSE_TOKENS:
                gemm(x, packed, bias, out, gemm_config(tokens))
            else:
                dense(x, packed, bias, out)
        return out


def gemv(x: Tensor, packed: Packed, bias: Tensor | None, out: Tensor, config: Gemv) -> None:
    """out [M, N] = x [M, K] W^T + bias for few tokens; they share one pass over the weight in fours."""
    n, k = packed.weight.shape
    at_once, blocks = min(4, triton.next_power_of_2(x.shape[0])), 8 * config.warps
    kernels.gemv[(triton.cdiv(x.shape[0], at_once), triton.cdiv(n, ROWS))](
        x,
        *packed.planes(),
        bias,
        out,
        x.shape[0],
        n,
        k,
        x.stride(0),
        SIXTEEN,
        TWO_FIFTY_SIX,
        BITS=packed.weight.bits,
        GROUP=packed.weight.group_size,
        TOKENS=at_once,
        BLOCKS=blocks,
        WHOLE=k % (32 * blocks) == 0,
        STAGES=config.stages if at_once == 1 else 2,
        num_warps=config.warps,
        enable_fp_fusion=True,
    )


def gemm(x: Tensor, packed: Packed, bias: Tensor | None, out: Tensor, config: Gemm) -> None:
    """out [M, N] = x [M, K] W^T + bias, bfloat16, the weight decoded again for every tile of tokens."""
    n, k = packed.weight.shape
    kernels.gemm[(triton.cdiv(x.shape[0], config.tokens), triton.cdiv(n, ROWS * config.tiles))](
        x,
        *packed.planes(),
        bias,
        out,
        x.shape[0],
        n,
        k,
        x.stride(0),
        BITS=packed.weight.bits,
        GROUP=packed.weight.group_size,
        TOKENS=config.tokens,
        TILES=config.tiles,
        BLOCKS=config.blocks,
        FACTOR=tl.float32 if INTERPRETED else tl.bfloat16,
        num_warps=config.warps,
        num_stages=config.stages,
        enable_fp_fusion=True,
    )


def dense(x: Tensor, packed: Packed, bias: Tensor | None, out: Tensor) -> None:
    """out [M, N] = x [M, K] W^T + bias with torch's matmul, over decoded rows that take at most SCRATCH_BYTES."""
    n, k = packed.weight.shape
    turns = -(-n * k * x.element_size() // SCRATCH_BYTES)
    rows = -(-n // turns // 256) * 256
    scratch = torch.empty(min(rows, n), k, dtype=x.dtype, device=x.device)
    for start in range(0, n, rows):
        part = scratch[: min(rows, n - start)]
        decode(packed, start // ROWS, part)
        torch.mm(x, part.T, out=out[:, start : start + part.shape[0]])
    if bias is not None:
        out += bias


def decode(packed: Packed, first: int, out: Tensor) -> None:
    """The weight's rows from tile `first` on into out [R, K], float32 or bfloat16."""
    k = packed.weight.shape[1]
    kernels.decode[(triton.cdiv(out.shape[0], ROWS), triton.cdiv(k, 512))](
        *packed.planes(),
        out,
        first,
        first * ROWS + out.shape[0],
        k,
        BITS=packed.weight.bits,
        GROUP=packed.weight.group_size,
        TILES=1,
        BLOCKS=16,
        num_warps=4,
        enable_fp_fusion=True,
    )


def _device(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be x's."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else nullcontext()


@lru_cache(maxsize=16)
def problem(device: torch.device) -> str:
    """Why the kernels cannot run on a device, or "" where a first product came out right (a second or two, once)."""
    if device.type != "cuda":
        return f"not written for {device.type}"
    major, minor = torch.cuda.get_device_capability(device)
    if torch.version.hip is None and major < 8:
        return f"needs compute capability 8.0, {torch.cuda.get_device_name(device)} has {major}.{minor}"
    try:
        weight = reference.quantize(torch.eye(64, device=device), 4, QuantConfig(4).group_size)
        whole = reference.dequantize_tiles(weight, 0, weight.qweight.shape[0])
        x = torch.arange(64, dtype=torch.float32, device=device).expand(1, 64).contiguous()
        backend = TritonBackend()
        got, want = backend.matmul(x, backend.prepack(weight), None), x @ whole.T
        right = bool(torch.allclose(got, want, rtol=1e-4, atol=1e-3))
    except Exception as error:  # no C compiler, no ptxas for this card, a driver too old: each has a type of its own
        text = str(error).strip()
        return f"triton {triton.__version__} cannot run here ({text.splitlines()[0] if text else type(error).__name__})"
    return "" if right else f"triton {triton.__version__} computes wrong products here"
