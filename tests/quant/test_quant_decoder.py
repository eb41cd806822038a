"""A decoder layer in one native call against the same layer in plain torch, for every ISA this host has."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import lru_cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from glm4lite_quant import QuantConfig, QuantError, QuantTensor
from glm4lite_quant.kernels import native
from glm4lite_quant.kernels.decoder import BIASES, BLOCK, NORMS, WEIGHTS, CacheView, DecoderKernel, Heads, SpanRows
from glm4lite_quant.kernels.decoder import run as run_spans

HAVE = native._library()
HIDDEN, INNER, EPS = 96, 160, 1e-5
INT8 = QuantConfig(8, 32)
HEADS = {
    "one kv head each": Heads(2, 2, 64, 32),
    "two queries each": Heads(4, 2, 16, 8),
    "three queries each": Heads(6, 2, 128, 128),
    "the 9B's sixteen": Heads(32, 2, 16, 8),
    "the 32B's twenty-four": Heads(24, 1, 32, 16),
    "wide heads": Heads(2, 1, 256, 64),
}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(1)


@pytest.fixture(params=native.ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    name = str(request.param)
    if name not in HAVE.isas:
        pytest.skip(f"this host has no {name}" if HAVE.cdll else f"no native library: {HAVE.problem}")
    monkeypatch.setenv("GLM4LITE_ISA", name)
    return name


@dataclass
class Cache:
    """Keys and values as the library keeps them; `read` gives them as [kv_heads, length, head_dim]."""

    keys: Tensor
    values: Tensor
    scales: tuple[Tensor, Tensor] | None
    length: int = 0

    @classmethod
    def empty(cls, heads: Heads, tokens: int, int8: bool) -> Cache:
        capacity, dtype = -(-tokens // 16) * 16, torch.int8 if int8 else torch.float32
        keys = torch.zeros(heads.key_value, capacity // 16, heads.dim, 16, dtype=dtype)
        values = torch.zeros(heads.key_value, capacity, heads.dim, dtype=dtype)
        sizes = (torch.zeros(heads.key_value, capacity), torch.zeros(heads.key_value, capacity))
        return cls(keys, values, sizes if int8 else None)

    def view(self) -> CacheView:
        key_scale, value_scale = self.scales or (None, None)
        return CacheView(self.keys, self.values, key_scale, value_scale, self.length)

    def read(self) -> tuple[Tensor, Tensor]:
        both = [self.keys.transpose(2, 3).flatten(1, 2).double(), self.values.double()]
        if self.scales is not None:
            both = [codes * scale[..., None] for codes, scale in zip(both, self.scales, strict=True)]
        return both[0][:, : self.length], both[1][:, : self.length]

    def invent(self, tokens: int) -> None:
        """A past of random tokens."""
        for part in (self.keys, self.values):
            part.copy_(torch.randint(-127, 128, part.shape) if self.scales else torch.randn(part.shape))
        for scale in self.scales or ():
            scale.fill_(1 / 64)
        self.length = tokens


@dataclass(frozen=True)
class Shape:
    heads: Heads
    config: QuantConfig = INT8
    sandwich: bool = True
    bias: bool = True


class Layer:
    """Random parts of one layer and what they make of an input, in float64 and with inputs that are not rounded."""

    def __init__(self, shape: Shape) -> None:
        self.heads = shape.heads
        torch.manual_seed(0)
        q, kv = self.heads.query * self.heads.dim, self.heads.key_value * self.heads.dim
        shapes = [(q, HIDDEN), (kv, HIDDEN), (kv, HIDDEN), (HIDDEN, q), (2 * INNER, HIDDEN), (HIDDEN, INNER)]
        self.weights = {
            name: QuantTensor.quantize(torch.randn(n, k) / k**0.5, shape.config)
            for name, (n, k) in zip(WEIGHTS, shapes, strict=True)
        }
        self.biases: dict[str, Tensor | None] = {
            name: torch.randn(self.weights[name].shape[0]) / 4 if shape.bias else None for name in BIASES
        }
        self.norms: dict[str, Tensor | None] = {name: torch.rand(HIDDEN) + 0.5 for name in NORMS}
        if not shape.sandwich:
            self.norms["post_self_attn"] = self.norms["post_mlp"] = None

        self.dense = {name: weight.dequantize().double() for name, weight in self.weights.items()}

    def kernel(self) -> DecoderKernel:
        made = DecoderKernel.of(self.weights, self.biases, self.norms, EPS, self.heads, qkv_splits=2)
        assert made is not None
        return made

    def linear(self, name: str, x: Tensor) -> Tensor:
        bias = self.biases.get(name)
        return F.linear(x, self.dense[name], None if bias is None else bias.double())

    def norm(self, name: str, x: Tensor) -> Tensor:
        weight = self.norms[name]
        return x if weight is None else x * (x.pow(2).mean(-1, keepdim=True) + EPS).rsqrt() * weight.double()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, past: tuple[Tensor, Tensor]) -> Tensor:
        """x [T, hidden] after the tokens whose keys and values [kv_heads, past, head_dim] are `past`."""
        heads, x = self.heads, x.double()
        h = self.norm("input", x)
        q, k, v = (self.linear(name, h).unflatten(-1, (-1, heads.dim)).transpose(0, 1) for name in "qkv")
        keys = torch.cat((past[0], rotated(k, cos, sin)), 1).repeat_interleave(heads.query // heads.key_value, 0)
        values = torch.cat((past[1], v), 1).repeat_interleave(heads.query // heads.key_value, 0)
        seen = torch.ones(len(x), keys.shape[1], dtype=torch.bool).tril(past[0].shape[1])
        attended = F.scaled_dot_product_attention(rotated(q, cos, sin), keys, values, attn_mask=seen)
        x = x + self.norm("post_self_attn", self.linear("o", attended.transpose(0, 1).flatten(1)))
        gate, up = self.linear("gate_up", self.norm("post_attention", x)).chunk(2, -1)
        return x + self.norm("post_mlp", self.linear("down", F.silu(gate) * up))


def run(kernels: list[DecoderKernel], caches: list[CacheView], x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """One sequence's rows, in place."""
    run_spans(kernels, [SpanRows(len(x), caches)], x, cos, sin)


@lru_cache
def layer_of(shape: Shape) -> Layer:
    """Made once: quantizing takes longer than all else here."""
    return Layer(shape)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[heads, T, dim]: adjacent pairs of the first dims are turned by the angles of cos and sin [T, rotary_dim / 2]."""
    turned = 2 * cos.shape[1]
    even, odd = x[..., 0:turned:2], x[..., 1:turned:2]
    pairs = torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1)
    return torch.cat((pairs.flatten(-2), x[..., turned:]), -1)


def turns(heads: Heads, tokens: int) -> tuple[Tensor, Tensor]:
    angles = torch.randn(tokens, heads.rotary_dim // 2) * 3
    return angles.cos(), angles.sin()


def fits(layer: Layer, cache: Cache, tokens: int, tolerance: float) -> None:
    """`tokens` more go through; what the layer adds differs from torch's by `tolerance` of its size at most."""
    x, (cos, sin) = torch.randn(tokens, HIDDEN), turns(layer.heads, tokens)
    want = layer.forward(x, cos, sin, cache.read()) - x
    out = x.clone()
    run([layer.kernel()], [cache.view()], out, cos, sin)
    cache.length += tokens
    assert float((out - x - want).norm() / want.norm()) < tolerance


@pytest.mark.parametrize("int8", [False, True], ids=["float", "int8"])
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS.keys())
def test_every_shape_of_heads_gives_torchs_numbers(isa: str, heads: Heads, int8: bool) -> None:
    layer, cache = layer_of(Shape(heads)), Cache.empty(heads, 64, int8)
    for tokens in (5, 1, 1, 40, 1):
        fits(layer, cache, tokens, 0.02)


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "biases"])
@pytest.mark.parametrize("sandwich", [False, True], ids=["two norms", "four norms"])
@pytest.mark.parametrize("bits", [4, 8])
def test_every_kind_of_layer_gives_torchs_numbers(isa: str, bits: int, sandwich: bool, bias: bool) -> None:
    heads = HEADS["two queries each"]
    layer = layer_of(Shape(heads, QuantConfig(bits, 32), sandwich, bias))
    cache = Cache.empty(heads, 20, False)
    for tokens in (17, 1):
        fits(layer, cache, tokens, 0.02)


def test_each_linear_may_have_bits_and_groups_of_its_own(isa: str) -> None:
    heads = HEADS["two queries each"]
    layer, cache = Layer(Shape(heads)), Cache.empty(heads, 20, False)
    codecs = {"q": (5, 32), "k": (8, 32), "v": (4, 32), "o": (3, 64), "gate_up": (3, 32), "down": (6, 32)}
    for name, (bits, group) in codecs.items():
        n, k = layer.weights[name].shape
        layer.weights[name] = QuantTensor.quantize(torch.randn(n, k) / k**0.5, QuantConfig(bits, group))
        layer.dense[name] = layer.weights[name].dequantize().double()
    for tokens in (17, 1):
        fits(layer, cache, tokens, 0.02)


@pytest.mark.parametrize("int8", [False, True], ids=["float", "int8"])
def test_a_long_past_is_read_in_ranges_that_are_merged(isa: str, int8: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    heads = HEADS["the 9B's sixteen"]
    layer = layer_of(Shape(heads))
    for threads in ("1", "2"):
        monkeypatch.setenv("GLM4LITE_THREADS", threads)
        for past, tokens in ((2063, 1), (2305, 3), (1030, 40)):
            cache = Cache.empty(heads, past + tokens, int8)
            cache.invent(past)
            fits(layer, cache, tokens, 0.02)


@pytest.mark.parametrize("int8", [False, True], ids=["float", "int8"])
@pytest.mark.parametrize("heads", ["three queries each", "the 9B's sixteen", "the 32B's twenty-four"])
def test_a_row_has_the_bits_it_has_alone_whatever_goes_beside_it(
    isa: str, heads: str, int8: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sequences in random chunks and random company, on any number of threads, against each id by id."""
    shape, chance = HEADS[heads], random.Random(heads)
    kernel = layer_of(Shape(shape)).kernel()
    pasts, lengths = (0, 3, 509, 1021, 2040), (140, 9, 60, 8, 1)  # borders between ranges fall within some
    sequences = [Sequence.random(kernel, past, length, int8) for past, length in zip(pasts, lengths, strict=True)]
    for _ in range(4):
        monkeypatch.setenv("GLM4LITE_THREADS", chance.choice("12"))
        for sequence in sequences:
            sequence.begin()
        while waiting := [sequence for sequence in sequences if sequence.left]:
            joined = chance.sample(waiting, chance.randint(1, len(waiting)))
            step(kernel, [(one, min(one.left, chance.choice((1, 2, 7, 8, 9, 33, 140)))) for one in joined])
        for sequence in sequences:
            assert torch.equal(sequence.out, sequence.alone)


@dataclass
class Sequence:
    """New rows behind a past, as far as they are computed, and what each becomes alone."""

    cache: Cache
    past: int
    x: Tensor
    turns: tuple[Tensor, Tensor]
    alone: Tensor
    out: Tensor
    done: int = 0

    @classmethod
    def random(cls, kernel: DecoderKernel, past: int, length: int, int8: bool) -> Sequence:
        cache = Cache.empty(kernel.heads, past + length, int8)
        cache.invent(past)
        x = torch.randn(length, HIDDEN)
        made = cls(cache, past, x, turns(kernel.heads, length), x, x)
        made.begin()
        for _ in range(length):
            step(kernel, [(made, 1)])
        made.alone = made.out
        return made

    @property
    def left(self) -> int:
        return len(self.x) - self.done

    def begin(self) -> None:
        self.out, self.done, self.cache.length = self.x.clone(), 0, self.past

    def next(self, count: int) -> slice:
        return slice(self.done, self.done + count)


def step(kernel: DecoderKernel, joined: list[tuple[Sequence, int]]) -> None:
    """So many more rows of each go through in one call."""
    spans = [SpanRows(count, [one.cache.view()]) for one, count in joined]
    x = torch.cat([one.out[one.next(count)] for one, count in joined])
    cos, sin = (torch.cat([one.turns[which][one.next(count)] for one, count in joined]) for which in (0, 1))
    run_spans([kernel], spans, x, cos, sin)
    for (one, count), rows in zip(joined, x.split([count for _, count in joined]), strict=True):
        one.out[one.next(count)] = rows
        one.done += count
        one.cache.length += count


@pytest.mark.parametrize("int8", [False, True], ids=["float", "int8"])
def test_blocks_that_lie_anywhere_give_the_bits_of_memory_in_one_piece(isa: str, int8: bool) -> None:
    heads, tokens, past = HEADS["two queries each"], 150, 530
    kernel, whole = layer_of(Shape(heads)).kernel(), Cache.empty(heads, 704, int8)
    whole.invent(past)
    count = whole.view().capacity // BLOCK
    table = torch.randperm(2 * count)[:count].to(torch.int32)
    pooled = in_blocks(whole, table)
    x, (cos, sin) = torch.randn(tokens, HIDDEN), turns(heads, tokens)
    one, other = x.clone(), x.clone()
    run([kernel], [whole.view()], one, cos, sin)
    run([kernel], [pooled], other, cos, sin)
    assert torch.equal(one, other)
    after = in_blocks(whole, table)
    used = [(pooled.keys, after.keys), (pooled.values, after.values)]
    if int8:
        used += [(pooled.key_scale, after.key_scale), (pooled.value_scale, after.value_scale)]  # type: ignore[list-item]
    for written, expected in used:
        assert torch.equal(written, expected)  # and no other block was touched


def in_blocks(cache: Cache, table: Tensor) -> CacheView:
    """The same keys and values in memory cut into blocks, of which `table` says the places."""
    blocks, (kv_heads, _, dim) = 2 * len(table), cache.values.shape
    keys = torch.zeros(blocks, kv_heads, BLOCK // 16, dim, 16, dtype=cache.keys.dtype)
    keys[table] = cache.keys.unflatten(1, (-1, BLOCK // 16)).transpose(0, 1)
    values = torch.zeros(blocks, kv_heads, BLOCK, dim, dtype=cache.values.dtype)
    values[table] = cache.values.unflatten(1, (-1, BLOCK)).transpose(0, 1)
    if cache.scales is None:
        return CacheView(keys, values, None, None, cache.length, table)
    scales = torch.zeros(2, blocks, kv_heads, BLOCK)
    for to, scale in zip(scales, cache.scales, strict=True):
        to[table] = scale.unflatten(1, (-1, BLOCK)).transpose(0, 1)
    return CacheView(keys, values, scales[0], scales[1], cache.length, table)


def test_layers_run_one_after_another(isa: str) -> None:
    heads = HEADS["two queries each"]
    kernel, x, (cos, sin) = layer_of(Shape(heads)).kernel(), torch.randn(9, HIDDEN), turns(heads, 9)
    one_by_one, at_once = x.clone(), x.clone()
    for _ in range(3):
        run([kernel], [Cache.empty(heads, 9, False).view()], one_by_one, cos, sin)
    run([kernel] * 3, [Cache.empty(heads, 9, False).view() for _ in range(3)], at_once, cos, sin)
    assert torch.equal(one_by_one, at_once)


@pytest.mark.skipif(HAVE.cdll is None, reason=f"no native library: {HAVE.problem}")
def test_what_does_not_fit_is_refused() -> None:
    heads = HEADS["two queries each"]
    layer = layer_of(Shape(heads))
    cache, x, (cos, sin) = Cache.empty(heads, 16, False), torch.zeros(17, HIDDEN), turns(heads, 17)
    with pytest.raises(QuantError, match="a cache of 16 tokens holds 0: 17 more do not fit"):
        run([layer.kernel()], [cache.view()], x, cos, sin)
    with pytest.raises(QuantError, match="must be contiguous float32"):
        run([layer.kernel()], [cache.view()], x[:9].double(), cos[:9], sin[:9])
    for wrong in (x[:9, :64].contiguous(), x[:8]):
        with pytest.raises(QuantError, match="do not fit"):
            run([layer.kernel()], [cache.view()], wrong, cos[:9], sin[:9])
    with pytest.raises(QuantError, match=r"do not fit 9 rows of \[2\] caches"):
        run([layer.kernel()], [cache.view()] * 2, x[:9], cos[:9], sin[:9])


@pytest.mark.skipif(HAVE.cdll is None, reason=f"no native library: {HAVE.problem}")
def test_a_layer_whose_parts_do_not_fit_each_other_is_left_to_torch() -> None:
    heads = HEADS["two queries each"]
    layer = layer_of(Shape(heads))

    def fits_native(**other: object) -> bool:
        parts = {"weights": layer.weights, "biases": layer.biases, "norms": layer.norms, "heads": heads} | other
        return DecoderKernel.of(parts["weights"], parts["biases"], parts["norms"], EPS, parts["heads"]) is not None  # type: ignore[arg-type]

    assert fits_native()
    assert not fits_native(heads=Heads(4, 2, 24, 8))
    assert not fits_native(heads=Heads(4, 2, 16, 32))
    assert not fits_native(heads=Heads(2, 2, 16, 8))
    assert not fits_native(norms=layer.norms | {"input": None})
    assert not fits_native(norms=layer.norms | {"post_mlp": torch.ones(HIDDEN - 1)})
    assert not fits_native(biases=layer.biases | {"k": torch.ones(3)})
    assert not fits_native(weights=layer.weights | {"down": layer.weights["o"]})
