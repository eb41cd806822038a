"""The native kernels against the torch reference: same bytes, same products, for every ISA this host has."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

import glm4lite_quant
from glm4lite_quant import QuantConfig, QuantError, QuantLinear, QuantTensor, host
from glm4lite_quant.config import BITS
from glm4lite_quant.kernels import gpu, native, picking, reference

HAVE = native._library()
CONFIGS = [QuantConfig(bits, group) for bits in BITS for group in (32, 64, 128)]
needs_library = pytest.mark.skipif(HAVE.cdll is None, reason=f"no native library: {HAVE.problem}")


@pytest.fixture(params=native.ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    name = str(request.param)
    if HAVE.cdll is None:
        pytest.skip(f"no native library: {HAVE.problem}")
    if name not in HAVE.isas:
        pytest.skip(f"this host has no {name}")
    monkeypatch.setenv("GLM4LITE_ISA", name)
    return name


def name_of(config: QuantConfig) -> str:
    return f"int{config.bits}-g{config.group_size}"


def rounded(x: Tensor) -> Tensor:
    """What the kernels see of x: int8 codes per 32 columns times their scale, in float64."""
    blocks = x.float().unflatten(-1, (-1, 32))
    top = blocks.abs().amax(-1, keepdim=True)
    by = torch.full_like(top, 127)
    codes = (blocks * torch.where(top > 0, by / top, torch.zeros_like(top))).round()
    return (codes.double() * (top / by).double()).flatten(-2)


def layer(n: int, k: int, config: QuantConfig, bias: bool = True, seed: int = 0) -> QuantLinear:
    torch.manual_seed(seed)
    out = QuantLinear(k, n, config, bias=bias)
    out.load(QuantTensor.quantize(torch.randn(n, k) * torch.rand(n, 1), config))
    if out.bias is not None:
        out.bias.copy_(torch.randn(n))
    return out


def expected(own: QuantLinear, x: Tensor) -> Tensor:
    out = rounded(x) @ own.weight_tensor.dequantize().double().T
    return out if own.bias is None else out + own.bias


def close(got: Tensor, want: Tensor, dtype: torch.dtype = torch.float32) -> bool:
    tolerance = 2e-6 if dtype == torch.float32 else 4e-3
    return float((got.double() - want).abs().max()) <= tolerance * float(want.abs().max())


@pytest.mark.parametrize("config", CONFIGS, ids=name_of)
def test_native_quantization_gives_the_reference_bytes(isa: str, config: QuantConfig) -> None:
    torch.manual_seed(1)
    for n, k, dtype in ((1, 128, torch.float32), (37, 384, torch.bfloat16), (160, 640, torch.float32)):
        w = (torch.randn(n, k) * torch.exp(torch.randn(n, 1) * 3)).to(dtype)
        w[n // 2, : k // 2] = 0
        fast, slow = QuantTensor.quantize(w, config), QuantTensor.empty(n, k, config)
        slow._quantize_reference(w, 0)
        for name, t in slow.tensors().items():
            assert torch.equal(t, fast.tensors()[name]), name


@pytest.mark.parametrize("config", CONFIGS, ids=name_of)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_match_the_oracle(isa: str, config: QuantConfig, dtype: torch.dtype) -> None:
    for n, k in ((1, 128), (37, 256), (160, 1152)):
        own = layer(n, k, config)
        assert own.kernel == f"native-{isa}"
        for m in (1, 2, 3, 8, 17, 70):
            x = torch.randn(m, k).to(dtype)
            y = own(x)
            assert y.shape == (m, n)
            assert y.dtype == dtype
            assert close(y, expected(own, x), dtype), (n, k, m)


def test_the_true_shapes_of_a_9b_layer_work(isa: str) -> None:
    for n, k in ((4608, 4096), (128, 13696)):
        own = layer(n, k, QuantConfig(), bias=False)
        x = torch.randn(5, k)
        assert close(own(x), expected(own, x))


@pytest.mark.parametrize("bits", BITS)
def test_more_rows_than_one_chunk_of_activations(isa: str, bits: int) -> None:
    own = layer(20, 64, QuantConfig(bits))
    x = torch.randn(1500, 64)
    assert close(own(x), expected(own, x))


@pytest.mark.parametrize("bits", BITS)
def test_the_largest_codes_do_not_overflow(isa: str, bits: int) -> None:
    own = layer(32, 128, QuantConfig(bits), bias=False)
    for byte in (0xFF, 0x80, 0x81, 0x7F):
        own.qweight.fill_(byte)
        for sign in (1.0, -1.0):
            x = torch.full((3, 128), 127.0 * sign)
            assert close(own(x), expected(own, x)), (byte, sign)


@pytest.mark.parametrize("bits", BITS)
def test_a_row_gives_the_same_bits_alone_and_in_a_batch(isa: str, bits: int) -> None:
    own = layer(45, 1152, QuantConfig(bits))
    x = torch.randn(29, 1152)
    assert torch.equal(own(x), torch.cat([own(row[None]) for row in x]))


def test_one_thread_and_two_give_the_same_bits(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    own = layer(300, 1024, QuantConfig())
    x = torch.randn(40, 1024)
    results = []
    for threads in ("1", "2"):
        monkeypatch.setenv("GLM4LITE_THREADS", threads)
        results.append([own(x), own(x[:1]), QuantTensor.quantize(x[:, :992], QuantConfig()).qweight])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("bits", BITS)
def test_a_nan_activation_spoils_its_own_row_only(isa: str, bits: int) -> None:
    own = layer(33, 128, QuantConfig(bits))
    x = torch.randn(4, 128)
    clean = own(x)
    for bad in (float("nan"), float("inf"), float("-inf")):
        spoiled = x.clone()
        spoiled[2, 70] = bad
        y = own(spoiled)
        assert bool(y[2].isnan().all())
        assert torch.equal(y[[0, 1, 3]], clean[[0, 1, 3]])


def test_zero_tiny_and_large_activations_stay_finite(isa: str) -> None:
    own = layer(24, 128, QuantConfig())
    assert own.bias is not None
    torch.testing.assert_close(own(torch.zeros(1, 128))[0], own.bias)
    torch.testing.assert_close(own(torch.full((1, 128), 1e-40))[0], own.bias)
    x = torch.randn(2, 128) * 1e30
    assert close(own(x), expected(own, x))


def test_strided_and_many_dimensional_inputs(isa: str) -> None:
    own = layer(24, 128, QuantConfig(), bias=False)
    wide = torch.randn(6, 200)
    for x in (wide[:, 50:178], torch.randn(128, 6).T, wide[::2, :128]):
        assert torch.equal(own(x), own(x.contiguous()))
    x = torch.randn(2, 3, 128)
    assert torch.equal(own(x), own(x.reshape(6, 128)).reshape(2, 3, 24))
    assert own(torch.zeros(0, 128)).shape == (0, 24)


def test_weights_are_read_at_any_address(isa: str) -> None:
    """A mapped safetensors file aligns nothing beyond 8 bytes."""
    own = layer(37, 256, QuantConfig())
    x = torch.randn(3, 256)
    want = own(x)

    def moved(t: Tensor, by: int) -> Tensor:
        room = torch.zeros(t.nbytes + by, dtype=torch.uint8)
        room[by:] = t.contiguous().view(torch.uint8).flatten()
        return room[by:].view(t.dtype).view(t.shape)

    tensors = own.weight_tensor.tensors()
    own.load(QuantTensor.from_tensors({k: moved(t, 4 if t.dtype == torch.float32 else 3) for k, t in tensors.items()}))
    assert torch.equal(own(x), want)


@needs_library
def test_two_python_threads_may_call_at_once() -> None:
    own = layer(400, 1024, QuantConfig())
    inputs = [torch.randn(9, 1024) for _ in range(4)]
    wanted, got = [own(x) for x in inputs], [torch.zeros(0)] * 4

    def work(i: int) -> None:
        for _ in range(10):
            got[i] = own(inputs[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(30)
    assert all(torch.equal(a, b) for a, b in zip(wanted, got, strict=True))


@needs_library
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_child_computes_the_same() -> None:
    own = layer(400, 1024, QuantConfig())
    x = torch.randn(9, 1024)
    want = own(x)
    child = os.fork()
    if child == 0:
        same = all(bool((own(x) == want).all()) for _ in range(3))
        os._exit(0 if same else 1)
    deadline = time.monotonic() + 20
    while (done := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < deadline:
        time.sleep(0.01)
    if done[0] == 0:
        os.kill(child, 9)
        os.waitpid(child, 0)
    assert done == (child, 0)
    assert torch.equal(own(x), want)


@needs_library
def test_an_idle_pool_does_not_burn_the_processor() -> None:
    layer(400, 1024, QuantConfig())(torch.randn(9, 1024))
    time.sleep(0.05)
    before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before < 0.1


def test_without_the_library_everything_works_and_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("GLM4LITE_ISA", raising=False)
    w, x = torch.randn(33, 128), torch.randn(5, 128)
    before = QuantTensor.quantize(w, QuantConfig())
    missing = str(tmp_path / "missing.so")
    monkeypatch.setenv("GLM4LITE_KERNELS", missing)
    assert missing in picking.status()
    assert picking.status().startswith("reference")
    q = QuantTensor.quantize(w, QuantConfig())
    assert all(torch.equal(t, before.tensors()[name]) for name, t in q.tensors().items())
    own = QuantLinear(128, 33, QuantConfig(), bias=False)
    own.load(q)
    assert own.kernel == "reference"
    torch.testing.assert_close(own(x), x @ q.dequantize().T)
    monkeypatch.setenv("GLM4LITE_ISA", "scalar")
    with pytest.raises(QuantError, match=r"missing\.so"):
        picking.pick(q)


@pytest.mark.parametrize(("system", "name"), [("linux", "so"), ("darwin", "dylib"), ("win32", "dll")])
def test_each_system_has_its_own_library(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, system: str, name: str
) -> None:
    monkeypatch.setattr("sys.platform", system)
    monkeypatch.setattr(glm4lite_quant, "__path__", [str(tmp_path / "none"), str(tmp_path)])
    monkeypatch.delenv("GLM4LITE_KERNELS", raising=False)
    native._load.cache_clear()
    why = f"reference (plain torch, slow): no glm4lite_kernels.{name} is installed"
    assert picking.status().startswith(why)
    for one in ("so", "dylib", "dll"):
        (tmp_path / f"glm4lite_kernels.{one}").write_text("not a library")
    native._load.cache_clear()
    assert f"{tmp_path}/glm4lite_kernels.{name} cannot be loaded" in picking.status()
    native._load.cache_clear()


def test_a_file_that_is_no_library_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("GLM4LITE_ISA", raising=False)
    path = tmp_path / "text.so"
    path.write_text("not a library")
    monkeypatch.setenv("GLM4LITE_KERNELS", str(path))
    assert "text.so cannot be loaded" in picking.status()
    assert "\n" not in picking.status()


@needs_library
def test_an_isa_this_host_has_not_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    q = QuantTensor.empty(16, 32, QuantConfig())
    monkeypatch.setenv("GLM4LITE_ISA", "sse9")
    with pytest.raises(QuantError, match="GLM4LITE_ISA is 'sse9'; use one of scalar, avx2, avxvnni, avx512vnni"):
        picking.pick(q)
    old = native.Library(HAVE.path, HAVE.cdll, ("scalar",))
    monkeypatch.setattr(native, "_library", lambda: old)
    monkeypatch.setenv("GLM4LITE_ISA", "avx512vnni")
    with pytest.raises(QuantError, match="this host has scalar"):
        picking.pick(q)
    assert picking.status().startswith("error: ")
    monkeypatch.delenv("GLM4LITE_ISA")
    assert picking.pick(q).name == "native-scalar"


@pytest.mark.parametrize("value", ["0", "-1", "two", "1.5"])
def test_a_wrong_number_of_threads_is_named(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("GLM4LITE_THREADS", value)
    with pytest.raises(QuantError, match="GLM4LITE_THREADS"):
        native.thread_count()


def test_threads_follow_torch_and_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLM4LITE_THREADS", raising=False)
    assert native.thread_count() == min(host.cores().threads, torch.get_num_threads())
    monkeypatch.setenv("GLM4LITE_THREADS", "1")
    assert native.thread_count() == 1
    monkeypatch.setenv("GLM4LITE_THREADS", "100000")
    assert native.thread_count() == len(host.processors())


def test_the_reference_multiplies_in_bounded_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    own = layer(100, 128, QuantConfig())
    x = torch.randn(3, 128)
    weight = own.weight_tensor
    whole = picking.REFERENCE.matmul(x, weight, own.bias)
    monkeypatch.setattr(reference, "SCRATCH_ELEMENTS", 16 * 128)
    torch.testing.assert_close(picking.REFERENCE.matmul(x, weight, own.bias), whole)
    assert own.bias is not None
    torch.testing.assert_close(whole, x @ weight.dequantize().T + own.bias)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_layer_moves_to_a_gpu() -> None:
    own = layer(40, 256, QuantConfig())
    x = torch.randn(3, 256)
    want = picking.REFERENCE.matmul(x, own.weight_tensor, own.bias)
    own.to("cuda")
    assert own.kernel in gpu.KERNELS
    loose = 2e-2 if own.kernel == "tinygemm" else 1e-4  # it rounds to bfloat16
    torch.testing.assert_close(own(x.cuda()).cpu(), want, rtol=loose, atol=loose * 30)


@pytest.mark.parametrize("rows", [1, 2, 7, 13])
@pytest.mark.parametrize("bits", BITS)
def test_two_parts_of_an_input_are_nearly_exact(isa: str, bits: int, rows: int) -> None:
    weight = QuantTensor.quantize(torch.randn(50, 256, generator=torch.Generator().manual_seed(1)), QuantConfig(bits))
    x = torch.randn(rows, 256, generator=torch.Generator().manual_seed(2)) * torch.logspace(-2, 2, 256)
    exact = x.double() @ weight.dequantize().double().T
    backend = picking.pick(weight)
    errors = [
        float((backend.matmul(x, backend.prepack(weight), None, parts) - exact).norm() / exact.norm())
        for parts in (1, 2)
    ]
    assert errors[1] < 1e-4
    assert errors[1] < 0.05 * errors[0]
