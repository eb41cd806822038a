"""Codes on other formats' grids: what they stand for, how little they lose, and which of another format are kept."""

from __future__ import annotations

import gguf
import pytest
import torch
from torch import Tensor

from glm4lite_quant import QuantConfig, QuantError, QuantTensor
from glm4lite_quant.format import Codes
from glm4lite_quant.grids import Grid, as_codes, fit, hold
from glm4lite_quant.inputs import Inputs
from glm4lite_quant.kernels import native, whole_zero

MIDDLE, ZERO = Grid("middle", torch.float16), Grid("zero point", torch.bfloat16)
MINIMUM, BYTES = Grid("minimum", torch.float16), Grid("bytes", torch.float16)
GRIDS = {grid.kind: grid for grid in (MIDDLE, ZERO, MINIMUM, BYTES)}


def weight(rows: int = 40, columns: int = 256) -> Tensor:
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) / columns**0.5
    values[3] += 0.3  # no group of this row reaches zero
    values[5] = 0
    values[6, :32] = 0
    return values


def importance(columns: int = 256) -> Tensor:
    return torch.rand(columns, generator=torch.Generator().manual_seed(1)) ** 4


def lost(codes: Codes, rows: Tensor, columns: Tensor | None = None) -> float:
    off = (codes.decoded() - rows).square()
    return float((off if columns is None else off * columns).sum())


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_codes_lie_on_the_grid(grid: Grid, group: int) -> None:
    rows = weight()
    codes = fit(rows, grid, group)
    assert codes.values.dtype == torch.uint8
    assert int(codes.values.max()) < codes.levels == grid.levels
    assert torch.equal(codes.step, codes.step.to(grid.dtype).float())
    if grid.kind == "minimum":
        assert torch.equal(codes.low, codes.low.to(grid.dtype).float())
    else:
        zero = grid.zero_points(codes).float()
        torch.testing.assert_close(codes.low, codes.step * zero, rtol=0, atol=0)
        assert grid.kind == "zero point" or bool((zero == grid.middle)[codes.step != 0].all())
    assert torch.equal(codes.decoded()[5], torch.zeros(256))
    bound = codes.step.abs().repeat_interleave(group, 1) * 4 + 1e-6
    assert bool(((codes.decoded() - rows).abs() <= bound).all())  # the search may cut the largest off, not lose it


@pytest.mark.parametrize("isa", native.ISAS)
def test_the_native_search_gives_the_values_of_the_reference(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if isa not in native._library().isas:
        pytest.skip(f"this host has no {isa}, or there is no native library")
    monkeypatch.setenv("GLM4LITE_ISA", isa)
    for grid in (MIDDLE, ZERO):
        for group, columns in ((32, None), (64, importance()), (128, importance())):
            rows = torch.cat([weight(), weight() * 1e-40, weight(7) * (1e17 if grid is ZERO else 1e3)])
            counts = None if columns is None else Inputs(columns).normalized(256, group).mean_square
            for of in (rows, rows.bfloat16()):
                found = native.fit(of, group, grid.dtype, grid is MIDDLE, counts, 0)
                assert found is not None
                wanted = whole_zero.fit(of.float(), group, grid.dtype, grid is MIDDLE, counts)
                for one, other in zip(found, wanted, strict=True):
                    assert torch.equal(one, other)


def test_without_the_library_torch_searches_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, columns = weight(), importance()
    with_it = [fit(rows, grid, 32, columns) for grid in GRIDS.values()]
    monkeypatch.setattr(native, "fit", lambda *_: None)
    for grid, found in zip(GRIDS.values(), with_it, strict=True):
        own = fit(rows, grid, 32, columns)
        assert torch.equal(own.values, found.values)
        assert torch.equal(own.decoded(), found.decoded())


def round_to_nearest(rows: Tensor, group: int, zero_point: bool) -> Codes:
    """What scales over the whole range give."""
    parts = rows.unflatten(1, (-1, group))
    if zero_point:
        low, high = parts.amin(-1).clamp(max=0), parts.amax(-1).clamp(min=0)
        step = ((high - low) / 15).clamp(min=1e-9)
        zero = (-low / step).round()
    else:
        step = (parts.abs().amax(-1) / 7.5).clamp(min=1e-9)
        zero = torch.full_like(step, 8.0)
    values = (parts / step[..., None] + zero[..., None]).round().clamp(0, 15)
    return Codes(values.flatten(1).to(torch.uint8), step, step * zero, 16)


@pytest.mark.parametrize("grid", [MIDDLE, ZERO], ids=["middle", "zero point"])
def test_the_search_loses_less_than_rounding_to_the_range(grid: Grid) -> None:
    rows, columns = weight(256), importance()
    plain = round_to_nearest(rows, 32, grid is ZERO)
    assert lost(fit(rows, grid, 32), rows) < 0.93 * lost(plain, rows)
    assert lost(fit(rows, grid, 32, columns), rows, columns) < 0.85 * lost(plain, rows, columns)


def test_a_zero_point_loses_less_than_none_and_a_free_minimum_least() -> None:
    rows, columns = weight(256), importance()
    found = [lost(fit(rows, grid, 32, columns), rows, columns) for grid in (MIDDLE, ZERO, MINIMUM)]
    assert found[0] * 0.95 > found[1]
    assert found[1] * 0.95 > found[2]


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_gguf_itself_loses_more(kind: str) -> None:
    rows, number = weight(256), gguf.GGMLQuantizationType[kind]
    theirs = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(rows.numpy(), number), number))
    grid = {"Q4_0": MIDDLE, "Q4_1": MINIMUM, "Q8_0": BYTES}[kind]
    assert lost(fit(rows, grid, 32), rows) <= float((theirs - rows).square().sum()) * 1.0001


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1e30])
def test_what_is_not_finite_is_refused_with_its_place(grid: Grid, bad: float) -> None:
    rows = weight()
    rows[17, 9] = bad
    with pytest.raises(QuantError, match="row 117, column 9"):
        fit(rows, grid, 32, first_row=100)


def test_a_scale_beyond_float16_is_refused() -> None:
    for grid in (BYTES, MIDDLE):
        with pytest.raises(QuantError, match=r"scale of row 4 is larger than torch\.float16"):
            fit(torch.eye(32)[:16] * (torch.arange(16) == 4)[:, None] * 1e8, grid, 32)


def test_codes_of_ours_are_kept_where_a_minimum_is_free() -> None:
    made = QuantTensor.quantize(weight(), QuantConfig(4, 64, method="search"))
    own = as_codes(made)
    torch.testing.assert_close(own.decoded(), made.dequantize(), rtol=1e-6, atol=1e-7)
    kept = hold(own, MINIMUM, 32)
    assert kept is not None
    assert torch.equal(kept.values, own.values)
    torch.testing.assert_close(kept.decoded(), own.decoded(), rtol=0, atol=float(own.step.max()) / 64)
    assert hold(own, ZERO, 32) is None  # its minima are no whole numbers of steps
    assert hold(own, MIDDLE, 32) is None


def test_int8_of_ours_is_kept_as_bytes() -> None:
    made = QuantTensor.quantize(weight() + 0.01, QuantConfig(8, 32))
    own = as_codes(made)
    torch.testing.assert_close(own.decoded(), made.dequantize(), rtol=1e-5, atol=1e-6)
    kept = hold(own, BYTES, 32)
    assert kept is not None
    assert torch.equal(kept.values, own.values)
    assert hold(own, ZERO, 32) is None


def test_symmetric_codes_move_to_the_middle_of_another_grid() -> None:
    three = Codes(torch.tensor([[0, 7, 4, 3] * 8], dtype=torch.uint8), torch.ones(1, 1), torch.full((1, 1), 4.0), 8)
    kept = hold(three, MIDDLE, 32)
    assert kept is not None
    assert torch.equal(kept.values, three.values + 4)
    assert torch.equal(kept.decoded(), three.decoded())
    off = Codes(three.values, three.step, three.low - 9, 8)  # zero lies below all codes
    assert hold(off, ZERO, 32) is None
