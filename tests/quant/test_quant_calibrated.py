"""The calibrated search: native and reference bytes, its gain on the output's error, and what inputs may not be."""

from __future__ import annotations

import math
import time

import pytest
import torch
from torch import Tensor

from glm4lite_quant import Inputs, QuantConfig, QuantError, QuantTensor
from glm4lite_quant.inputs import BLOCK, DAMPING, RANK, SHRINK, WHOLE, Feedback
from glm4lite_quant.kernels import native

HAVE = native._library()
GROUPS = (32, 64, 128)


@pytest.fixture(autouse=True)
def in_blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small matrices are taken in blocks, as large ones are."""
    if "whole_block" not in request.node.name:
        monkeypatch.setattr("glm4lite_quant.inputs.WHOLE", BLOCK)


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


def tokens(count: int, k: int, seed: int = 2) -> Tensor:
    """Inputs [count, k] of columns that go together, in a few directions and with their neighbours."""
    random, chance = (torch.Generator().manual_seed(number) for number in (1, seed))
    mixing = torch.randn(24, k, generator=random) / 4
    x = torch.randn(count, 24, generator=chance) @ mixing + torch.randn(count, k, generator=chance) / 2
    x[:, 1:] += 0.8 * x[:, :-1]
    return x * torch.exp(torch.randn(k, generator=random))


def quantized(w: Tensor, group: int, inputs: Inputs | Tensor | None = None, bits: int = 4) -> QuantTensor:
    """inputs: a Tensor is the mean square of each column."""
    out = QuantTensor.empty(w.shape[0], w.shape[1], QuantConfig(bits, group))
    out.quantize_rows(0, w, Inputs(inputs) if isinstance(inputs, Tensor) else inputs)
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
        parts.quantize_rows(start, w[start:stop], Inputs(by))
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
    with pytest.raises(QuantError, match="the mean squares hold a number that is negative or not finite"):
        quantized(weight(16, 256), 32, by)


@pytest.mark.parametrize("shape", [(128,), (256, 1), (0,), ()])
def test_importance_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(QuantError, match=r"mean squares have shape .*; expected one number for each of 256"):
        quantized(weight(16, 256), 32, torch.ones(shape))


def test_a_weight_that_is_not_finite_is_named_with_its_place(isa: str) -> None:
    w = weight(64, 128)
    w[41, 77] = w[50, 3] = math.nan
    with pytest.raises(QuantError, match="row 41, column 77"):
        quantized(w, 32, importance(128))


def test_int8_takes_no_notice_of_inputs() -> None:
    w = weight(32, 256)
    plain, given = (QuantTensor.empty(32, 256, QuantConfig(8)) for _ in range(2))
    plain.quantize_rows(0, w)
    given.quantize_rows(0, w, Inputs.of(tokens(64, 256)))
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


# --- feedback: what rounding a column loses, those behind it make up for


WEIGHTS = {
    "normal": weight,
    "of heavy tails": lambda n, k: weight(n, k) ** 3,
    "all above zero": lambda n, k: weight(n, k).abs() + 0.1,
    "of whole numbers": lambda n, k: (4 * weight(n, k)).round(),
}


def output_error(w: Tensor, made: QuantTensor, x: Tensor) -> float:
    return float(((made.dequantize() - w) @ x.T).square().sum())


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize(("bits", "group"), [(2, 32), (3, 32), (4, 32), (4, 64), (4, 128), (5, 64), (6, 128)])
def test_feedback_makes_the_error_of_other_tokens_outputs_smaller(bits: int, group: int, kind: str) -> None:
    w, inputs, others = WEIGHTS[kind](64, 640), Inputs.of(tokens(1024, 640)), tokens(1024, 640, seed=3)
    plain = output_error(w, quantized(w, group, inputs.mean_square, bits), others)
    assert output_error(w, quantized(w, group, inputs, bits), others) < 0.7 * plain


@pytest.mark.skipif(HAVE.cdll is None, reason=f"no native library: {HAVE.problem}")
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6])
@pytest.mark.parametrize("group", GROUPS)
def test_feedback_gives_the_reference_bytes_on_every_isa(
    bits: int, group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for n, k in ((1, 128), (37, 384 + group)):
        w, x = weight(n, k), tokens(96, k)
        x[:, :group], x[:, -1] = 0, 1e4
        w[n // 2, : k // 2], w[0] = 0, 0.25
        w[n - 1] *= 1e-36
        w[n // 3] *= 1e14
        inputs, results = Inputs.of(x), []
        for isa in HAVE.isas:
            monkeypatch.setenv("GLM4LITE_ISA", isa)
            results.append(quantized(w, group, inputs, bits))
        with monkeypatch.context() as patch:
            patch.setattr(native, "backend", lambda: None)
            expected = quantized(w, group, inputs, bits)
        assert bool(expected.dequantize().isfinite().all())
        assert all(same(result, expected) for result in results), (n, k)


def test_feedback_in_parts_and_on_other_threads_gives_the_same_bytes(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    w, inputs = weight(75, 512), Inputs.of(tokens(256, 512))
    whole, parts = quantized(w, 32, inputs), QuantTensor.empty(75, 512, QuantConfig())
    monkeypatch.setenv("GLM4LITE_THREADS", "1")
    for start, stop in ((64, 75), (0, 16), (16, 64)):
        parts.quantize_rows(start, w[start:stop], inputs)
    assert same(whole, parts)


@pytest.mark.skipif(HAVE.cdll is None, reason=f"no native library: {HAVE.problem}")
def test_feedback_takes_at_most_five_times_as_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLM4LITE_THREADS", "1")
    w, inputs = weight(128, 2048), Inputs.of(tokens(64, 2048))

    def seconds(given: Inputs) -> float:
        begin = time.process_time()
        quantized(w, 32, given)
        return time.process_time() - begin

    plain, made = (min(seconds(given) for _ in range(3)) for given in (Inputs(inputs.mean_square), inputs))
    assert made < 5 * plain  # twice with AVX-512


def test_blocks_and_sums_do_what_one_cholesky_factor_of_the_whole_matrix_does() -> None:
    k, x = 3 * BLOCK + 32, tokens(700, 3 * BLOCK + 32)
    feedback = Inputs.of(x).feedback
    assert feedback is not None
    unit = x.double().square().mean()
    covariance = x.double().T @ x.double() / len(x) / unit
    own = torch.block_diag(*[torch.ones(len(part), len(part)) for part in torch.arange(k).split(BLOCK)]).double()
    v = feedback.into.double()
    h = torch.where(own > 0, (1 - SHRINK) * covariance, v @ v.T)
    h.diagonal().copy_(covariance.diagonal() + DAMPING)
    factor = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    w = weight(5, k).double()
    dense, values = w.clone(), torch.empty_like(w)  # of dense, column i is as it was before it was rounded
    for i in range(k):
        values[:, i] = (dense[:, i] * 4).round() / 4
        error = (dense[:, i] - values[:, i]) / factor[i, i]
        dense[:, i + 1 :] -= error[:, None] * factor[i, i + 1 :]
    sums = torch.zeros(5, RANK).double()
    for first in range(0, k, BLOCK):
        last = min(first + BLOCK, k)
        begun = w[:, first:last] - sums @ feedback.onto[first * RANK : last * RANK].view(RANK, -1).double()
        for i in range(first, last):
            torch.testing.assert_close(begun[:, i - first], dense[:, i], rtol=1e-3, atol=1e-3)
            lost = begun[:, i - first] - values[:, i]
            begun[:, i - first + 1 :] -= lost[:, None] * feedback.within[i, i - first + 1 : last - first].double()
        sums += (values[:, first:last] - w[:, first:last]) @ v[first:last]


DEGENERATE = {
    "one token": lambda: tokens(1, 448),
    "the same token again and again": lambda: tokens(1, 448).expand(200, 448),
    "fewer directions than are kept": lambda: tokens(300, 448)[:, :3] @ torch.randn(3, 448),
    "columns that are never used": lambda: tokens(300, 448) * (torch.arange(448) % 3 == 0),
    "equal columns": lambda: tokens(300, 448)[:, :1].expand(300, 448),
    "one column far above all others": lambda: tokens(300, 448) + 1e3 * (torch.arange(448) == 200),
    "large": lambda: tokens(300, 448) * 1e15,
    "small": lambda: tokens(300, 448) * 1e-17,
    "so small that their squares have few digits left": lambda: tokens(300, 448) * 1e-21,
}


@pytest.mark.parametrize("kind", DEGENERATE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inputs_that_tell_little_do_no_harm(kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(4)
    x, w = DEGENERATE[kind]().to(dtype), weight(48, 448)
    inputs = Inputs.of(x)
    feedback = inputs.feedback
    assert feedback is not None
    assert all(bool(part.isfinite().all()) for part in (feedback.within, feedback.onto, feedback.into))
    scale = x.double().abs().amax()
    plain, made = (quantized(w, 32, given) for given in (Inputs(inputs.mean_square), inputs))
    errors = [output_error(w.double(), q, x.double() / scale) for q in (plain, made, quantized(w, 32))]
    # where one column is all that counts, how well a group happens to meet it is chance
    assert errors[1] <= (0.1 * errors[2] if "one column" in kind else errors[0])
    # and what was never used stays near what it was
    step = (w.unflatten(1, (-1, 32)).amax(2) - w.unflatten(1, (-1, 32)).amin(2)).amax(1, keepdim=True) / 15
    assert float(((made.dequantize() - w) / step).square().mean()) < 4


def test_inputs_of_zeros_are_no_inputs() -> None:
    inputs = Inputs.of(torch.zeros(20, 256))
    assert inputs.feedback is None
    assert same(quantized(weight(32, 256), 32, inputs), quantized(weight(32, 256), 32, torch.ones(256)))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3e38])
def test_inputs_that_are_not_finite_are_refused(value: float) -> None:
    x = tokens(64, 256)
    x[40, 200] = value
    with pytest.raises(QuantError, match="the inputs of a weight are not finite"):
        Inputs.of(x)


def test_feedback_for_other_columns_or_groups_is_refused() -> None:
    right = Inputs.of(tokens(64, 256))
    good = right.feedback
    assert good is not None
    for wrong in (
        Inputs.of(tokens(64, 384)).feedback,
        Feedback(good.within[:, :96].contiguous(), good.onto, good.into),
        Feedback(good.within, good.onto[:-1], good.into),
        Feedback(good.within, good.onto, good.into.double()),
        Feedback(good.within.T.contiguous().T, good.onto, good.into),
    ):
        with pytest.raises(QuantError, match=r"feedback of .* does not fit 256 columns in groups of 64"):
            quantized(weight(16, 256), 64, Inputs(right.mean_square, wrong))


@pytest.mark.parametrize("columns", [96, WHOLE])
def test_a_small_matrix_is_a_whole_block_and_has_no_sums(columns: int) -> None:
    feedback = Inputs.of(tokens(64, columns)).feedback
    assert feedback is not None
    assert (feedback.block, feedback.rank) == (columns, 0)
    w, found = weight(37, columns), Inputs.of(tokens(64, columns))
    assert not torch.equal(quantized(w, 32, found).qweight, quantized(w, 32, found.mean_square).qweight)
    assert RANK % 16 == BLOCK % max(GROUPS) == 0
