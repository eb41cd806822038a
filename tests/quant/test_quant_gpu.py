"""Which backend a weight gets away from the CPU, the fallbacks, and layers whose backend keeps the codes."""

from __future__ import annotations

import copy
import sys
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from glm4lite_quant import QuantConfig, QuantError, QuantLinear, QuantTensor
from glm4lite_quant.kernels import gpu, picking, reference, tinygemm
from glm4lite_quant.kernels.dequant import DequantBackend

META = QuantTensor.empty(64, 128, QuantConfig(4), "meta")


class Elsewhere(QuantTensor):
    """A weight that says it is on a CUDA device."""

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", 0)


def elsewhere(bits: int = 4) -> Elsewhere:
    weight = QuantTensor.quantize(torch.randn(64, 128), QuantConfig(bits))
    return Elsewhere(weight.qweight, weight.scales, weight.mins, weight.row_scale, weight.row_min)


def usable(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    monkeypatch.setattr(
        gpu, "problem", lambda name, device: "" if name in (*names, "dequant") else f"{name} is not here"
    )


def test_the_chain_is_triton_then_tinygemm_then_dequantizing(monkeypatch: pytest.MonkeyPatch) -> None:
    usable(monkeypatch, "tinygemm")
    assert picking.pick(elsewhere()).name == "tinygemm"
    assert picking.pick(elsewhere(bits=8)).name == "dequant"
    usable(monkeypatch)
    assert picking.pick(elsewhere()).name == "dequant"
    pytest.importorskip("triton")
    usable(monkeypatch, "triton", "tinygemm")
    assert picking.pick(elsewhere()).name == picking.pick(elsewhere(bits=8)).name == "triton"


@pytest.mark.parametrize("bits", [2, 3, 5, 6])
def test_bits_without_a_kernel_are_decoded_on_a_gpu_and_it_is_said_once(
    bits: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    usable(monkeypatch, "tinygemm")
    gpu._say_slow.cache_clear()
    weight = QuantTensor.quantize(torch.randn(64, 128), QuantConfig(bits))
    for _ in range(2):
        backend = picking.pick(elsewhere(bits))
        assert backend.name == "dequant"
    assert [f"weights of {bits} bits are decoded" in message for message in caplog.messages] == [True]
    x = torch.randn(3, 128)
    torch.testing.assert_close(backend.matmul(x, weight, None), x @ weight.dequantize().T)


def test_a_kernel_can_be_forced_and_an_impossible_one_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    usable(monkeypatch, "tinygemm")
    monkeypatch.setenv("GLM4LITE_GPU_KERNEL", "dequant")
    assert picking.pick(elsewhere()).name == "dequant"
    monkeypatch.setenv("GLM4LITE_GPU_KERNEL", "tinygemm")
    assert picking.pick(elsewhere(bits=8)).name == "dequant"
    monkeypatch.setenv("GLM4LITE_GPU_KERNEL", "triton")
    with pytest.raises(QuantError, match="GLM4LITE_GPU_KERNEL=triton cannot be used: triton is not here"):
        picking.pick(elsewhere())


def test_an_unknown_kernel_is_named_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLM4LITE_GPU_KERNEL", "cutlass")
    for attempt in (picking.check_environment, lambda: picking.pick(elsewhere())):
        with pytest.raises(QuantError, match="is 'cutlass'; use one of triton, tinygemm, dequant"):
            attempt()
    assert picking.gpu_status().startswith("error: GLM4LITE_GPU_KERNEL is 'cutlass'")
    assert picking.pick(QuantTensor.empty(16, 32, QuantConfig(4))).name != "dequant"  # the CPU does not ask


def test_the_status_says_what_runs_and_what_keeps_the_faster_one_away(monkeypatch: pytest.MonkeyPatch) -> None:
    usable(monkeypatch)
    monkeypatch.setattr(gpu, "_device", lambda: None)
    assert picking.gpu_status() == "none needed: torch finds no GPU"
    monkeypatch.setattr(gpu, "_device", lambda: torch.device("cuda", 0))
    assert picking.gpu_status() == "dequant; no triton: triton is not here; no tinygemm: tinygemm is not here"
    usable(monkeypatch, "tinygemm")
    assert picking.gpu_status() == "tinygemm, dequant (slow) for int8; no triton: triton is not here"
    monkeypatch.setenv("GLM4LITE_GPU_KERNEL", "triton")
    assert picking.gpu_status() == "error: GLM4LITE_GPU_KERNEL=triton cannot be used: triton is not here"


def test_without_triton_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    for module in ("triton_gpu", "triton_kernels"):
        monkeypatch.delitem(sys.modules, f"glm4lite_quant.kernels.{module}", raising=False)
        monkeypatch.delattr(sys.modules[gpu.__package__], module, raising=False)
    assert "pip install triton" in gpu.problem("triton", torch.device("cuda", 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", [4, 8])
def test_dequantizing_multiplies_in_bounded_turns(
    bits: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("glm4lite_quant.kernels.dequant.SCRATCH_ELEMENTS", 32 * 128)
    torch.manual_seed(0)
    weight, x, bias = (
        QuantTensor.quantize(torch.randn(75, 128), QuantConfig(bits)),
        torch.randn(3, 128),
        torch.randn(75),
    )
    x = x.to(dtype)
    backend = DequantBackend()
    got = backend.matmul(x, backend.prepack(weight), bias)
    want = x.float() @ weight.dequantize().T + bias
    assert got.dtype == dtype
    assert float((got.float() - want).abs().max()) < (2e-2 if dtype == torch.bfloat16 else 1e-5) * float(
        want.abs().max()
    )
    assert bool(backend.matmul(x * float("nan"), weight, None).isnan().all())


def test_tinygemms_scales_and_codes_give_the_weight_back() -> None:
    torch.manual_seed(0)
    weight = QuantTensor.quantize(torch.randn(40, 256), QuantConfig(4, 64))
    pairs, planes = tinygemm.pairs(weight), tinygemm.scales_and_zeros(weight)
    assert pairs.shape == (40, 128)
    assert planes.shape == (4, 40, 2)
    codes = torch.stack((pairs >> 4, pairs & 15), dim=2).flatten(1).float()
    scale, zero = planes.float().transpose(0, 1).repeat_interleave(64, dim=1).unbind(2)
    got, want = (codes - 8) * scale + zero, weight.dequantize()
    assert float((got - want).norm() / want.norm()) < 4e-3  # what bfloat16 scales cost
    assert not tinygemm.TinygemmBackend().supports(elsewhere(bits=8))
    assert not tinygemm.TinygemmBackend().supports(QuantTensor.quantize(torch.randn(16, 128), QuantConfig(4)))


def test_a_meta_weight_waits_for_its_device() -> None:
    assert picking.pick(META).name == "reference"


@dataclass(frozen=True)
class Codes:
    """Plain codes [N, K] and the weight without its own."""

    codes: Tensor
    weight: QuantTensor


class Repacking(DequantBackend):
    """Keeps int4 codes as a matrix, as a backend with a layout of its own does."""

    name = "repacking"
    repacks = True

    def prepack(self, weight: QuantTensor) -> Codes:  # type: ignore[override]
        return Codes(reference.unpack(weight.qweight), replace(weight, qweight=weight.qweight.to("meta")))

    def unpack(self, packed: Codes) -> QuantTensor:  # type: ignore[override]
        return replace(packed.weight, qweight=reference.tile_codes(packed.codes, 4))

    def matmul(self, x: Tensor, packed: Codes, bias: Tensor | None, splits: int = 1) -> Tensor:  # type: ignore[override]
        return super().matmul(x, self.unpack(packed), bias)


@pytest.fixture
def repacked(monkeypatch: pytest.MonkeyPatch) -> QuantLinear:
    monkeypatch.setattr("glm4lite_quant.linear.pick", lambda weight: Repacking())
    return fresh()


def fresh(seed: int = 0) -> QuantLinear:
    torch.manual_seed(seed)
    layer = QuantLinear(128, 48, QuantConfig(4), bias=True)
    layer.load(QuantTensor.quantize(torch.randn(48, 128), layer.config))
    return layer


def test_codes_that_were_packed_anew_are_held_once(repacked: QuantLinear) -> None:
    x, codes, planes = torch.randn(2, 128), repacked.qweight.clone(), repacked.scales
    first = repacked(x)
    assert repacked.qweight.is_meta
    assert repacked.scales is planes
    assert torch.equal(repacked(x), first)
    assert repacked._packed is not None
    assert repacked._packed[2] is repacked._prepare()[1], "packed once"
    assert repacked.kernel == "repacking"
    assert "int4, group=32" in repr(repacked)
    assert torch.equal(repacked.weight_tensor.qweight, codes)
    assert torch.equal(repacked.state_dict()["qweight"], codes)
    assert repacked.qweight.is_meta, "reading them back is no move"


def test_a_layer_with_packed_codes_can_be_moved_copied_and_loaded(repacked: QuantLinear) -> None:
    x, other = torch.randn(2, 128), fresh(1)
    first, want = repacked(x), picking.REFERENCE.matmul(x, other.weight_tensor, other.bias)
    assert torch.equal(copy.deepcopy(repacked)(x), first)
    repacked(x)
    assert not repacked.to("cpu").qweight.is_meta
    assert torch.equal(repacked(x), first)
    repacked.load_state_dict(other.state_dict())
    torch.testing.assert_close(repacked(x), want)
    repacked.load(fresh().weight_tensor)
    assert torch.equal(repacked(x), first)
    repacked.unload()
    with pytest.raises(QuantError, match="no weight"):
        repacked(x)
    repacked.load(fresh().weight_tensor)
    y = torch.randn(1, 128, requires_grad=True)
    repacked(y).sum().backward()
    torch.testing.assert_close(y.grad, repacked.weight_tensor.dequantize().sum(0, keepdim=True))


def card(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], *kernels: str, hip: str | None = None) -> None:
    """torch finds a GPU of this capability, on which these kernels pass their first product."""
    usable(monkeypatch, *kernels)
    monkeypatch.delenv("GLM4LITE_GPU_KERNEL", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.version, "hip", hip)


CUDA = torch.device("cuda", 0)


def test_a_gpu_with_a_kernel_is_faster_than_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for kernels in (("triton",), ("tinygemm",), ("triton", "tinygemm")):
        card(monkeypatch, (8, 6), *kernels)
        assert (gpu.slower_than_cpu(CUDA, True), gpu.slower_than_cpu(CUDA, False)) == ("", "")


def test_a_gpu_before_ampere_is_left_out_unless_its_kernel_is_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    card(monkeypatch, (7, 5))
    assert gpu.slower_than_cpu(CUDA, True) == "no kernel for int4 runs there: triton is not here"
    assert gpu.slower_than_cpu(CUDA, False) == "bfloat16 needs compute capability 8.0, it has 7.5"
    monkeypatch.setenv("GLM4LITE_GPU_KERNEL", "dequant")
    assert gpu.slower_than_cpu(CUDA, True) == ""


def test_an_amd_gpu_is_used_where_triton_computes_right_there(monkeypatch: pytest.MonkeyPatch) -> None:
    card(monkeypatch, (10, 3), "triton", hip="7.0")
    assert gpu.slower_than_cpu(CUDA, True) == ""
    card(monkeypatch, (10, 3), hip="7.0")
    assert "no kernel for int4 runs there" in gpu.slower_than_cpu(CUDA, True)
    card(monkeypatch, (6, 0), hip="7.0")  # of AMD's own numbers none is Nvidia's
    assert gpu.slower_than_cpu(CUDA, False) == ""


@pytest.mark.parametrize(("backend", "named"), [("mps", "Apple's GPU (mps)"), ("xpu", "Intel's GPU (xpu)")])
def test_the_gpus_of_apple_and_intel_are_named_and_the_cpu_computes(
    monkeypatch: pytest.MonkeyPatch, backend: str, named: str
) -> None:
    monkeypatch.delenv("GLM4LITE_GPU_KERNEL", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    module = torch.xpu if backend == "xpu" else torch.backends.mps
    monkeypatch.setattr(module, "is_available", lambda: True)
    assert picking.gpu_status() == f"none for {named}: the CPU computes"
    assert gpu.slower_than_cpu(torch.device(backend), True) == f"no kernels are written for {backend}"
