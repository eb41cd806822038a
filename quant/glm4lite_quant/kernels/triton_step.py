"""What lies between the products of a decoder layer on a GPU, for the rows of a step, in Triton. Imported on first use.

All of it is asynchronous and reads from the GPU's memory which rows there are, so that a CUDA graph can replay it.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from glm4lite_quant.kernels import triton_step_kernels as kernels
from glm4lite_quant.kernels.decoder import BLOCK, CacheView, Heads
from glm4lite_quant.kernels.step_rows import StepRows
from glm4lite_quant.kernels.triton_gpu import INTERPRETED

PARTS = 256  # programs of an attention: about twice as many as a GPU has multiprocessors
MOST_SPLITS, LEAST_SPLITS = 64, 8  # parts of a sequence; a long one beside short ones needs some, however many rows
SWIGLU_BLOCK = 1024
TYPES = {torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


def problem(heads: Heads) -> str:
    """Why the kernels have no code for attention of this shape, "" where they have."""
    if heads.dim & (heads.dim - 1) or heads.dim < 16:
        return f"its heads have {heads.dim} dimensions, not a power of two of at least 16"
    return ""


def attend_stages(dtype: torch.dtype) -> int:
    """Blocks of the cache that are on their way at once: two of float32 leave no room on a consumer's card."""
    return 1 if dtype == torch.float32 else 2


class AttentionScratch:
    """What the parts of one attention leave for each other; layers that run one after the other share it."""

    def __init__(self, heads: Heads, rows: int, device: torch.device) -> None:
        splits = min(MOST_SPLITS, max(LEAST_SPLITS, PARTS // (heads.key_value * rows)))
        self.heads, self.splits = heads, 1 << (splits.bit_length() - 1)
        shape = (self.splits, rows, heads.query)
        self.sums = torch.empty(*shape, heads.dim, device=device)
        self.tops, self.weights = (torch.empty(shape, device=device) for _ in range(2))


def add_norm(
    x: Tensor, added: Tensor | None, post_weight: Tensor | None, weight: Tensor | None, eps: float, dtype: torch.dtype
) -> Tensor:
    """x [rows, H] float32 += `added` [rows, H], normed first where there is a `post_weight`; returns x normed with
    `weight`.

    The result has `dtype`, and is empty without `weight`.
    """
    rows, size = x.shape
    out = torch.empty(rows if weight is not None else 0, size, dtype=dtype, device=x.device)
    block = triton.next_power_of_2(size)
    kernels.add_norm[(rows,)](
        x,
        added,
        post_weight,
        weight,
        out,
        size,
        eps,
        BLOCK=block,
        TYPE=TYPES[dtype],
        num_warps=min(16, max(1, block // 512)),
    )
    return out


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rotary: tuple[Tensor, Tensor],
    cache: CacheView,
    rows: StepRows,
    scratch: AttentionScratch,
) -> Tensor:
    """q [rows, query * dim], k and v [rows, kv * dim] -> [rows, query * dim]: rotated (q in place), put into the cache,
    attended; 0 for padding.

    `rows` says whose each is; the cache's length and table are not read. rotary: cos and sin [rows, rotary_dim / 2].
    The cache is in q's type or int8, as `CacheView` says.
    """
    heads, splits, size = scratch.heads, scratch.splits, rows.size
    codes = cache.key_scale is not None
    planes = (cache.keys, cache.values, cache.key_scale, cache.value_scale)
    kernels.rotate_store[(heads.query + 2 * heads.key_value, size)](
        q,
        k,
        v,
        *rotary,
        *planes,
        rows.memory,
        *cache.strides,
        QUERIES=heads.query,
        HEADS=heads.key_value,
        DIM=heads.dim,
        ROTARY=heads.rotary_dim,
        BLOCK=BLOCK,
        CODES=codes,
        num_warps=1,
    )
    group = heads.query // heads.key_value
    kernels.attend[(size, heads.key_value, splits)](
        q,
        *planes,
        rows.memory,
        scratch.sums,
        scratch.tops,
        scratch.weights,
        *cache.strides,
        heads.dim**-0.5 * math.log2(math.e),
        SPLITS=splits,
        GROUP=group,
        QUERIES=max(16, triton.next_power_of_2(group * rows.tile)),
        DIM=heads.dim,
        BLOCK=BLOCK,
        CODES=codes,
        FACTOR=tl.float32 if INTERPRETED else TYPES[q.dtype],
        num_warps=4,
        num_stages=attend_stages(q.dtype),
    )
    out = torch.empty_like(q)
    kernels.combine[(heads.query, size)](
        scratch.sums, scratch.tops, scratch.weights, rows.memory, out, SPLITS=splits, DIM=heads.dim, num_warps=4
    )
    return out


def swiglu(gate_up: Tensor) -> Tensor:
    """gate_up [rows, 2 I], the gate first -> silu(gate) * up [rows, I]."""
    rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(rows, size, dtype=gate_up.dtype, device=gate_up.device)
    kernels.swiglu[(triton.cdiv(size, SWIGLU_BLOCK), rows)](gate_up, out, size, BLOCK=SWIGLU_BLOCK, num_warps=4)
    return out
