"""The Triton kernels: what `triton_gpu` launches. Only the files named triton_* import Triton.

They read a `QuantTensor` in place, without a second copy in a layout of their own. A block of 32 columns of 16 rows is
a run of 64 bytes for each bit of its codes, a word per row in each: a thread takes 16 bytes of every run, so it holds
whole groups of four rows, and their four scales are one word. A word has 8 codes of int4, 4 of int8; codes of other
sizes are put together from planes of four, two and one of their digits, as `format.digits` says.

Names: M tokens, N rows, K columns, B blocks of 32 columns; capitals are constants of a compiled kernel.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _placed(w: tl.tensor, RIGHT: tl.constexpr, MASK: tl.constexpr, exponent: tl.tensor) -> tl.tensor:
    """A code of each word under a float's exponent: 2**e + code, without a conversion."""
    moved = w >> RIGHT if RIGHT > 0 else w << -RIGHT
    return ((moved & MASK) | exponent).to(tl.float32, bitcast=True)


@triton.jit
def _field(w: tl.tensor, FROM: tl.constexpr, TO: tl.constexpr, DIGITS: tl.constexpr) -> tl.tensor:
    """DIGITS digits at bit FROM of each word moved to bit TO, alone."""
    moved = w >> (FROM - TO) if FROM > TO else w << (TO - FROM)
    return moved & (((1 << DIGITS) - 1) << TO)


@triton.jit
def _quarters(t: tl.tensor) -> tl.tensor:
    """t [B, 4, 4] -> t[..., 0], t[..., 1], t[..., 2], t[..., 3]: what a thread holds, taken apart."""
    even, odd = tl.split(tl.reshape(t, (t.shape[0], t.shape[1], 2, 2)))
    t0, t2 = tl.split(even)
    t1, t3 = tl.split(odd)
    return t0, t1, t2, t3


@triton.jit
def _runs(x: tl.tensor) -> tl.tensor:
    """x [M, B, 4 C] -> its columns 0 to C - 1, the C after these, and so on: four [M, B, C]."""
    run: tl.constexpr = x.shape[2] // 4
    t = tl.permute(tl.reshape(x, (x.shape[0], x.shape[1], 2, 2, run)), (0, 1, 4, 2, 3))
    even, odd = tl.split(t)
    t0, t2 = tl.split(even)
    t1, t3 = tl.split(odd)
    return t0, t1, t2, t3


@triton.jit
def _columns4(x: tl.tensor) -> tl.tensor:
    """x [M, B, 8] -> its eight columns, then what `_add4` adds too much to a dot product, then their sum."""
    even, odd = tl.split(tl.reshape(x, (x.shape[0], x.shape[1], 2, 2, 2)))
    x04, x26 = tl.split(even)
    x15, x37 = tl.split(odd)
    x0, x4 = tl.split(x04)
    x1, x5 = tl.split(x15)
    x2, x6 = tl.split(x26)
    x3, x7 = tl.split(x37)
    low, high = (x0 + x1) + (x2 + x3), (x4 + x5) + (x6 + x7)
    return x0, x1, x2, x3, x4, x5, x6, x7, 256.0 * low + 16.0 * high, low + high


@triton.jit
def _columns8(x: tl.tensor) -> tl.tensor:
    """x [M, B, 4] -> its four columns, then what `_add8` adds too much to a dot product."""
    even, odd = tl.split(tl.reshape(x, (x.shape[0], x.shape[1], 2, 2)))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0, x1, x2, x3, 384.0 * ((x0 + x1) + (x2 + x3))


@triton.jit
def _add4(dot: tl.tensor, words: tl.tensor, x: tl.tensor, e4: tl.tensor, e8: tl.tensor) -> tl.tensor:
    """dot [M, B, 4] plus words [B, 4] of eight int4 codes times the columns of x.

    One shift serves two codes: they read as 256 + code (columns 0 to 3) and 16 + code (4 to 7).
    """
    w = words[None, :, :]
    dot -= x[8][:, :, None]
    dot += _placed(w, -15, 0x00078000, e8) * x[0][:, :, None]
    dot += _placed(w, -7, 0x00078000, e8) * x[1][:, :, None]
    dot += _placed(w, 1, 0x00078000, e8) * x[2][:, :, None]
    dot += _placed(w, 9, 0x00078000, e8) * x[3][:, :, None]
    dot += _placed(w, -15, 0x00780000, e4) * x[4][:, :, None]
    dot += _placed(w, -7, 0x00780000, e4) * x[5][:, :, None]
    dot += _placed(w, 1, 0x00780000, e4) * x[6][:, :, None]
    dot += _placed(w, 9, 0x00780000, e4) * x[7][:, :, None]
    return dot


@triton.jit
def _code(
    four: tl.tensor,
    two: tl.tensor,
    one: tl.tensor,
    exponent: tl.tensor,
    RUN: tl.constexpr,
    C: tl.constexpr,
    BITS: tl.constexpr,
) -> tl.tensor:
    """The code of column C of eight, plus 16 (from 5 bits on 256), out of the planes' words for columns from 8 RUN."""
    UNIT: tl.constexpr = 19 if BITS < 5 else 15  # the place of a 1 in such a float
    QUAD: tl.constexpr = 2 * RUN + C // 4
    BYTE: tl.constexpr = 8 * (C % 4)
    bits = exponent
    if BITS & 4:
        bits |= _field(four, BYTE + QUAD % 2 * 4, UNIT, 4)
    if BITS & 2:
        bits |= _field(two, BYTE + QUAD % 4 * 2, UNIT + (BITS & 4), 2)
    if BITS & 1:
        bits |= _field(one, BYTE + QUAD, UNIT + BITS - 1, 1)
    return bits.to(tl.float32, bitcast=True)[None, :, :]


@triton.jit
def _add_planes(
    dot: tl.tensor,
    four: tl.tensor,
    two: tl.tensor,
    one: tl.tensor,
    x: tl.tensor,
    exponent: tl.tensor,
    RUN: tl.constexpr,
    BITS: tl.constexpr,
) -> tl.tensor:
    """dot [M, B, 4] plus the eight codes of run RUN in the words [B, 4] of each plane, times the columns of x."""
    dot -= (16.0 if BITS < 5 else 256.0) * x[9][:, :, None]
    for c in tl.static_range(8):
        dot += _code(four, two, one, exponent, RUN, c, BITS) * x[c][:, :, None]
    return dot


@triton.jit
def _add8(dot: tl.tensor, words: tl.tensor, x: tl.tensor, e8: tl.tensor) -> tl.tensor:
    """dot [M, B, 4] plus words [B, 4] of four int8 codes times the columns of x.

    With its sign bit turned a code is 128 more; it reads as 256 + 128 + code.
    """
    w = (words ^ -0x7F7F7F80)[None, :, :]
    dot -= x[4][:, :, None]
    dot += _placed(w, -15, 0x007F8000, e8) * x[0][:, :, None]
    dot += _placed(w, -7, 0x007F8000, e8) * x[1][:, :, None]
    dot += _placed(w, 1, 0x007F8000, e8) * x[2][:, :, None]
    dot += _placed(w, 9, 0x007F8000, e8) * x[3][:, :, None]
    return dot


@triton.jit
def _add(dots: tl.tensor, w: tl.tensor, x: tl.tensor, e4: tl.tensor, e8: tl.tensor, BITS: tl.constexpr) -> tl.tensor:
    """dots (four, and the sum of x) after one word w [B, 4, 4] of each of four rows and its x [M, B, 8 | 4]."""
    w0, w1, w2, w3 = _quarters(w)
    d0, d1, d2, d3, total = dots
    if BITS == 4:
        columns = _columns4(x.to(tl.float32))
        d0, d1 = _add4(d0, w0, columns, e4, e8), _add4(d1, w1, columns, e4, e8)
        d2, d3 = _add4(d2, w2, columns, e4, e8), _add4(d3, w3, columns, e4, e8)
        total += columns[9][:, :, None]
    else:
        columns = _columns8(x.to(tl.float32))
        d0, d1 = _add8(d0, w0, columns, e8), _add8(d1, w1, columns, e8)
        d2, d3 = _add8(d2, w2, columns, e8), _add8(d3, w3, columns, e8)
    return d0, d1, d2, d3, total


@triton.jit
def _add_run(
    dots: tl.tensor,
    four: tl.tensor,
    two: tl.tensor,
    one: tl.tensor,
    x: tl.tensor,
    exponent: tl.tensor,
    RUN: tl.constexpr,
    BITS: tl.constexpr,
) -> tl.tensor:
    """`_add` for codes in planes: the words [B, 4, 4] of each plane that hold run RUN, and its x [M, B, 8]."""
    f0, f1, f2, f3 = _quarters(four)
    t0, t1, t2, t3 = _quarters(two)
    o0, o1, o2, o3 = _quarters(one)
    d0, d1, d2, d3, total = dots
    columns = _columns4(x.to(tl.float32))
    d0, d1 = (
        _add_planes(d0, f0, t0, o0, columns, exponent, RUN, BITS),
        _add_planes(d1, f1, t1, o1, columns, exponent, RUN, BITS),
    )
    d2, d3 = (
        _add_planes(d2, f2, t2, o2, columns, exponent, RUN, BITS),
        _add_planes(d3, f3, t3, o3, columns, exponent, RUN, BITS),
    )
    return d0, d1, d2, d3, total + columns[9][:, :, None]


@triton.jit
def _scaled(part: tl.tensor, plane: tl.tensor) -> tl.tensor:
    return part * plane.to(tl.float32)[None, :, :]


@triton.jit
def _of_rows(values: tl.tensor, row: tl.tensor, n: tl.tensor) -> tl.tensor:
    """values [N] of rows `row` [4], of `row` + 1, + 2 and + 3."""
    v0 = tl.load(values + row, mask=row < n, other=0)
    v1 = tl.load(values + row + 1, mask=row + 1 < n, other=0)
    v2 = tl.load(values + row + 2, mask=row + 2 < n, other=0)
    v3 = tl.load(values + row + 3, mask=row + 3 < n, other=0)
    return v0, v1, v2, v3


@triton.jit(do_not_specialize=["tokens"])
def gemv(
    x: tl.tensor,
    qweight: tl.tensor,
    scales: tl.tensor,
    mins: tl.tensor,
    row_scale: tl.tensor,
    row_min: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    tokens: tl.tensor,
    n: tl.tensor,
    k: tl.tensor,
    x_stride: tl.tensor,
    e4: tl.tensor,
    e8: tl.tensor,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCKS: tl.constexpr,
    WHOLE: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """One program: one tile of 16 rows times TOKENS tokens. A thread takes four rows of a block of 32 columns at once.

    WHOLE: K is a multiple of 32 * BLOCKS. e4 and e8 are the bits of 16.0 and 256.0: constants would be loaded again for
    every use, which was a fifth of all instructions.
    """
    RUN: tl.constexpr = 4 if BITS == 8 else 8  # columns that are multiplied at a time
    tile = tl.program_id(1).to(tl.int64)
    blocks = k // 32
    qweight += tile * blocks * (16 * BITS)
    scales += tile * (k // GROUP) * 16
    if BITS < 8:
        mins += tile * (k // GROUP) * 16
    rows = tl.arange(0, 4)[:, None] * 4 + tl.arange(0, 4)[None, :]
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    row = tile * 16 + tl.arange(0, 4) * 4
    f0, f1, f2, f3 = _of_rows(row_scale, row, n)  # early: nothing waits for them before the end
    if BITS < 8:
        g0, g1, g2, g3 = _of_rows(row_min, row, n)
    if bias is not None:
        b0, b1, b2, b3 = _of_rows(bias, row, n)
    zero = tl.zeros((TOKENS, BLOCKS, 4), tl.float32)
    s0, s1, s2, s3 = zero, zero, zero, zero
    m0, m1, m2, m3 = zero, zero, zero, zero
    for start in tl.range(0, blocks, BLOCKS, num_stages=STAGES):
        block = start + tl.arange(0, BLOCKS)
        inside = (block < blocks) | WHOLE
        held = inside[:, None, None]
        plane = (block * 32 // GROUP)[:, None, None] * 16 + rows[None, :, :]
        scale = tl.load(scales + plane, mask=held)
        if BITS < 8:
            low = tl.load(mins + plane, mask=held)
        w_at = block[:, None, None] * (16 * BITS) + rows[None, :, :]
        x_at = token[:, None, None] * x_stride + block[None, :, None] * 32 + tl.arange(0, 4 * RUN)[None, None, :]
        here = inside[None, :, None] & ((token < tokens)[:, None, None] | (TOKENS == 1))
        dots = (zero, zero, zero, zero, zero)
        if (BITS == 4) | (BITS == 8):
            for half in tl.static_range(BITS // 4):
                w_from = qweight + w_at + half * 64
                wa = tl.load(w_from, mask=held, eviction_policy="evict_first")
                wb = tl.load(w_from + 16, mask=held, eviction_policy="evict_first")
                wc = tl.load(w_from + 32, mask=held, eviction_policy="evict_first")
                wd = tl.load(w_from + 48, mask=held, eviction_policy="evict_first")
                xa, xb, xc, xd = _runs(tl.load(x + x_at + half * (4 * RUN), mask=here, other=0))
                dots = _add(dots, wa, xa, e4, e8, BITS)
                dots = _add(dots, wb, xb, e4, e8, BITS)
                dots = _add(dots, wc, xc, e4, e8, BITS)
                dots = _add(dots, wd, xd, e4, e8, BITS)
        else:
            w_from = qweight + w_at
            none = tl.zeros((BLOCKS, 4, 4), tl.int32)
            fa, fb, fc, fd, ta, tb, one = none, none, none, none, none, none, none
            if BITS & 4:
                fa = tl.load(w_from, mask=held, eviction_policy="evict_first")
                fb = tl.load(w_from + 16, mask=held, eviction_policy="evict_first")
                fc = tl.load(w_from + 32, mask=held, eviction_policy="evict_first")
                fd = tl.load(w_from + 48, mask=held, eviction_policy="evict_first")
            if BITS & 2:
                ta = tl.load(w_from + (BITS & 4) * 16, mask=held, eviction_policy="evict_first")
                tb = tl.load(w_from + (BITS & 4) * 16 + 16, mask=held, eviction_policy="evict_first")
            if BITS & 1:
                one = tl.load(w_from + (BITS - 1) * 16, mask=held, eviction_policy="evict_first")
            xa, xb, xc, xd = _runs(tl.load(x + x_at, mask=here, other=0))
            exponent = e4 if BITS < 5 else e8
            dots = _add_run(dots, fa, ta, one, xa, exponent, 0, BITS)
            dots = _add_run(dots, fb, ta, one, xb, exponent, 1, BITS)
            dots = _add_run(dots, fc, tb, one, xc, exponent, 2, BITS)
            dots = _add_run(dots, fd, tb, one, xd, exponent, 3, BITS)
        d0, d1, d2, d3, total = dots
        p0, p1, p2, p3 = _quarters(scale)
        s0, s1, s2, s3 = s0 + _scaled(d0, p0), s1 + _scaled(d1, p1), s2 + _scaled(d2, p2), s3 + _scaled(d3, p3)
        if BITS < 8:
            q0, q1, q2, q3 = _quarters(low)
            m0, m1 = m0 + _scaled(total, q0), m1 + _scaled(total, q1)
            m2, m3 = m2 + _scaled(total, q2), m3 + _scaled(total, q3)
    s0, s1, s2, s3 = s0 * f0[None, None, :], s1 * f1[None, None, :], s2 * f2[None, None, :], s3 * f3[None, None, :]
    if BITS < 8:
        s0, s1 = s0 - m0 * g0[None, None, :], s1 - m1 * g1[None, None, :]
        s2, s3 = s2 - m2 * g2[None, None, :], s3 - m3 * g3[None, None, :]
    s0, s1, s2, s3 = tl.sum(s0, axis=1), tl.sum(s1, axis=1), tl.sum(s2, axis=1), tl.sum(s3, axis=1)
    if bias is not None:
        s0, s1, s2, s3 = s0 + b0[None, :], s1 + b1[None, :], s2 + b2[None, :], s3 + b3[None, :]
    out += token[:, None] * n + row[None, :]
    held = (token < tokens)[:, None]
    tl.store(out, s0, mask=held & (row < n)[None, :])
    tl.store(out + 1, s1, mask=held & (row + 1 < n)[None, :])
    tl.store(out + 2, s2, mask=held & (row + 2 < n)[None, :])
    tl.store(out + 3, s3, mask=held & (row + 3 < n)[None, :])


@triton.jit
def _plane(words: tl.tensor, held: tl.tensor, DIGITS: tl.constexpr) -> tl.tensor:
    """The plane of so many digits that begins at `words` [T, B, 1, 16] -> [T, B, 16, 32]: each column's at bit 0."""
    RUNS: tl.constexpr = DIGITS
    EACH: tl.constexpr = 32 // DIGITS  # columns in a word
    w = tl.load(words + tl.arange(0, RUNS)[None, None, :, None] * 16, mask=held, other=0)[:, :, :, :, None]
    place = tl.arange(0, EACH)
    fields = w >> (place % 4 * 8 + place // 4 * DIGITS)
    return tl.reshape(tl.permute(fields, (0, 1, 3, 2, 4)), (words.shape[0], words.shape[1], 16, 32))


@triton.jit
def _decoded(
    qweight: tl.tensor,
    scales: tl.tensor,
    mins: tl.tensor,
    row_scale: tl.tensor,
    row_min: tl.tensor,
    tile: tl.tensor,
    block: tl.tensor,
    n: tl.tensor,
    blocks: tl.tensor,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
) -> tl.tensor:
    """Row tiles `tile` [T] (int64) and blocks `block` [B] -> weights [16 T, 32 B], float32; 0 outside the weight."""
    row = tl.arange(0, 16)
    held = (tile * 16 < n)[:, None, None, None] & (block < blocks)[None, :, None, None]
    at = (tile[:, None] * blocks + block[None, :])[:, :, None, None] * (16 * BITS) + row[None, None, None, :]
    if BITS == 8:
        code = (_plane(qweight + at, held, 8) << 24) >> 24
    else:
        code = tl.zeros((tile.shape[0], block.shape[0], 16, 32), tl.int32)
        if BITS & 4:
            code |= _plane(qweight + at, held, 4) & 15
        if BITS & 2:
            code |= (_plane(qweight + at + (BITS & 4) * 16, held, 2) & 3) << (BITS & 4)
        if BITS & 1:
            code |= (_plane(qweight + at + (BITS - 1) * 16, held, 1) & 1) << (BITS - 1)
    rows, inside = tile[:, None] * 16 + row[None, :], (tile * 16 < n)[:, None, None] & (block < blocks)[None, :, None]
    plane = (tile[:, None] * (blocks * 32 // GROUP) + (block * 32 // GROUP)[None, :])[:, :, None] * 16
    plane = plane + row[None, None, :]
    scale = tl.load(scales + plane, mask=inside, other=0).to(tl.float32)
    scale = scale * tl.load(row_scale + rows, mask=rows < n, other=0)[:, None, :]
    weight = code.to(tl.float32) * scale[:, :, :, None]
    if BITS < 8:
        low = tl.load(mins + plane, mask=inside, other=0).to(tl.float32)
        low = low * tl.load(row_min + rows, mask=rows < n, other=0)[:, None, :]
        weight -= low[:, :, :, None]
    return tl.reshape(tl.permute(weight, (0, 2, 1, 3)), (tile.shape[0] * 16, block.shape[0] * 32))


@triton.jit(do_not_specialize=["tokens"])
def gemm(
    x: tl.tensor,
    qweight: tl.tensor,
    scales: tl.tensor,
    mins: tl.tensor,
    row_scale: tl.tensor,
    row_min: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    tokens: tl.tensor,
    n: tl.tensor,
    k: tl.tensor,
    x_stride: tl.tensor,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    TOKENS: tl.constexpr,
    TILES: tl.constexpr,
    BLOCKS: tl.constexpr,
    FACTOR: tl.constexpr,
) -> None:
    """One program: TILES * 16 rows times TOKENS tokens; weights are decoded to bfloat16, sums are float32.

    FACTOR is bfloat16, but float32 (the same values) in Triton's interpreter, which multiplies bfloat16 wrongly.
    """
    COLUMNS: tl.constexpr = BLOCKS * 32
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    tile = (tl.program_id(1) * TILES + tl.arange(0, TILES)).to(tl.int64)
    column, blocks = tl.arange(0, COLUMNS), k // 32
    x_rows = x + token.to(tl.int64)[:, None] * x_stride
    sums = tl.zeros((TOKENS, TILES * 16), tl.float32)
    for start in range(0, blocks, BLOCKS):
        at = start * 32 + column
        held = (token < tokens)[:, None] & (at < k)[None, :]
        part = tl.load(x_rows + at[None, :], mask=held, other=0)
        block = start + tl.arange(0, BLOCKS)
        weight = _decoded(qweight, scales, mins, row_scale, row_min, tile, block, n, blocks, BITS, GROUP)
        sums = tl.dot(part.to(FACTOR), tl.trans(weight.to(tl.bfloat16).to(FACTOR)), sums)
    row = tl.program_id(1) * (TILES * 16) + tl.arange(0, TILES * 16)
    if bias is not None:
        sums += tl.load(bias + row, mask=row < n, other=0)[None, :]
    place = out + token.to(tl.int64)[:, None] * n + row[None, :]
    tl.store(place, sums, mask=(token < tokens)[:, None] & (row < n)[None, :])


@triton.jit(do_not_specialize=["first"])
def decode(
    qweight: tl.tensor,
    scales: tl.tensor,
    mins: tl.tensor,
    row_scale: tl.tensor,
    row_min: tl.tensor,
    out: tl.tensor,
    first: tl.tensor,
    n: tl.tensor,
    k: tl.tensor,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    TILES: tl.constexpr,
    BLOCKS: tl.constexpr,
) -> None:
    """Row tiles from `first` on as a matrix [rows, K] in the type of `out`, for torch's own matmul."""
    tile = (first + tl.program_id(0) * TILES + tl.arange(0, TILES)).to(tl.int64)
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    weight = _decoded(qweight, scales, mins, row_scale, row_min, tile, block, n, k // 32, BITS, GROUP)
    row = (tl.program_id(0) * TILES * 16 + tl.arange(0, TILES * 16)).to(tl.int64)
    column = tl.program_id(1) * (BLOCKS * 32) + tl.arange(0, BLOCKS * 32)
    held = (first * 16 + row < n)[:, None] & (column < k)[None, :]
    tl.store(out + row[:, None] * k + column[None, :], weight, mask=held)
