"""The Triton kernels between the products of a decoder layer, for the rows of a step: what `triton_step` launches.

Norms with the residual stream, rotation with the write into the cache, attention over the cache in parts, SwiGLU. Which
sequence a row is of, how many tokens that has and where they lie is read from the GPU's memory (`rows`, as `StepRows`
describes it), so that a recorded graph serves every step. Each row is computed by itself. A row of padding, at position
-1, writes to no cache and reads none, and what comes out of it is 0.

A block is BLOCK tokens of one head, [BLOCK, DIM] in the activations' type; or CODES, which is int8 with a scale for
each head and token and has its keys in tiles of 16 tokens, [BLOCK / 16, DIM, 16]. `block_stride` and `head_stride` are
tokens from one block or head to the next.
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
    """x [rows, size] float32 += added, itself normed where there is a `post_weight`; out = x normed with `weight`.

    Without `added` x stays, without `weight` nothing is written to `out`. One program a row.
    """
    column = tl.arange(0, BLOCK)
    held = column < size
    row = tl.program_id(0) * size
    x += row
    out += row
    value = tl.load(x + column, mask=held, other=0)
    if added is not None:
        more = tl.load(added + row + column, mask=held, other=0).to(tl.float32)
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
    rows: tl.tensor,
    block_stride: tl.tensor,
    head_stride: tl.tensor,
    QUERIES: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    ROTARY: tl.constexpr,
    BLOCK: tl.constexpr,
    CODES: tl.constexpr,
) -> None:
    """One program a head and row: the QUERIES of q are rotated in place, the HEADS of k rotated into the cache, those
    of v put there. Adjacent pairs of the first ROTARY dimensions turn by cos and sin [rows, ROTARY / 2]."""
    program, row, size = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    token = tl.load(rows + row)
    if token < 0:
        return
    pair = tl.arange(0, DIM // 2)
    head = tl.maximum(program - QUERIES, 0) % HEADS
    block = tl.load(rows + tl.load(rows + size + row) + token // BLOCK).to(tl.int64)
    first_token = block * block_stride + head * head_stride
    within = token % BLOCK
    if program < QUERIES + HEADS:
        turned = pair < ROTARY // 2
        angle = row * (ROTARY // 2) + pair
        c = tl.where(turned, tl.load(cos + angle, mask=turned, other=0).to(tl.float32), 1.0)
        s = tl.load(sin + angle, mask=turned, other=0).to(tl.float32)
        source = q + (row * QUERIES + program) * DIM
        if program >= QUERIES:
            source = k + (row * HEADS + head) * DIM
        even = tl.load(source + 2 * pair).to(tl.float32)
        odd = tl.load(source + 2 * pair + 1).to(tl.float32)
        first, second = even * c - odd * s, odd * c + even * s
        if program < QUERIES:
            tl.store(source + 2 * pair, first)
            tl.store(source + 2 * pair + 1, second)
        else:
            if CODES:
                top = tl.maximum(tl.max(tl.abs(first)), tl.max(tl.abs(second)))
                inverse = tl.where(top < 1e-30, 0.0, 127.0 / top)
                first, second = _rounded(first * inverse), _rounded(second * inverse)
                tl.store(key_scale + first_token + within, top / 127.0)
            place = keys + first_token * DIM
            tl.store(place + _key_at(within, 2 * pair, DIM, CODES), first)
            tl.store(place + _key_at(within, 2 * pair + 1, DIM, CODES), second)
    else:
        dim = tl.arange(0, DIM)
        value = tl.load(v + (row * HEADS + head) * DIM + dim).to(tl.float32)
        if CODES:
            top = tl.max(tl.abs(value))
            inverse = tl.where(top < 1e-30, 0.0, 127.0 / top)
            value = _rounded(value * inverse)
            tl.store(value_scale + first_token + within, top / 127.0)
        tl.store(values + (first_token + within) * DIM + dim, value)


@triton.jit
def attend(
    q: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    key_scale: tl.tensor,
    value_scale: tl.tensor,
    rows: tl.tensor,
    sums: tl.tensor,
    tops: tl.tensor,
    weights: tl.tensor,
    block_stride: tl.tensor,
    head_stride: tl.tensor,
    scale: tl.tensor,
    SPLITS: tl.constexpr,
    GROUP: tl.constexpr,
    QUERIES: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    CODES: tl.constexpr,
    FACTOR: tl.constexpr,
) -> None:
    """One program: the rows of one tile and one key/value head over one of SPLITS parts of their sequence.

    The GROUP queries of a row, then those of the next, are the QUERIES of a product (as in vLLM's unified attention):
    keys and values are read once for all of them. The cache holds the tile's own tokens too; a row sees those up to its
    own. Out: the parts' sums without a denominator [SPLITS, rows, heads, DIM], the largest score `tops` (base 2) and
    `weights`, the sum of the exponentials, both [SPLITS, rows, heads]; `combine` puts them together (Flash-Decoding).
    Scores and sums are float32; FACTOR is the type that products take, float32 in the interpreter.
    """
    tile, head, split, size = tl.program_id(0), tl.program_id(1), tl.program_id(2), tl.num_programs(0)
    count = tl.load(rows + 3 * size + tile)
    if count == 0:
        return
    first = tl.load(rows + 2 * size + tile)
    position = tl.load(rows + first)
    table = rows + tl.load(rows + size + first)
    total, heads = position + count, tl.num_programs(1) * GROUP
    part = tl.cdiv(tl.cdiv(total, SPLITS), BLOCK) * BLOCK
    begin = split * part
    end = tl.minimum(begin + part, total)
    index, dim, within = tl.arange(0, QUERIES), tl.arange(0, DIM), tl.arange(0, BLOCK)
    row = index // GROUP
    asked, last = row < count, position + row
    at = (first + row) * heads + head * GROUP + index % GROUP
    query = tl.load(q + at[:, None] * DIM + dim[None, :], mask=asked[:, None], other=0)
    top = tl.full((QUERIES,), -float("inf"), tl.float32)
    weight = tl.zeros((QUERIES,), tl.float32)
    sum_ = tl.zeros((QUERIES, DIM), tl.float32)
    for start in range(begin, end, BLOCK):
        block = tl.load(table + start // BLOCK).to(tl.int64)
        first_token = block * block_stride + head * head_stride
        token = start + within
        held = token < end
        place = keys + first_token * DIM
        key = tl.load(place + _key_at(within[None, :], dim[:, None], DIM, CODES), mask=held[None, :], other=0)
        score = tl.dot(query.to(FACTOR), key.to(FACTOR), input_precision="ieee") * scale
        if CODES:
            score *= tl.load(key_scale + first_token + within, mask=held, other=0)[None, :]
        score = tl.where(held[None, :] & (token[None, :] <= last[:, None]), score, -float("inf"))
        higher = tl.maximum(top, tl.max(score, axis=1))
        base = tl.where(higher == -float("inf"), 0.0, higher)  # of a row that sees nothing of this part
        fade, chance = tl.exp2(top - base), tl.exp2(score - base[:, None])
        weight = weight * fade + tl.sum(chance, axis=1)
        if CODES:
            chance *= tl.load(value_scale + first_token + within, mask=held, other=0)[None, :]
        place = values + first_token * DIM
        value = tl.load(place + within[:, None] * DIM + dim[None, :], mask=held[:, None], other=0)
        sum_ = sum_ * fade[:, None] + tl.dot(chance.to(FACTOR), value.to(FACTOR), input_precision="ieee")
        top = higher
    at += split * size * heads
    tl.store(tops + at, top, mask=asked)
    tl.store(weights + at, weight, mask=asked)
    tl.store(sums + at[:, None] * DIM + dim[None, :], sum_, mask=(asked & (weight > 0))[:, None])


@triton.jit
def combine(
    sums: tl.tensor,
    tops: tl.tensor,
    weights: tl.tensor,
    rows: tl.tensor,
    out: tl.tensor,
    SPLITS: tl.constexpr,
    DIM: tl.constexpr,
) -> None:
    """One program a query head and row: out [rows, heads, DIM] from what `attend` left of each part.

    Of empty parts nothing is read but that they are empty.
    """
    head, row, heads, size = tl.program_id(0), tl.program_id(1), tl.num_programs(0), tl.num_programs(1)
    dim, place = tl.arange(0, DIM), row * heads + head
    if tl.load(rows + row) < 0:
        tl.store(out + place * DIM + dim, tl.zeros((DIM,), tl.float32))
        return
    at = tl.arange(0, SPLITS) * (size * heads) + place
    top, weight = tl.load(tops + at), tl.load(weights + at)
    share = tl.exp2(top - tl.max(top))
    parts = tl.load(sums + at[:, None] * DIM + dim[None, :], mask=(weight > 0)[:, None], other=0)
    tl.store(out + place * DIM + dim, tl.sum(parts * share[:, None], axis=0) / tl.sum(share * weight))


@triton.jit
def swiglu(gate_up: tl.tensor, out: tl.tensor, size: tl.tensor, BLOCK: tl.constexpr) -> None:
    """out [rows, size] = silu(gate) * up; gate_up [rows, 2 * size], the gate first."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    held = column < size
    gate_up += tl.program_id(1) * (2 * size)
    out += tl.program_id(1) * size
    gate = tl.load(gate_up + column, mask=held, other=0).to(tl.float32)
    up = tl.load(gate_up + size + column, mask=held, other=0).to(tl.float32)
    tl.store(out + column, gate / (1 + tl.exp(-gate)) * up, mask=held)
