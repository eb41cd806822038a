"""What lies between a layer's products on a GPU, against float64: on a GPU where there is one, else interpreted."""

from __future__ import annotations

import os
import random
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from glm4lite_quant.kernels.decoder import BLOCK, CacheView, Heads
from glm4lite_quant.kernels.step_rows import SequenceRows, StepRows, tile_rows

CUDA = torch.cuda.is_available()
pytest.importorskip("triton", reason="triton is not installed: the GPU kernels are not tested")
if not CUDA and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("no CUDA device, and TRITON_INTERPRET=1 is not set (tests/conftest.py does)", allow_module_level=True)

from glm4lite_quant.kernels import triton_step as step  # noqa: E402

DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPES = {torch.float32: 1e-6, torch.bfloat16: 1e-2}
HEADS = {
    "the 9B's": Heads(32, 2, 128, 64),
    "the 32B's": Heads(48, 2, 128, 64),
    "three queries each, all rotated": Heads(6, 2, 16, 16),
    "one query each": Heads(4, 4, 32, 16),
}
SMALL = HEADS["three queries each, all rotated"]
STEPS = {  # of each sequence how many tokens it has, and how many rows come to them
    "a first token": [(0, 1)],
    "the last of a block": [(63, 1)],
    "the first of a block": [(64, 1)],
    "several, of any length": [(150, 1), (0, 1), (64, 1)],
    "rows to verify, over a block's end": [(61, 5)],
    "both": [(3, 1), (126, 4), (200, 1)],
}


@pytest.fixture(autouse=True)
def seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    if not CUDA:  # the interpreter runs programs in turn
        monkeypatch.setattr(step, "PARTS", 8)
        monkeypatch.setattr(step, "LEAST_SPLITS", 2)


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).abs().max() / want.double().abs().max())


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [rows, heads, dim] in float64, adjacent pairs turned by cos and sin [rows, width / 2]."""
    x, width, cos, sin = x.double().clone(), 2 * cos.shape[1], cos.double()[:, None], sin.double()[:, None]
    even, odd = x[..., 0:width:2].clone(), x[..., 1:width:2].clone()
    x[..., 0:width:2], x[..., 1:width:2] = even * cos - odd * sin, odd * cos + even * sin
    return x


def attended(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """q [rows, query, dim], the last rows of keys and values [tokens, kv, dim] -> [rows, query, dim], in float64."""
    groups = q.shape[1] // keys.shape[1]
    keys, values = (part.double().repeat_interleave(groups, 1).transpose(0, 1) for part in (keys, values))
    scores = q.double().transpose(0, 1) @ keys.transpose(1, 2) * q.shape[-1] ** -0.5
    hidden = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).triu(keys.shape[1] - q.shape[0] + 1)
    return (scores.masked_fill(hidden, float("-inf")).softmax(-1) @ values).transpose(0, 1)


class Pool:
    """Blocks in any order, NaN where nothing was written, and each sequence's keys and values beside them."""

    def __init__(self, heads: Heads, blocks: int, dtype: torch.dtype, seed: int = 0) -> None:
        self.heads, self.dtype, self._chance = heads, dtype, random.Random(seed)
        shape = (blocks, heads.key_value, BLOCK, heads.dim)
        self.keys, self.values = (torch.full(shape, float("nan"), dtype=dtype, device=DEVICE) for _ in range(2))
        self.free = self._chance.sample(range(blocks), blocks)
        self.sequences: list[tuple[list[int], Tensor, Tensor]] = []

    def begin(self, length: int) -> int:
        """A sequence with random keys and values; its number."""
        nothing = randn(0, self.heads.key_value, self.heads.dim, dtype=self.dtype)
        self.sequences.append(([], nothing, nothing))
        number = len(self.sequences) - 1
        new = (randn(length, self.heads.key_value, self.heads.dim, dtype=self.dtype) for _ in "kv")
        for token, (key, value) in enumerate(zip(*self.extend(number, *new), strict=True)):
            block = self.sequences[number][0][token // BLOCK]
            self.keys[block, :, token % BLOCK], self.values[block, :, token % BLOCK] = key, value
        return number

    def extend(self, number: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Notes new ones, and takes the blocks they need; all of the sequence's so far."""
        table, *past = self.sequences[number]
        keys, values = torch.cat((past[0], keys)), torch.cat((past[1], values))
        table += [self.free.pop() for _ in range(-(-len(keys) // BLOCK) - len(table))]
        self.sequences[number] = (table, keys, values)
        return keys, values

    def view(self) -> CacheView:
        return CacheView(self.keys, self.values, None, None, 0, torch.zeros(0, dtype=torch.int32))

    def run(self, spans: list[tuple[int, int]], rows: StepRows, scratch: step.AttentionScratch) -> None:
        """One step of (sequence, rows), against float64; checks that nothing else was written."""
        heads, tolerance = self.heads, DTYPES[self.dtype]
        q, k, v = (randn(rows.size, n * heads.dim, dtype=self.dtype) for n in (heads.query, *[heads.key_value] * 2))
        angles = randn(rows.size, heads.rotary_dim // 2)
        rotary = angles.cos().to(self.dtype), angles.sin().to(self.dtype)
        turned_q, turned_k = (rotated(x.view(rows.size, -1, heads.dim), *rotary) for x in (q, k))
        wanted, sequences, begin = [], [], 0
        places = list[tuple[int, int]]()
        for number, count in spans:
            own, length = slice(begin, begin + count), len(self.sequences[number][1])
            new = turned_k[own].to(self.dtype), v[own].view(count, -1, heads.dim)
            keys, values = self.extend(number, *new)
            wanted.append(attended(turned_q[own], keys, values))
            table = self.sequences[number][0]
            sequences.append(SequenceRows(length, count, torch.tensor(table, dtype=torch.int32)))
            places += [(table[at // BLOCK], at % BLOCK) for at in range(length, length + count)]
            begin += count
        before = self.keys.clone(), self.values.clone()
        assert rows.set(sequences) == begin
        out = step.attend(q, k, v, rotary, self.view(), rows, scratch).view(rows.size, -1, heads.dim)
        assert error(out[:begin], torch.cat(wanted)) < 2 * tolerance  # q is rounded once more when it has turned
        assert bool((out[begin:] == 0).all())
        for row, (block, place) in enumerate(places):
            assert error(self.keys[block, :, place], turned_k[row]) < tolerance
            assert torch.equal(self.values[block, :, place], v[row].view(-1, heads.dim))
            for old, memory in zip(before, (self.keys, self.values), strict=True):
                old[block, :, place] = memory[block, :, place]
        for old, memory in zip(before, (self.keys, self.values), strict=True):
            assert torch.equal(old.nan_to_num(7), memory.nan_to_num(7))
        for number, count in spans:  # what the kernel rounded is what the next step reads
            table, keys, values = self.sequences[number]
            for at in range(len(keys) - count, len(keys)):
                keys[at] = self.keys[table[at // BLOCK], :, at % BLOCK]


def usually(params: list[Any], quick: set[Any]) -> list[Any]:
    """Of cases that differ little those in `quick` always, the others with `-m slow`: the interpreter takes seconds."""
    return [param if param in quick else pytest.param(*param, marks=pytest.mark.slow) for param in params]


@pytest.mark.parametrize(
    ("named", "dtype"),
    usually(
        list(product(STEPS, DTYPES)),
        {(named, torch.float32) for named in ("a first token", "the first of a block", "both")},
    ),
    ids=str,
)
def test_rows_of_several_sequences_attend_over_their_own_blocks(named: str, dtype: torch.dtype) -> None:
    pool = Pool(SMALL, 20, dtype)
    spans = [(pool.begin(length), count) for length, count in STEPS[named]]
    for tile in {1, tile_rows(SMALL)}:
        rows = StepRows(8, 20, tile, DEVICE)
        pool.run(spans, rows, step.AttentionScratch(SMALL, 8, DEVICE))


@pytest.mark.parametrize(
    ("name", "dtype"),
    usually(
        list(product(HEADS, DTYPES)),
        {("the 9B's", torch.bfloat16), ("three queries each, all rotated", torch.bfloat16)},
    ),
    ids=str,
)
def test_heads_of_every_shape_attend(name: str, dtype: torch.dtype) -> None:
    heads = HEADS[name]
    pool = Pool(heads, 8, dtype)
    for spans, tile in (([(70, 1), (0, 1)], 1), ([(62, 3)], tile_rows(heads))):
        rows = StepRows(4, 8, tile, DEVICE)
        pool.run([(pool.begin(past), count) for past, count in spans], rows, step.AttentionScratch(heads, 4, DEVICE))


@pytest.mark.parametrize(("seed", "turns"), usually([(0, 4), (1, 12), (2, 12)], {(0, 4)}))
def test_sequences_join_and_leave_at_random_and_none_sees_anothers_tokens(seed: int, turns: int) -> None:
    """Over one memory and one recording's buffers; blocks that were given back hold others' numbers."""
    chance, pool = random.Random(seed), Pool(SMALL, 24, torch.float32, seed)
    rows, scratch = StepRows(8, 24, tile_rows(SMALL), DEVICE), step.AttentionScratch(SMALL, 8, DEVICE)
    running: list[int] = []
    for _ in range(turns):
        if running and chance.random() < 0.3:
            pool.free += pool.sequences[running.pop(chance.randrange(len(running)))][0]
        while len(running) < 3:
            running.append(pool.begin(chance.choice((0, 1, 63, 64, 130))))
        taking, spans = chance.sample(running, chance.randint(1, 3)), []
        for number in taking:
            spans.append((number, chance.choice((1, 1, 2))))
        pool.run(spans, rows, scratch)


@pytest.mark.slow
def test_a_long_context_is_shared_out_among_many_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """More parts than blocks, and more blocks than parts; one long sequence beside short ones."""
    monkeypatch.setattr(step, "PARTS", 128)
    scratch = step.AttentionScratch(SMALL, 4, DEVICE)
    assert scratch.splits == 16
    pool = Pool(SMALL, 48, torch.float32)
    pool.run([(pool.begin(2100), 1), (pool.begin(1), 1), (pool.begin(320), 2)], StepRows(4, 48, 2, DEVICE), scratch)


@pytest.mark.parametrize("length", [0, 37])
@pytest.mark.parametrize("codes", [False, True])
def test_a_cache_of_its_own_is_blocks_that_follow_each_other(codes: bool, length: int) -> None:
    from glm4lite.model.layer_cache import LayerCache
    from glm4lite.model.packed_cache import PackedLayerCache

    heads, kv = HEADS["the 9B's"], (1, HEADS["the 9B's"].key_value, -1, 128)
    cache, twin = (PackedLayerCache(True) if codes else LayerCache() for _ in range(2))
    past = [randn(1, heads.key_value, length, heads.dim) for _ in range(2)]
    if length:
        cache.append(*past)
        twin.append(*past)
    view = cache.view(1, heads, DEVICE, torch.float32)
    q, k, v = (randn(1, h * heads.dim) for h in (heads.query, heads.key_value, heads.key_value))
    rotary = (torch.ones(1, 32, device=DEVICE), torch.zeros(1, 32, device=DEVICE))
    rows = StepRows(1, view.blocks, 1, DEVICE)
    rows.set([SequenceRows(length, 1, torch.arange(view.blocks, dtype=torch.int32))])
    out = step.attend(q, k, v, rotary, view, rows, step.AttentionScratch(heads, 1, DEVICE))
    cache.length += 1
    keys, values = twin.append(k.view(kv), v.view(kv))
    for got, stored in zip(cache.past() or (), (keys, values), strict=True):
        # a GPU divides otherwise than torch: a code may differ
        assert torch.equal(got, stored) if not CUDA else error(got, stored) < 1.01 / 127
    want = attended(q.view(1, heads.query, -1), keys[0].transpose(0, 1), values[0].transpose(0, 1))
    assert error(out.view_as(want), want) < 1e-5


@pytest.mark.parametrize("spans", [[(0, 1), (100, 1)], [(62, 4), (3, 1)]])
def test_int8_blocks_are_written_and_read_as_torch_does(spans: list[tuple[int, int]]) -> None:
    """Against the pool's own code, which is the specification: the same codes and scales, bit by bit."""
    from glm4lite.runtime.block_table import Blocks, BlockTable
    from glm4lite.runtime.kv_pool import PooledLayerCache, _Kind, _LayerMemory

    heads, kv = SMALL, (1, -1, SMALL.key_value, SMALL.dim)
    memories = [_LayerMemory.of(8, heads, _Kind(DEVICE, torch.int8, True)) for _ in range(2)]
    for memory in memories:
        for tensor in memory:
            assert tensor is not None
            tensor.zero_()
    blocks = [Blocks(8, [memory]) for memory in memories]
    caches = [[PooledLayerCache(m, BlockTable(b), 0) for _ in spans] for m, b in zip(memories, blocks, strict=True)]
    for at, (length, _) in enumerate(spans):
        past = [randn(1, heads.key_value, length, heads.dim) for _ in range(2)]
        if length:
            for cache in (caches[0][at], caches[1][at]):
                cache.append(*past)
    total, size = sum(count for _, count in spans), 8
    q, k, v = (randn(size, n * heads.dim) for n in (heads.query, heads.key_value, heads.key_value))
    rotary = (torch.ones(size, 8, device=DEVICE), torch.zeros(size, 8, device=DEVICE))
    views = [
        cache.view(count, heads, DEVICE, torch.float32) for cache, (_, count) in zip(caches[0], spans, strict=True)
    ]
    rows = StepRows(size, 8, tile_rows(heads), DEVICE)
    tables = [view.table for view in views]
    rows.set([SequenceRows(*span, table) for span, table in zip(spans, tables, strict=True) if table is not None])
    out = step.attend(q, k, v, rotary, views[0], rows, step.AttentionScratch(heads, size, DEVICE))
    begin = 0
    for cache, (_, count) in zip(caches[1], spans, strict=True):
        own = slice(begin, begin + count)
        keys, values = cache.append(*(new[own].view(kv).transpose(1, 2) for new in (k, v)))
        want = attended(q[own].view(count, heads.query, -1), keys[0].transpose(0, 1), values[0].transpose(0, 1))
        assert error(out[own].view_as(want), want) < 1e-5
        begin += count
    assert begin == total
    for got, stored in zip(*memories, strict=True):
        assert got is not None
        assert stored is not None
        assert torch.equal(got, stored) if not CUDA else error(got, stored) < 1.01 / 127


@pytest.mark.parametrize("dtype", list(DTYPES), ids=str)
def test_norms_join_the_residual_stream_in_the_references_order(dtype: torch.dtype) -> None:
    from glm4lite.model.layers import RMSNorm

    rows, size = 3, 6144 if CUDA else 200
    norms = [RMSNorm(size, 1e-5).to(DEVICE) for _ in range(2)]
    for norm in norms:
        torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    post, weight = (norm.weight.detach() for norm in norms)
    x, added = randn(rows, size) * 100, randn(rows, size, dtype=dtype) * 1000
    with torch.inference_mode():
        for post_weight in (None, post):
            stream = x.clone()
            out = step.add_norm(stream, added, post_weight, weight, 1e-5, dtype)
            want = x + (added if post_weight is None else norms[0](added, dtype)).float()
            assert error(stream, want) < 1e-6 if dtype == torch.float32 else error(stream, want) < 1e-2
            assert out.dtype == dtype
            assert error(out, norms[1](stream, dtype)) < DTYPES[dtype]
        stream = x.clone()
        assert error(step.add_norm(stream, None, None, weight, 1e-5, dtype), norms[1](x, dtype)) < DTYPES[dtype]
        assert torch.equal(stream, x)
        assert step.add_norm(stream, added, None, None, 1e-5, dtype).numel() == 0
        assert torch.equal(stream, x + added.float())


@pytest.mark.parametrize("dtype", list(DTYPES), ids=str)
@pytest.mark.parametrize("size", [96, 1024, 1500])
def test_swiglu_of_any_width(size: int, dtype: torch.dtype) -> None:
    gate_up = randn(3, 2 * size, dtype=dtype) * 20
    gate, up = gate_up.double().chunk(2, -1)
    assert error(step.swiglu(gate_up), torch.nn.functional.silu(gate) * up) < DTYPES[dtype]


def test_heads_without_code_are_named() -> None:
    assert "80 dimensions, not a power of two" in step.problem(Heads(4, 2, 80, 40))
    assert step.problem(HEADS["the 9B's"]) == ""
