"""The Triton kernels between the products of a decoder layer, for one token: what `triton_step` launches.

Norms with the residual stream, rotation with the write into the cache, attention over the cache in parts, SwiGLU. How
many tokens the cache holds is read from the GPU's memory, so that a recorded graph serves every length.

A cache is [heads, capacity, DIM] in the activations' type; or CODES, which is int8 with a scale for each head and token
and has its keys in blocks of 16 tokens, [heads, capacity / 16, DIM, 16].
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _normed(value: tl.tensor, weight: tl.tensor, size: tl.tensor, eps: tl.tensor, TYPE: tl.constexpr) -> tl.tensor:
    """RMSNorm in float32, rounded to TYPE before the weight and after it, as the reference does."""
    normed = value * tl.rsqrt(tl.sum(value * value, axis=0) / size + eps)
    return (normed.to(TYPE).to(tl.float32) * weight).to(TYPE)


@triton.jit
def add_norm(
    x: tl.tensor,
    added: tl.tensor,
    post_weight: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    size: tl.tensor,
    eps: tl.tensor,
    BLOCK: tl.constexpr,
    TYPE: tl.constexpr,
) -> None:
    """x [size] float32 += added, itself normed where there is a `post_weight`; out = x normed with `weight`.

    Without `added` x stays, without `weight` nothing is written to `out`. One program.
    """
    column = tl.arange(0, BLOCK)
    held = column < size
    value = tl.load(x + column, mask=held, other=0)
    if added is not None:
        more = tl.load(added + column, mask=held, other=0).to(tl.float32)
        if post_weight is not None:
            post = tl.load(post_weight + column, mask=held, other=0).to(tl.float32)
            more = _normed(more, post, size, eps, TYPE).to(tl.float32)
        value += more
        tl.store(x + column, value, mask=held)
    if weight is not None:
        scale = tl.load(weight + column, mask=held, other=0).to(tl.float32)
        tl.store(out + column, _normed(value, scale, size, eps, TYPE), mask=held)


@triton.jit
def _key_at(token: tl.tensor, dim: tl.tensor, DIM: tl.constexpr, CODES: tl.constexpr) -> tl.tensor:
    """Where a head's key of a token has its dimension."""
    if CODES:
        return (token // 16 * DIM + dim) * 16 + token % 16
    return token * DIM + dim


@triton.jit
def _rounded(value: tl.tensor) -> tl.tensor:
    """To the nearest whole number, ties to even, for less than 2**22: what is added leaves no room for a fraction."""
    return value + 12582912.0 - 12582912.0


@triton.jit
def rotate_store(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    key_scale: tl.tensor,
    value_scale: tl.tensor,
    length: tl.tensor,
    capacity: tl.tensor,
    QUERIES: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    ROTARY: tl.constexpr,
    CODES: tl.constexpr,
) -> None:
    """One program a head: the QUERIES of q are rotated in place, the HEADS of k rotated into the cache, those of v put
    there. Adjacent pairs of the first ROTARY dimensions turn by cos and sin [ROTARY / 2]."""
    program = tl.program_id(0)
    token = tl.load(length).to(tl.int64)
    pair = tl.arange(0, DIM // 2)
    if program < QUERIES + HEADS:
        turned = pair < ROTARY // 2
        c = tl.where(turned, tl.load(cos + pair, mask=turned, other=0).to(tl.float32), 1.0)
        s = tl.load(sin + pair, mask=turned, other=0).to(tl.float32)
        source = q + program * DIM
        if program >= QUERIES:
            source = k + (program - QUERIES) * DIM
        even = tl.load(source + 2 * pair).to(tl.float32)
        odd = tl.load(source + 2 * pair + 1).to(tl.float32)
        first, second = even * c - odd * s, odd * c + even * s
        if program < QUERIES:
            tl.store(source + 2 * pair, first)
            tl.store(source + 2 * pair + 1, second)
        else:
            head = (program - QUERIES).to(tl.int64)
            if CODES:
                top = tl.maximum(tl.max(tl.abs(first)), tl.max(tl.abs(second)))
                inverse = tl.where(top < 1e-30, 0.0, 127.0 / top)
                first, second = _rounded(first * inverse), _rounded(second * inverse)
                tl.store(key_scale + head * capacity + token, top / 127.0)
            place = keys + head * capacity * DIM
            tl.store(place + _key_at(token, 2 * pair, DIM, CODES), first)
            tl.store(place + _key_at(token, 2 * pair + 1, DIM, CODES), second)
    else:
        head = (program - QUERIES - HEADS).to(tl.int64)
        dim = tl.arange(0, DIM)
        value = tl.load(v + head * DIM + dim).to(tl.float32)
        if CODES:
            top = tl.max(tl.abs(value))
            inverse = tl.where(top < 1e-30, 0.0, 127.0 / top)
            value = _rounded(value * inverse)
            tl.store(value_scale + head * capacity + token, top / 127.0)
        tl.store(values + (head * capacity + token) * DIM + dim, value)


@triton.jit
def attend(
    q: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    key_scale: tl.tensor,
    value_scale: tl.tensor,
    length: tl.tensor,
    sums: tl.tensor,
    tops: tl.tensor,
    weights: tl.tensor,
    capacity: tl.tensor,
    scale: tl.tensor,
    SPLITS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    CODES: tl.constexpr,
    FACTOR: tl.constexpr,
) -> None:
    """One program: one key/value head over one of SPLITS parts of the cache; its GROUP queries are the rows of a tile.

    The cache holds `length` tokens and this one. Out: the parts' sums without a denominator [SPLITS, heads, DIM], the
    largest score `tops` (base 2) and `weights`, the sum of the exponentials, both [SPLITS, heads]; `combine` puts them
    together. Scores and sums are float32; FACTOR is the type that products take, float32 in the interpreter.
    """
    head, split, heads = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(0) * GROUP
    total = tl.load(length) + 1
    part = tl.cdiv(tl.cdiv(total, SPLITS), BLOCK) * BLOCK
    begin = split * part
    end = tl.minimum(begin + part, total)
    row, dim = tl.arange(0, ROWS), tl.arange(0, DIM)
    query = tl.load(q + (head * GROUP + row)[:, None] * DIM + dim[None, :], mask=(row < GROUP)[:, None], other=0)
    keys += head * capacity * DIM
    values += head * capacity * DIM
    top = tl.full((ROWS,), -float("inf"), tl.float32)
    weight = tl.zeros((ROWS,), tl.float32)
    sum_ = tl.zeros((ROWS, DIM), tl.float32)
    for start in range(begin, end, BLOCK):
        token = start + tl.arange(0, BLOCK)
        held = token < end
        key = tl.load(keys + _key_at(token[None, :], dim[:, None], DIM, CODES), mask=held[None, :], other=0)
        score = tl.dot(query.to(FACTOR), key.to(FACTOR), input_precision="ieee") * scale
        if CODES:
            score *= tl.load(key_scale + head * capacity + token, mask=held, other=0)[None, :]
        score = tl.where(held[None, :], score, -float("inf"))
        higher = tl.maximum(top, tl.max(score, axis=1))
        fade, chance = tl.exp2(top - higher), tl.exp2(score - higher[:, None])
        weight = weight * fade + tl.sum(chance, axis=1)
        if CODES:
            chance *= tl.load(value_scale + head * capacity + token, mask=held, other=0)[None, :]
        value = tl.load(values + token[:, None] * DIM + dim[None, :], mask=held[:, None], other=0)
        sum_ = sum_ * fade[:, None] + tl.dot(chance.to(FACTOR), value.to(FACTOR), input_precision="ieee")
        top = higher
    at = split * heads + head * GROUP + row
    tl.store(tops + at, top, mask=row < GROUP)
    tl.store(weights + at, weight, mask=row < GROUP)
    tl.store(sums + at[:, None] * DIM + dim[None, :], sum_, mask=(row < GROUP)[:, None])


@triton.jit
def combine(
    sums: tl.tensor, tops: tl.tensor, weights: tl.tensor, out: tl.tensor, SPLITS: tl.constexpr, DIM: tl.constexpr
) -> None:
    """One program a query head: out [heads, DIM] from what `attend` left of each part; empty parts count nothing."""
    head, heads = tl.program_id(0), tl.num_programs(0)
    at, dim = tl.arange(0, SPLITS) * heads + head, tl.arange(0, DIM)
    top = tl.load(tops + at)
    share = tl.exp2(top - tl.max(top))
    total = tl.sum(share * tl.load(weights + at))
    parts = tl.load(sums + at[:, None] * DIM + dim[None, :])
    tl.store(out + head * DIM + dim, tl.sum(parts * share[:, None], axis=0) / total)


@triton.jit
def swiglu(gate_up: tl.tensor, out: tl.tensor, size: tl.tensor, BLOCK: tl.constexpr) -> None:
    """out [size] = silu(gate) * up; gate_up [2 * size], the gate first."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    held = column < size
    gate = tl.load(gate_up + column, mask=held, other=0).to(tl.float32)
    up = tl.load(gate_up + size + column, mask=held, other=0).to(tl.float32)
    tl.store(out + column, gate / (1 + tl.exp(-gate)) * up, mask=held)
