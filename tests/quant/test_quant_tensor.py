"""The format: every byte's place, the size of the errors, streaming by rows, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from glm4lite_quant import QuantConfig, QuantError, QuantTensor
from glm4lite_quant.config import BITS
from glm4lite_quant.format import Codes
from glm4lite_quant.kernels import reference

CONFIGS = [QuantConfig(bits, group) for bits in BITS for group in (32, 64, 128)]


def name_of(config: QuantConfig) -> str:
    return f"int{config.bits}-g{config.group_size}"


def weight(n: int, k: int, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    return torch.randn(n, k) * (0.01 + torch.rand(n, 1))


def decode_one(q: QuantTensor, n: int, k: int) -> float:
    """w[n, k] straight from the bytes, written from the design's words alone."""
    tile, row, block, col = n // 16, n % 16, k // 32, k % 32
    quad, own = col // 4, q.qweight[tile, block, 4 * row + col % 4 :]
    if q.bits == 8:
        code = int(own[64 * quad].view(torch.int8))
    elif q.bits in (2, 3):
        code = int(own[64 * (quad // 4)]) >> quad % 4 * 2 & 3
        code |= (int(own[128]) >> quad & 1) << 2 if q.bits == 3 else 0
    else:
        code = int(own[64 * (quad // 2)]) >> quad % 2 * 4 & 15
        code |= (int(own[256]) >> quad & 1) << 4 if q.bits == 5 else 0
        code |= (int(own[256 + 64 * (quad // 4)]) >> quad % 4 * 2 & 3) << 4 if q.bits == 6 else 0
    group = k // q.group_size
    value = float(q.row_scale[n]) * int(q.scales[tile, group, row]) * code
    if q.mins is not None and q.row_min is not None:
        value -= float(q.row_min[n]) * int(q.mins[tile, group, row])
    return value


@pytest.mark.parametrize("config", CONFIGS, ids=name_of)
def test_every_byte_is_where_the_format_says(config: QuantConfig) -> None:
    n, k = 19, 256
    q = QuantTensor.quantize(weight(n, k), config)
    assert q.qweight.shape == (2, 8, 64 * config.bits)
    assert q.scales.shape == (2, k // config.group_size, 16)
    assert q.row_scale.shape == (n,)
    assert q.shape == (n, k)
    assert (q.bits, q.group_size) == (config.bits, config.group_size)
    expected = torch.tensor([[decode_one(q, i, j) for j in range(k)] for i in range(n)], dtype=torch.float64)
    torch.testing.assert_close(q.dequantize(torch.float32).double(), expected, rtol=1e-5, atol=1e-6)


def test_rows_past_the_end_are_zero_bytes() -> None:
    for config in CONFIGS:
        q = QuantTensor.empty(17, 128, config)
        for t in q.tensors().values():
            t.fill_(255)
        q.quantize_rows(0, weight(17, 128))
        vectors = q.qweight[1].unflatten(1, (-1, 16, 4))
        assert int(vectors[:, :, 1:].sum()) == 0
        assert int(q.scales[1, :, 1:].sum()) == 0


@pytest.mark.parametrize("config", CONFIGS, ids=name_of)
def test_errors_stay_below_the_step(config: QuantConfig) -> None:
    w = weight(48, 512)
    q = QuantTensor.quantize(w, config)
    off = (q.dequantize() - w).abs().unflatten(1, (-1, config.group_size))
    groups = w.unflatten(1, (-1, config.group_size))
    if config.bits == 8:  # no weight is cut: half a step, and a step is at most one byte above the exact one
        step = groups.abs().amax(2) / 127 + w.abs().amax(1, keepdim=True) / 127 / 255
        assert bool((off.amax(2) <= 0.5001 * step).all())
    else:  # the search may cut a fifth off the range's ends; elsewhere it is half a step and the bytes' rounding
        spread = groups.amax(2) - groups.amin(2)
        assert bool((off.amax(2) <= 0.25 * spread).all())
    signal = 10 * math.log10(float(w.pow(2).sum() / (q.dequantize() - w).pow(2).sum()))
    least = {32: 21.8, 64: 20.8, 128: 20} if config.bits < 8 else {32: 44.5, 64: 43.5, 128: 43}
    assert signal > least[config.group_size] + (6 * (config.bits - 4) - 0.5 if config.bits < 8 else 0)


def test_the_search_beats_the_whole_range() -> None:
    w = weight(64, 1024)
    q = QuantTensor.quantize(w, QuantConfig(4, 32))
    groups = w.unflatten(1, (-1, 32))
    low, step = groups.amin(2, keepdim=True), (groups.amax(2, keepdim=True) - groups.amin(2, keepdim=True)) / 15
    plain = (((groups - low) / step).round() * step + low - groups).pow(2).sum()
    assert float((q.dequantize() - w).pow(2).sum()) < float(plain)


def test_bits_per_weight_are_what_the_design_promises() -> None:
    for config in CONFIGS:
        q = QuantTensor.empty(4096, 4096, config, device="meta")
        planes = 2 if config.bits < 8 else 1  # a byte a group and four a row: of scales, and of minima
        assert q.nbytes * 8 / 4096**2 == pytest.approx(config.bits + planes * (8 / config.group_size + 32 / 4096))


@pytest.mark.parametrize("config", [QuantConfig(4, 32), QuantConfig(8, 64)], ids=name_of)
def test_streaming_by_rows_gives_the_same_bytes(config: QuantConfig) -> None:
    w = weight(75, 256)
    whole, parts = QuantTensor.quantize(w, config), QuantTensor.empty(75, 256, config)
    for start, stop in ((64, 75), (0, 16), (16, 64)):
        parts.quantize_rows(start, w[start:stop])
    for name, t in whole.tensors().items():
        assert torch.equal(t, parts.tensors()[name]), name


def test_bfloat16_and_strided_weights_give_the_bytes_of_their_values() -> None:
    w = weight(33, 256).bfloat16()
    wide = torch.zeros(33, 300, dtype=torch.bfloat16)
    wide[:, 20:276] = w
    turned = w.T.contiguous().T
    expected = QuantTensor.quantize(w.float(), QuantConfig())
    for source in (w, wide[:, 20:276], turned):
        q = QuantTensor.quantize(source, QuantConfig())
        assert all(torch.equal(t, q.tensors()[name]) for name, t in expected.tensors().items())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_value_that_is_not_finite_is_named_with_its_place(value: float, dtype: torch.dtype) -> None:
    w = weight(64, 128).to(dtype)
    w[41, 77] = value
    w[50, 3] = value
    q = QuantTensor.empty(128, 128, QuantConfig())
    with pytest.raises(QuantError, match="row 105, column 77"):
        q.quantize_rows(64, w)


@pytest.mark.parametrize("config", CONFIGS, ids=name_of)
def test_zero_constant_tiny_and_large_rows_survive(config: QuantConfig) -> None:
    w = weight(16, 128)
    w[0], w[1], w[2], w[3], w[4] = 0.0, 0.25, -0.25, w[3] * 1e-36, w[4] * 1e16
    w[5, :64] = 0.0
    w[6] = torch.arange(128) * 1e-3 + 1  # all positive: the minimum stays 0
    q = QuantTensor.quantize(w, config)
    back = q.dequantize()
    assert bool(back.isfinite().all())
    assert int(back[0].count_nonzero()) == 0
    torch.testing.assert_close(back[1:3], w[1:3], rtol=0.01, atol=0)
    assert float(back[3].abs().max()) < 1e-29
    off = (back[4:7] - w[4:7]).abs().amax(1) / w[4:7].abs().amax(1)
    assert float(off.max()) < (0.01 if config.bits == 8 else max(0.11, 3.2 / 2**config.bits))


def test_rows_are_looked_up_as_dequantize_gives_them() -> None:
    for config in CONFIGS:
        q = QuantTensor.quantize(weight(50, 256), config)
        index = torch.tensor([[0, 49, 17], [17, 15, 16]])
        assert torch.equal(q.rows(index), q.dequantize()[index])
        assert q.rows(index, torch.bfloat16).dtype == torch.bfloat16
        assert q.rows(torch.zeros(0, dtype=torch.long)).shape == (0, 256)
        for bad in (-1, 50, 63):
            with pytest.raises(IndexError):
                q.rows(torch.tensor([bad]))


def test_shapes_and_types_that_do_not_fit_are_refused() -> None:
    with pytest.raises(QuantError, match="groups of 64"):
        QuantTensor.quantize(weight(16, 96), QuantConfig(4, 64))
    with pytest.raises(QuantError, match="float16"):
        QuantTensor.quantize(weight(16, 64).half(), QuantConfig())
    with pytest.raises(QuantError, match="matrices"):
        QuantTensor.quantize(torch.zeros(64), QuantConfig())
    q = QuantTensor.empty(40, 64, QuantConfig())
    for start, rows in ((8, 16), (0, 17), (32, 16), (-16, 16)):
        with pytest.raises(QuantError, match="rows"):
            q.quantize_rows(start, torch.zeros(rows, 64))
    with pytest.raises(QuantError, match="do not fit"):
        q.quantize_rows(0, torch.zeros(16, 32))


def test_tensors_go_to_a_file_and_come_back_without_a_copy() -> None:
    for config in CONFIGS:
        q = QuantTensor.quantize(weight(20, 128), config)
        back = QuantTensor.from_tensors(q.tensors())
        assert back.qweight is q.qweight
        assert torch.equal(back.dequantize(), q.dequantize())


def test_a_wrong_stored_tensor_is_named() -> None:
    good = QuantTensor.quantize(weight(20, 128), QuantConfig()).tensors()
    int8 = QuantTensor.quantize(weight(20, 128), QuantConfig(8)).tensors()
    cases = {
        "row_scale is missing": {k: t for k, t in good.items() if k != "row_scale"},
        "mins is missing": {k: t for k, t in good.items() if k != "mins"},
        "mins is not part of an int8": {**int8, "mins": good["mins"]},
        "zeros is not part": {**good, "zeros": good["mins"]},
        r"qweight is torch\.int8": {**good, "qweight": good["qweight"].view(torch.int8)},
        r"row_scale is torch\.float16": {**good, "row_scale": good["row_scale"].half()},
        "qweight has shape": {**good, "qweight": good["qweight"][:, :, :96].contiguous()},
        "qweight is not contiguous": {**good, "qweight": good["qweight"].transpose(0, 1).contiguous().transpose(0, 1)},
        "row_scale has 40 rows": {**good, "row_scale": torch.zeros(40)},
        "row_min has shape": {**good, "row_min": torch.zeros(19)},
        "scales has 3 groups": {**good, "scales": good["scales"][:, :3].contiguous()},
        "mins has shape": {**good, "mins": good["mins"][:1]},
    }
    for message, tensors in cases.items():
        with pytest.raises(QuantError, match=message):
            QuantTensor.from_tensors(tensors)


# --- another tool's codes


def given_codes(n: int = 40, k: int = 256, group: int = 64, levels: int = 16, zero: float | None = None) -> Codes:
    chance = torch.Generator().manual_seed(5)
    values = torch.randint(0, levels, (n, k), generator=chance, dtype=torch.uint8)
    step = 0.01 + 0.01 * torch.rand(n, k // group, generator=chance)
    points = torch.randint(0, levels, (n, k // group), generator=chance) if zero is None else torch.tensor(zero)
    return Codes(values, step, points * step, levels)


@pytest.mark.parametrize("levels", [4, 8, 16])
@pytest.mark.parametrize("zero", [None, 8.0], ids=["asymmetric", "symmetric"])
def test_codes_of_another_tool_are_kept(levels: int, zero: float | None) -> None:
    codes = given_codes(levels=levels, zero=None if zero is None else levels / 2)
    weight = QuantTensor.empty(40, 256, QuantConfig(4, 64))
    assert not bool(weight.take_codes(0, codes).any())
    assert torch.equal(reference.unpack(weight.qweight)[:40], codes.values)
    off = (weight.dequantize() - codes.decoded()).square().mean()
    assert float(off) < float(codes.step.square().mean()) / 12 * (0.01 if levels == 16 else 0.1)


def test_a_negative_step_turns_its_codes_round() -> None:
    codes = given_codes()
    turned = Codes(15 - codes.values, -codes.step, codes.low - 15 * codes.step, 16)
    torch.testing.assert_close(turned.decoded(), codes.decoded(), rtol=0, atol=1e-6)
    one, other = (QuantTensor.empty(40, 256, QuantConfig(4, 64)) for _ in range(2))
    assert torch.equal(one.take_codes(0, codes), other.take_codes(0, turned))
    assert torch.equal(one.qweight, other.qweight)
    torch.testing.assert_close(one.dequantize(), other.dequantize(), rtol=0, atol=2e-3)


def test_groups_are_cut_into_smaller_ones() -> None:
    codes = given_codes(group=128)
    weight = QuantTensor.empty(40, 256, QuantConfig(4, 32))
    weight.take_codes(0, codes.in_groups(32))
    torch.testing.assert_close(weight.dequantize(), codes.decoded(), rtol=0, atol=2e-3)


def test_rows_that_our_scales_cannot_hold_are_told() -> None:
    codes = given_codes(n=48)
    codes.low[3] = -1.0  # all of a row above zero
    codes.step[20, 0] *= 1000  # one group far larger than the others: theirs vanish beside it
    weight = QuantTensor.empty(48, 256, QuantConfig(4, 64))
    lost = weight.take_codes(0, codes)
    assert lost.nonzero()[:, 0].tolist() == [3]  # the other's error is small beside its largest group's


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_a_scale_that_is_no_number_is_named(bad: float) -> None:
    weight = QuantTensor.empty(40, 256, QuantConfig(4, 64))
    for plane in ("step", "low"):
        codes = given_codes()
        getattr(codes, plane)[17, 1] = bad
        with pytest.raises(QuantError, match="of row 17 is"):
            weight.take_codes(0, codes)


def test_codes_that_do_not_fit_are_refused() -> None:
    weight = QuantTensor.empty(40, 256, QuantConfig(4, 64))
    with pytest.raises(QuantError, match=r"do not fit an int4 weight of 40 x 256 in groups of 64"):
        weight.take_codes(0, given_codes(group=32))
    with pytest.raises(QuantError, match="do not begin and end at multiples of 16"):
        weight.take_codes(8, given_codes(n=16))
    with pytest.raises(QuantError, match="do not fit an int8 weight"):
        QuantTensor.empty(40, 256, QuantConfig(8, 64)).take_codes(0, given_codes())
