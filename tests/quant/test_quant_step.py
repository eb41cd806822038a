"""What lies between a layer's products on a GPU, against float64: on a GPU where there is one, else interpreted."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from glm4lite_quant.kernels.decoder import CacheView, Heads

CUDA = torch.cuda.is_available()
pytest.importorskip("triton", reason="triton is not installed: the GPU kernels are not tested")
if not CUDA and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("no CUDA device, and TRITON_INTERPRET=1 is not set (tests/conftest.py does)", allow_module_level=True)

from glm4lite_quant.kernels import triton_step as step  # noqa: E402

DEVICE = "cuda" if CUDA else "cpu"
DTYPES = {torch.float32: 1e-6, torch.bfloat16: 1e-2}
HEADS = {
    "the 9B's": Heads(32, 2, 128, 64),
    "the 32B's": Heads(48, 2, 128, 64),
    "three queries each, all rotated": Heads(6, 2, 16, 16),
    "one query each": Heads(4, 4, 32, 16),
}
CAPACITY = 192


@pytest.fixture(autouse=True)
def seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    if not CUDA:
        monkeypatch.setattr(step, "PARTS", 8)  # the interpreter runs them in turn


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).abs().max() / want.double().abs().max())


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [heads, dim] in float64, adjacent pairs turned."""
    x, width = x.double().clone(), 2 * cos.shape[0]
    even, odd = x[:, 0:width:2].clone(), x[:, 1:width:2].clone()
    x[:, 0:width:2], x[:, 1:width:2] = even * cos - odd * sin, odd * cos + even * sin
    return x


def attended(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """q [kv, group, dim], keys and values [kv, length, dim] -> [kv * group * dim]."""
    scores = q @ keys.transpose(1, 2) * q.shape[-1] ** -0.5
    return (scores.softmax(-1) @ values).flatten()


@pytest.mark.parametrize("length", [0, 63, 64, 150])
@pytest.mark.parametrize("dtype", list(DTYPES), ids=str)
@pytest.mark.parametrize("name", list(HEADS))
def test_attention_over_a_cache_of_any_length(name: str, dtype: torch.dtype, length: int) -> None:
    heads = HEADS[name]
    keys, values = (randn(heads.key_value, CAPACITY, heads.dim, dtype=dtype) for _ in range(2))
    keys[:, length:] = values[:, length:] = float("nan")  # what is beyond must not be read
    past_keys, past_values = keys[:, :length].double(), values[:, :length].double()
    q, k, v = (randn(h * heads.dim, dtype=dtype) for h in (heads.query, heads.key_value, heads.key_value))
    angles = randn(heads.rotary_dim // 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    turned = [rotated(x.view(-1, heads.dim), cos.double(), sin.double()) for x in (q, k)]
    scratch, at = step.AttentionScratch(heads, torch.device(DEVICE)), torch.tensor(length, dtype=torch.int32)
    out = step.attend(q, k, v, (cos, sin), CacheView(keys, values, None, None, 0), at.to(DEVICE), scratch)
    want = attended(
        turned[0].view(heads.key_value, -1, heads.dim),
        torch.cat((past_keys, turned[1][:, None]), 1),
        torch.cat((past_values, v.view(heads.key_value, 1, -1).double()), 1),
    )
    assert error(out, want) < 2 * DTYPES[dtype]  # q is rounded once more when it has turned
    assert error(keys[:, length], turned[1]) < DTYPES[dtype]
    assert torch.equal(values[:, length], v.view(heads.key_value, -1))
    assert bool(keys[:, length + 1 :].isnan().all())


@pytest.mark.parametrize("length", [0, 37])
def test_an_int8_cache_is_written_and_read_as_the_others_do(length: int) -> None:
    from glm4lite.model.cache import PackedLayerCache

    heads, device = HEADS["the 9B's"], torch.device(DEVICE)
    cache = PackedLayerCache(True)
    past = [randn(1, heads.key_value, length, heads.dim) for _ in range(2)]
    if length:
        cache.append(*past)
    view = cache.view(1, heads, device, torch.float32)
    q, k, v = (randn(h * heads.dim) for h in (heads.query, heads.key_value, heads.key_value))
    rotary = (torch.ones(32, device=DEVICE), torch.zeros(32, device=DEVICE))
    at = torch.tensor(length, dtype=torch.int32, device=DEVICE)
    out = step.attend(q, k, v, rotary, view, at, step.AttentionScratch(heads, device))
    cache.length += 1
    twin = PackedLayerCache(True)
    if length:
        twin.append(*past)
    keys, values = twin.append(k.view(1, heads.key_value, 1, -1), v.view(1, heads.key_value, 1, -1))
    own = cache.append(k.new_zeros(1, heads.key_value, 1, heads.dim), k.new_zeros(1, heads.key_value, 1, heads.dim))
    for got, stored in ((own[0], keys), (own[1], values)):  # a GPU divides otherwise than torch: a code may differ
        assert torch.equal(got[:, :, :-1], stored) if not CUDA else error(got[:, :, :-1], stored) < 1.01 / 127
    want = attended(q.view(heads.key_value, -1, heads.dim).double(), keys[0].double(), values[0].double())
    assert error(out, want) < 1e-5


@pytest.mark.parametrize("dtype", list(DTYPES), ids=str)
def test_norms_join_the_residual_stream_in_the_references_order(dtype: torch.dtype) -> None:
    from glm4lite.model.layers import RMSNorm

    size = 6144 if CUDA else 200
    norms = [RMSNorm(size, 1e-5).to(DEVICE) for _ in range(2)]
    for norm in norms:
        torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    post, weight = (norm.weight.detach() for norm in norms)
    x, added = randn(size) * 100, randn(size, dtype=dtype) * 1000
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
    gate_up = randn(2 * size, dtype=dtype) * 20
    gate, up = gate_up.double().chunk(2)
    assert error(step.swiglu(gate_up), torch.nn.functional.silu(gate) * up) < DTYPES[dtype]


def test_heads_without_code_are_named() -> None:
    assert "80 dimensions, not a power of two" in step.problem(Heads(4, 2, 80, 40))
    assert step.problem(HEADS["the 9B's"]) == ""
