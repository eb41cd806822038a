"""A decoder layer in one native call against the same layer in plain torch, for every ISA this host has."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from glm4lite_quant import QuantConfig, QuantError, QuantTensor
from glm4lite_quant.kernels import native
from glm4lite_quant.kernels.decoder import BIASES, NORMS, WEIGHTS, CacheView, DecoderKernel, Heads, run

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
def test_a_prompt_in_parts_gives_what_it_gives_at_once(isa: str, int8: bool) -> None:
    heads = HEADS["three queries each"]
    kernel, whole, parts = layer_of(Shape(heads)).kernel(), Cache.empty(heads, 200, int8), Cache.empty(heads, 200, int8)
    x, (cos, sin) = torch.randn(200, HIDDEN), turns(heads, 200)
    once, split = x.clone(), x.clone()
    run([kernel], [whole.view()], once, cos, sin)
    for start, stop in ((0, 1), (1, 90), (90, 91), (91, 200)):
        run([kernel], [replace(parts, length=start).view()], split[start:stop], cos[start:stop], sin[start:stop])
    torch.testing.assert_close(split, once, rtol=1e-4, atol=1e-4)
    assert torch.equal(whole.values, parts.values)
    assert torch.equal(whole.keys, parts.keys)


@pytest.mark.parametrize("int8", [False, True], ids=["float", "int8"])
@pytest.mark.parametrize("past", [3, 509, 1021])  # a border between two ranges of the past falls within the step
def test_a_step_of_a_few_tokens_gives_each_the_bits_it_has_alone(isa: str, int8: bool, past: int) -> None:
    heads = HEADS["three queries each"]
    kernel, together, alone = layer_of(Shape(heads)).kernel(), *(Cache.empty(heads, past + 8, int8) for _ in range(2))
    for cache in (together, alone):
        torch.manual_seed(past)
        cache.invent(past)
    x, (cos, sin) = torch.randn(8, HIDDEN), turns(heads, 8)
    for tokens in (8, 5, 2):
        at_once, one_by_one = x[:tokens].clone(), x[:tokens].clone()
        run([kernel], [together.view()], at_once, cos[:tokens], sin[:tokens])
        for t in range(tokens):
            at = replace(alone, length=past + t).view()
            run([kernel], [at], one_by_one[t : t + 1], cos[t : t + 1], sin[t : t + 1])
        assert torch.equal(at_once, one_by_one)


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
    with pytest.raises(QuantError, match="do not fit 2 caches"):
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
