"""The calibrated search: native and reference bytes, its gain on the weighted error, and what importance may not be."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from glm4lite_quant import QuantConfig, QuantError, QuantTensor
from glm4lite_quant.kernels import native

HAVE = native._library()
GROUPS = (32, 64, 128)


@pytest.fixture(params=[*native.ISAS, "reference"])
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    name = str(request.param)
    if name == "reference":
        monkeypatch.setattr(native, "backend", lambda: None)
        return name
    if name not in HAVE.isas:
        pytest.skip(f"no native {name} here: {HAVE.problem}")
    monkeypatch.setenv("GLM4LITE_ISA", name)
    return name


def weight(n: int, k: int) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(n, k) * torch.exp(torch.randn(n, 1))


def importance(k: int) -> Tensor:
    """Of three decades, as the inputs of a language model's layers are."""
    return torch.exp(2 * torch.randn(k, generator=torch.Generator().manual_seed(1)))


def quantized(w: Tensor, group: int, importance: Tensor | None = None) -> QuantTensor:
    out = QuantTensor.empty(w.shape[0], w.shape[1], QuantConfig(4, group))
    out.quantize_rows(0, w, importance)
    return out


def same(a: QuantTensor, b: QuantTensor) -> bool:
    return all(torch.equal(t, b.tensors()[name]) for name, t in a.tensors().items())


@pytest.mark.parametrize("group", GROUPS)
def test_it_beats_the_plain_search_on_the_weighted_error(isa: str, group: int) -> None:
    w, by = weight(48, 512), importance(512)
    plain, calibrated = (((quantized(w, group, how).dequantize() - w).square() * by).sum() for how in (None, by))
    assert float(calibrated) < 0.75 * float(plain)
    plain, even = (((quantized(w, group, how).dequantize() - w).square()).sum() for how in (None, torch.ones(512)))
    assert float(even) < 0.99 * float(plain)


@pytest.mark.skipif(HAVE.cdll is None, reason=f"no native library: {HAVE.problem}")
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_isa_gives_the_reference_bytes(group: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    for n, k in ((1, 128), (37, 384), (160, 640)):
        w, by = weight(n, k), importance(k)
        w[n // 2, : k // 2], w[0], by[:group], by[-1] = 0, 0.25, 0, 1e9
        w[n - 1] *= 1e-36
        w[n // 3] *= 1e14
        results = []
        for isa in HAVE.isas:
            monkeypatch.setenv("GLM4LITE_ISA", isa)
            results.append(quantized(w.to(dtype), group, by))
        with monkeypatch.context() as patch:
            patch.setattr(native, "backend", lambda: None)
            expected = quantized(w.to(dtype), group, by)
        assert bool(expected.dequantize().isfinite().all())
        assert all(same(result, expected) for result in results), (n, k)


def test_rows_in_parts_and_on_other_threads_give_the_same_bytes(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    w, by = weight(75, 1024), importance(1024)
    whole, parts = quantized(w, 32, by), QuantTensor.empty(75, 1024, QuantConfig())
    monkeypatch.setenv("GLM4LITE_THREADS", "1")
    for start, stop in ((64, 75), (0, 16), (16, 64)):
        parts.quantize_rows(start, w[start:stop], by)
    assert same(whole, parts)


def test_only_the_proportions_of_importance_count(isa: str) -> None:
    w, by = weight(32, 256), importance(256)
    assert same(quantized(w, 32, by), quantized(w, 32, by * 2.0**40))
    assert same(quantized(w, 32, by), quantized(w, 32, by * 2.0**-40))


def test_importance_of_zero_everywhere_counts_evenly(isa: str) -> None:
    w = weight(32, 256)
    assert same(quantized(w, 32, torch.zeros(256)), quantized(w, 32, torch.ones(256)))


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
def test_importance_that_is_no_mean_of_squares_is_refused(isa: str, value: float) -> None:
    by = importance(256)
    by[200] = value
    with pytest.raises(QuantError, match="importance holds a number that is negative or not finite"):
        quantized(weight(16, 256), 32, by)


@pytest.mark.parametrize("shape", [(128,), (256, 1), (0,), ()])
def test_importance_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(QuantError, match=r"importance has shape .*; expected one number for each of 256"):
        quantized(weight(16, 256), 32, torch.ones(shape))


def test_a_weight_that_is_not_finite_is_named_with_its_place(isa: str) -> None:
    w = weight(64, 128)
    w[41, 77] = w[50, 3] = math.nan
    with pytest.raises(QuantError, match="row 41, column 77"):
        quantized(w, 32, importance(128))


def test_int8_takes_no_notice_of_importance() -> None:
    w = weight(32, 256)
    plain, given = (QuantTensor.empty(32, 256, QuantConfig(8)) for _ in range(2))
    plain.quantize_rows(0, w)
    given.quantize_rows(0, w, importance(256))
    assert same(plain, given)


def test_the_whole_range_is_the_first_cut_of_the_search(isa: str) -> None:
    w = weight(32, 256)
    fast = QuantTensor.quantize(w, QuantConfig(4, method="minmax"))
    off = (fast.dequantize() - w).abs().unflatten(1, (-1, 32)).amax(2)
    groups = w.unflatten(1, (-1, 32))
    assert bool(
        (off <= 0.035 * (groups.amax(2) - groups.amin(2).clamp(max=0)) + w.abs().amax(1, keepdim=True) / 255).all()
    )
    assert float((fast.dequantize() - w).square().sum()) > float((quantized(w, 32).dequantize() - w).square().sum())
