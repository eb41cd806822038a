"""Which backend multiplies with a weight that is not on the CPU, and why not a faster one.

GLM4LITE_GPU_KERNEL forces one of KERNELS; a weight that it has no code for (int8 with tinygemm) is then dequantized.
"""

from __future__ import annotations

import logging
import os
import sys
from functools import lru_cache

import torch

from glm4lite_quant.config import QuantError
from glm4lite_quant.format import Planes
from glm4lite_quant.kernels.backend import Backend
from glm4lite_quant.kernels.dequant import DequantBackend
from glm4lite_quant.kernels.tinygemm import TinygemmBackend
from glm4lite_quant.kernels.tinygemm import problem as tinygemm_problem

logger = logging.getLogger("glm4lite")

KERNELS = ("triton", "tinygemm", "dequant")  # fastest first
DEQUANT = DequantBackend()


def pick(weight: Planes) -> Backend:
    """The fastest backend for a weight, or the forced one; QuantError where that cannot run on the weight's device."""
    chosen = forced()
    for name in (chosen,) if chosen else KERNELS:
        why = problem(name, weight.device)
        if why and chosen:
            raise QuantError(f"GLM4LITE_GPU_KERNEL={chosen} cannot be used: {why}")
        found = None if why else backend(name)
        if found is not None and found.supports(weight):
            if found is DEQUANT and not chosen and weight.bits not in (4, 8):
                _say_slow(weight.bits)
            return found
    return DEQUANT


@lru_cache(maxsize=8)
def _say_slow(bits: int) -> None:
    """Once."""
    logger.warning(
        "weights of %d bits are decoded for each product on this GPU, which is slow: only Triton has a kernel for them",
        bits,
    )


def forced() -> str:
    """GLM4LITE_GPU_KERNEL, "" where it is not set; QuantError where it names no kernel."""
    name = os.environ.get("GLM4LITE_GPU_KERNEL", "")
    if name and name not in KERNELS:
        raise QuantError(f"GLM4LITE_GPU_KERNEL is {name!r}; use one of {', '.join(KERNELS)}")
    return name


def problem(name: str, device: torch.device) -> str:
    """Why a kernel cannot run on a device, "" where it can; tried once on each."""
    if name == "tinygemm":
        return tinygemm_problem(device)
    if name == "dequant":
        return ""
    try:
        from glm4lite_quant.kernels import triton_gpu
    except ImportError:
        command = "'glm4lite[gpu]'" if sys.platform == "win32" else "triton"
        return f"triton is not installed (pip install {command})"
    return triton_gpu.problem(device)


def status() -> str:
    """One line for people: which kernels run on the first GPU, and what keeps the faster ones from it."""
    try:
        chosen, device = forced(), _device()
    except QuantError as error:
        return f"error: {error}"
    if device is None:
        return _others() or "none needed: torch finds no GPU"
    reasons: list[str] = []
    for name in (chosen,) if chosen else KERNELS:
        why = problem(name, device)
        if not why:
            also = ", dequant (slow) for int8" if name == "tinygemm" else ""
            return "; ".join([f"{name}{also}", *reasons])
        if chosen:
            return f"error: GLM4LITE_GPU_KERNEL={chosen} cannot be used: {why}"
        reasons.append(f"no {name}: {why}")
    return "; ".join(reasons)


def slower_than_cpu(device: torch.device, quantized: bool) -> str:
    """Why nobody is helped by a GPU that was not asked for, "" where it is faster than the CPU.

    quantized: for int4 and int8 layers. Without a kernel each product first decodes its weight to bfloat16: for a token
    eight times the bytes of int4 are moved, and no GPU without a kernel has memory so much faster than the CPU's. Other
    layers compute in bfloat16, which older GPUs have no units for; float16 does not hold GLM-4's activations.
    """
    if device.type != "cuda":
        return f"no kernels are written for {device.type}"
    if forced():
        return ""
    if quantized:
        reasons = [problem(name, device) for name in ("triton", "tinygemm")]
        return "" if "" in reasons else f"no kernel for int4 runs there: {reasons[0]}"
    major, minor = torch.cuda.get_device_capability(device)
    if torch.version.hip is None and major < 8:
        return f"bfloat16 needs compute capability 8.0, it has {major}.{minor}"
    return ""


def backend(name: str) -> Backend:
    """A backend by its name in KERNELS, whether or not it can run."""
    if name == "triton":
        from glm4lite_quant.kernels.triton_gpu import TritonBackend

        return TritonBackend()
    return TinygemmBackend() if name == "tinygemm" else DEQUANT


def _device() -> torch.device | None:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None


def _others() -> str:
    """A line about a GPU that torch finds and that nothing here runs on; "" where there is none."""
    names = [
        name
        for name, there in (("Apple's GPU (mps)", torch.backends.mps), ("Intel's GPU (xpu)", torch.xpu))
        if there.is_available()
    ]
    return f"none for {' and '.join(names)}: the CPU computes" if names else ""
