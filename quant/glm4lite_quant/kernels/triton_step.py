"""What lies between the products of a decoder layer on a GPU, for one token, in Triton. Imported on first use.

All of it is asynchronous and reads lengths from the GPU's memory, so that a CUDA graph can replay it.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from glm4lite_quant.kernels import triton_step_kernels as kernels
from glm4lite_quant.kernels.decoder import CacheView, Heads
from glm4lite_quant.kernels.triton_gpu import INTERPRETED

PARTS = 128  # programs that share a cache: about as many as a GPU has multiprocessors
BLOCK = 64  # tokens of the cache at a time
SWIGLU_BLOCK = 1024
TYPES = {torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


def problem(heads: Heads) -> str:
    """Why the kernels have no code for attention of this shape, "" where they have."""
    if heads.dim & (heads.dim - 1) or heads.dim < 16:
        return f"its heads have {heads.dim} dimensions, not a power of two of at least 16"
    return ""


class AttentionScratch:
    """What the parts of one attention leave for each other; layers that run one after the other share it."""

    def __init__(self, heads: Heads, device: torch.device) -> None:
        self.heads, self.splits = heads, max(1, PARTS // heads.key_value)
        self.splits = 1 << (self.splits.bit_length() - 1)
        self.sums = torch.empty(self.splits, heads.query, heads.dim, device=device)
        self.tops, self.weights = (torch.empty(self.splits, heads.query, device=device) for _ in range(2))


def add_norm(
    x: Tensor, added: Tensor | None, post_weight: Tensor | None, weight: Tensor | None, eps: float, dtype: torch.dtype
) -> Tensor:
    """x [H] float32 += `added` [H], normed first where there is a `post_weight`; returns x normed with `weight`.

    The result has `dtype`, and is empty without `weight`.
    """
    out = torch.empty(x.shape[0] if weight is not None else 0, dtype=dtype, device=x.device)
    block = triton.next_power_of_2(x.shape[0])
    kernels.add_norm[(1,)](
        x,
        added,
        post_weight,
        weight,
        out,
        x.shape[0],
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
    length: Tensor,
    scratch: AttentionScratch,
) -> Tensor:
    """q [query * dim], k and v [kv * dim] -> [query * dim]: rotated (q in place), put into the cache, attended.

    `length` is an int32 on the GPU: tokens in the cache before this one (`cache.length` is not read). rotary: cos and
    sin [rotary_dim / 2]. The cache is in q's type, [kv_heads, capacity, head_dim], or int8 as `CacheView` says.
    """
    heads, splits = scratch.heads, scratch.splits
    codes = cache.key_scale is not None
    planes = (cache.keys, cache.values, cache.key_scale, cache.value_scale)
    kernels.rotate_store[(heads.query + 2 * heads.key_value,)](
        q,
        k,
        v,
        *rotary,
        *planes,
        length,
        cache.capacity,
        QUERIES=heads.query,
        HEADS=heads.key_value,
        DIM=heads.dim,
        ROTARY=heads.rotary_dim,
        CODES=codes,
        num_warps=1,
    )
    group = heads.query // heads.key_value
    kernels.attend[(heads.key_value, splits)](
        q,
        *planes,
        length,
        scratch.sums,
        scratch.tops,
        scratch.weights,
        cache.capacity,
        heads.dim**-0.5 * math.log2(math.e),
        SPLITS=splits,
        GROUP=group,
        ROWS=max(16, triton.next_power_of_2(group)),
        DIM=heads.dim,
        BLOCK=BLOCK,
        CODES=codes,
        FACTOR=tl.float32 if INTERPRETED else TYPES[q.dtype],
        num_warps=4,
        num_stages=2,
    )
    out = torch.empty_like(q)
    kernels.combine[(heads.query,)](
        scratch.sums, scratch.tops, scratch.weights, out, SPLITS=splits, DIM=heads.dim, num_warps=4
    )
    return out


def swiglu(gate_up: Tensor) -> Tensor:
    """gate_up [2 I], the gate first -> silu(gate) * up [I]."""
    size = gate_up.shape[0] // 2
    out = torch.empty(size, dtype=gate_up.dtype, device=gate_up.device)
    kernels.swiglu[(triton.cdiv(size, SWIGLU_BLOCK),)](gate_up, out, size, BLOCK=SWIGLU_BLOCK, num_warps=4)
    return out
