"""The Triton kernels against the torch reference: on a GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from glm4lite_quant import QuantConfig, QuantError, QuantLinear, QuantTensor
from glm4lite_quant.kernels import gpu

CUDA = torch.cuda.is_available()
pytest.importorskip("triton", reason="triton is not installed: the GPU kernels are not tested")
if not CUDA and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("no CUDA device, and TRITON_INTERPRET=1 is not set (tests/conftest.py does)", allow_module_level=True)

from glm4lite_quant.kernels import triton_gpu  # noqa: E402
from glm4lite_quant.kernels.triton_gpu import DENSE_TOKENS, Gemm, Gemv, Packed, TritonBackend  # noqa: E402

DEVICE = "cuda" if CUDA else "cpu"
BACKEND = TritonBackend()
CONFIGS = [QuantConfig(bits, group) for bits in (4, 8) for group in (32, 64, 128)]
IN_PLANES = [QuantConfig(2), QuantConfig(3, 64), QuantConfig(5, 128), QuantConfig(6)]
# Of the largest result. bfloat16: the output is rounded, from 9 tokens on the weights too.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.2e-2}


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def name_of(config: QuantConfig) -> str:
    return f"int{config.bits}-g{config.group_size}"


def weight_of(n: int, k: int, config: QuantConfig) -> QuantTensor:
    return QuantTensor.quantize(torch.randn(n, k, device=DEVICE) * torch.rand(n, 1, device=DEVICE), config)


def expected(x: Tensor, weight: QuantTensor, bias: Tensor | None) -> Tensor:
    out = x.double() @ weight.dequantize().double().T
    return out if bias is None else out + bias


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).abs().max() / want.abs().max())


@pytest.mark.parametrize(
    ("config", "dtype", "tokens"),
    [
        *product(CONFIGS[::2], (torch.float32,), (1, 5, 9, 33, DENSE_TOKENS)),
        *product(CONFIGS[1::2], (torch.bfloat16,), (1, 5, 9, 33, DENSE_TOKENS)),
        *product(IN_PLANES, (torch.bfloat16,), (1, 9)),
        *(
            pytest.param(*one, marks=pytest.mark.slow)  # the interpreter takes longest for these
            for one in (
                *product(CONFIGS[1::2], (torch.float32,), (1, 9, 33, DENSE_TOKENS)),
                *product(CONFIGS[::2], (torch.bfloat16,), (1, 9, 33, DENSE_TOKENS)),
                *product(IN_PLANES, (torch.float32,), (1, 5, 9, DENSE_TOKENS)),
                *product(CONFIGS[::2], (torch.float32,), (2, 8)),
                *product(CONFIGS[1::2], (torch.bfloat16,), (2, 8)),
            )
        ),
    ],
    ids=lambda value: name_of(value) if isinstance(value, QuantConfig) else str(value),
)
def test_products_match_the_oracle(config: QuantConfig, dtype: torch.dtype, tokens: int) -> None:
    weight = weight_of(21, 384, config)
    x, bias = torch.randn(tokens, 384, device=DEVICE).to(dtype), torch.randn(21, device=DEVICE)
    got = BACKEND.matmul(x, BACKEND.prepack(weight), bias)
    assert got.dtype == dtype
    assert error(got, expected(x, weight, bias)) < TOLERANCE[dtype]


@pytest.mark.parametrize("n", [1, 16, 33])
@pytest.mark.parametrize("k", [128, 2176])
def test_every_row_and_column_counts_whatever_the_shape(n: int, k: int) -> None:
    """2176 columns are more than the kernels take at once, and no multiple of that."""
    for config in (QuantConfig(4), QuantConfig(8, 128), QuantConfig(3)):
        weight = weight_of(n, k, config)
        for tokens in (1, 9):
            x = torch.randn(tokens, k, device=DEVICE, dtype=torch.bfloat16)
            got = BACKEND.matmul(x, BACKEND.prepack(weight), None)
            assert error(got, expected(x, weight, None)) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("tokens", [1, 8, 9, DENSE_TOKENS])
@pytest.mark.parametrize("bits", [4, 8])
def test_what_is_not_finite_stays_visible_and_in_its_row(bits: int, tokens: int) -> None:
    weight = weight_of(16, 128, QuantConfig(bits))
    x = torch.randn(tokens, 128, device=DEVICE, dtype=torch.bfloat16)
    clean = BACKEND.matmul(x, BACKEND.prepack(weight), None)
    x[0, 77] = float("nan")
    got = BACKEND.matmul(x, BACKEND.prepack(weight), None)
    assert bool(got[0].isnan().all())
    assert torch.equal(got[1:], clean[1:])


def test_large_activations_do_not_overflow() -> None:
    weight = weight_of(16, 128, QuantConfig(4))
    for tokens in (1, 9):
        x = torch.full((tokens, 128), 68000.0, device=DEVICE, dtype=torch.bfloat16)
        got = BACKEND.matmul(x, BACKEND.prepack(weight), None)
        assert error(got, expected(x, weight, None)) < TOLERANCE[torch.bfloat16]


def test_a_result_does_not_depend_on_the_run_or_the_other_rows() -> None:
    weight = weight_of(16, 1056, QuantConfig(4))
    packed, x = BACKEND.prepack(weight), torch.randn(8, 1056, device=DEVICE, dtype=torch.bfloat16)
    first = BACKEND.matmul(x, packed, None)
    assert torch.equal(BACKEND.matmul(x, packed, None), first)
    assert torch.equal(BACKEND.matmul(x[:5], packed, None), first[:5])


def test_inputs_may_be_a_view() -> None:
    weight, wide = weight_of(20, 128, QuantConfig(4)), torch.randn(3, 300, device=DEVICE)
    for x in (wide[:, 100:228], wide[:, :256:2], wide[:, :128].expand(3, 128), wide[:0, :128]):
        got, want = BACKEND.matmul(x, BACKEND.prepack(weight), None), expected(x, weight, None)
        assert got.shape == want.shape
        assert not want.numel() or error(got, want) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("config", sorted({*triton_gpu.GEMV.values(), Gemv(16, 2), Gemv(1, 4)}, key=repr), ids=repr)
def test_every_gemv_setting_computes_the_same(config: Gemv) -> None:
    weight, out = weight_of(24, 1056, QuantConfig(4)), torch.empty(2, 24, device=DEVICE)
    x = torch.randn(2, 1056, device=DEVICE)
    triton_gpu.gemv(x, BACKEND.prepack(weight), None, out, config)
    assert error(out, expected(x, weight, None)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("config", triton_gpu.GEMM, ids=repr)
def test_every_gemm_setting_computes_the_same(config: Gemm) -> None:
    weight, x = weight_of(40, 160, QuantConfig(4)), torch.randn(130, 160, device=DEVICE, dtype=torch.bfloat16)
    out = torch.empty(130, 40, device=DEVICE, dtype=torch.bfloat16)
    triton_gpu.gemm(x, BACKEND.prepack(weight), None, out, config)
    assert error(out, expected(x, weight, None)) < TOLERANCE[torch.bfloat16]


def test_a_large_weight_is_decoded_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_gpu, "SCRATCH_BYTES", 256 * 64 * 4)
    weight, x = weight_of(600, 64, QuantConfig(4)), torch.randn(DENSE_TOKENS, 64, device=DEVICE)
    got = BACKEND.matmul(x, BACKEND.prepack(weight), torch.ones(600, device=DEVICE))
    assert error(got, expected(x, weight, None) + 1) < TOLERANCE[torch.float32]


def test_the_weight_is_read_where_it_is() -> None:
    weight = weight_of(48, 128, QuantConfig(4))
    packed: Packed = BACKEND.prepack(weight)
    assert packed.words.data_ptr() == weight.qweight.data_ptr()
    assert BACKEND.unpack(packed) is weight


def test_a_layer_runs_on_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("glm4lite_quant.linear.pick", lambda weight: BACKEND)
    layer = QuantLinear(128, 40, QuantConfig(4), bias=True, device=DEVICE)
    layer.load(weight_of(40, 128, QuantConfig(4)))
    x = torch.randn(2, 3, 128, device=DEVICE)
    assert error(layer(x), expected(x, layer.weight_tensor, layer.bias)) < TOLERANCE[torch.float32]
    assert set(layer.state_dict()) == {"qweight", "scales", "mins", "row_scale", "row_min", "bias"}


@pytest.mark.skipif(CUDA, reason="a weight on the CPU, where the kernels are compiled for a GPU")
def test_the_interpreter_is_not_offered_for_weights_on_the_cpu() -> None:
    assert not BACKEND.supports(weight_of(16, 64, QuantConfig(4)))
    assert "not written for cpu" in triton_gpu.problem(torch.device("cpu"))


@pytest.mark.skipif(not CUDA, reason="no CUDA device")
def test_a_captured_graph_gives_new_results_for_new_inputs() -> None:
    weight = weight_of(256, 512, QuantConfig(4))
    packed = BACKEND.prepack(weight)
    for tokens in (1, 8, 16, DENSE_TOKENS):
        x = torch.randn(tokens, 512, device=DEVICE, dtype=torch.bfloat16)
        BACKEND.matmul(x, packed, None)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = BACKEND.matmul(x, packed, None)
        x.copy_(torch.randn_like(x))
        graph.replay()
        assert error(out, expected(x, weight, None)) < TOLERANCE[torch.bfloat16]


@pytest.mark.skipif(not CUDA, reason="no CUDA device")
def test_a_gpu_gets_triton_unless_another_kernel_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = weight_of(64, 128, QuantConfig(4))
    x = torch.randn(3, 128, device=DEVICE, dtype=torch.bfloat16)
    if not triton_gpu.problem(weight.device):
        assert gpu.pick(weight).name == "triton"
    for name in gpu.KERNELS:
        monkeypatch.setenv("GLM4LITE_GPU_KERNEL", name)
        if gpu.problem(name, weight.device):
            with pytest.raises(QuantError, match="cannot be used"):
                gpu.pick(weight)
            continue
        backend = gpu.pick(weight)
        assert backend.name == name
        got = backend.matmul(x, backend.prepack(weight), None)
        assert error(got, expected(x, weight, None)) < 2e-2


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Triton comes with its compilers on Linux")
def test_the_kernels_compile_for_ampere_ada_and_hopper_without_one() -> None:
    """What the interpreter cannot see: that they compile, fit a consumer's card and load 16 bytes at a time."""
    script = Path(__file__).with_name("compiled_kernels.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-W", "ignore", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) >= 6 * 8 + 3 * 10
    for row in rows:
        assert row["fits"], row
        assert row["whole"] >= 8 or not row["kernel"].startswith("gemv"), row
