"""The ways to multiply that bench/gpu.py compares: each holds one weight [N, K] on a device and multiplies with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from glm4lite_quant import QuantConfig, QuantTensor
from glm4lite_quant.kernels import gpu

GROUP = 32


@dataclass(frozen=True)
class Held:
    """A weight as an engine holds it; `dense` gives what it stands for, float32 [N, K]."""

    multiply: Callable[[Tensor], Tensor]
    nbytes: int
    dense: Callable[[], Tensor]


@dataclass(frozen=True)
class Engine:
    """`make(n, k, bits, device)` builds a random weight; the bits are glm4lite's rule (8 for k, v and the head)."""

    name: str
    make: Callable[[int, int, int, torch.device], Held]
    tolerance: float  # of the largest result, for bfloat16


def random_weight(n: int, k: int, bits: int, device: torch.device, group: int = GROUP) -> QuantTensor:
    """Random codes and scales, of weights of about 0.02: quantizing would take longer than all measurements."""
    weight = QuantTensor.empty(n, k, QuantConfig(bits, group), device)
    half = 64.0 if bits == 8 else ((1 << bits) - 1) / 2  # of the range of the codes
    step = 0.02 / half / 128
    weight.qweight.random_(0, 256)
    weight.scales.random_(1, 256)
    weight.row_scale.uniform_(0.5 * step, 1.5 * step)
    if weight.mins is not None and weight.row_min is not None:
        weight.mins.random_(0, 256)
        weight.row_min.copy_(half * weight.row_scale)
    return weight


def _ours(kernel: str, bits: int | None = None) -> Callable[[int, int, int, torch.device], Held]:
    """A backend of glm4lite_quant; `bits` instead of the rule's."""

    def make(n: int, k: int, rule: int, device: torch.device) -> Held:
        backend = gpu.backend(kernel)
        weight = random_weight(n, k, bits or rule, device)
        size = weight.nbytes
        packed = backend.prepack(weight)
        if backend.repacks:
            size = sum(t.nbytes for t in vars(packed).values() if isinstance(t, Tensor))
            del weight
        return Held(
            lambda x: backend.matmul(x, packed, None), size, lambda: QuantTensor.of(backend.unpack(packed)).dequantize()
        )

    return make


def _nf4(n: int, k: int, rule: int, device: torch.device) -> Held:
    import bitsandbytes as bnb

    weight = torch.randn(n, k, dtype=torch.bfloat16, device=device) * 0.02
    codes, state = bnb.functional.quantize_4bit(weight, quant_type="nf4", blocksize=64)
    size = codes.nbytes + state.absmax.nbytes
    return Held(
        lambda x: bnb.matmul_4bit(x, codes.t(), quant_state=state),
        size,
        lambda: bnb.functional.dequantize_4bit(codes, state).float(),
    )


def _bfloat16(n: int, k: int, rule: int, device: torch.device) -> Held:
    weight = torch.randn(n, k, dtype=torch.bfloat16, device=device) * 0.02
    return Held(lambda x: F.linear(x, weight), weight.nbytes, weight.float)


TRITON = Engine("glm4lite triton", _ours("triton"), 1.2e-2)
TRITON4 = Engine("triton int4", _ours("triton", 4), 1.2e-2)
TRITON8 = Engine("triton int8", _ours("triton", 8), 1.2e-2)
TINYGEMM = Engine("tinygemm int4", _ours("tinygemm", 4), 2e-2)
NF4 = Engine("bitsandbytes NF4", _nf4, 2e-2)
BFLOAT16 = Engine("bfloat16", _bfloat16, 1.2e-2)


def available(device: torch.device) -> tuple[dict[str, Engine], list[str]]:
    """The engines that can run here by name, and a line for each that cannot."""
    engines, missing = {}, []
    for engine, kernel in ((TRITON4, "triton"), (TRITON8, "triton"), (TINYGEMM, "tinygemm")):
        why = gpu.problem(kernel, device)
        if why:
            missing.append(f"{engine.name} left out: {why}")
        else:
            engines[engine.name] = engine
    try:
        import bitsandbytes  # noqa: F401

        engines[NF4.name] = NF4
    except Exception as error:  # not installed, or its library does not load
        missing.append(
            f"{NF4.name} left out: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        )
    engines[BFLOAT16.name] = BFLOAT16
    return engines, missing


def check(engine: Engine, held: Held, x: Tensor) -> None:
    """SystemExit where a product is not x @ dense.T: a wrong kernel must not be timed."""
    got, want = held.multiply(x).float(), x.float() @ held.dense().T
    off = float((got - want).abs().max() / want.abs().max())
    if not off <= engine.tolerance:
        raise SystemExit(f"{engine.name} is wrong: [{x.shape[0]}, {x.shape[1]}] -> {got.shape[1]} off by {off:.2e}")
