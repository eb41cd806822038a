"""Which backend multiplies with a weight that is not on the CPU, and why not a faster one.

GLM4LITE_GPU_KERNEL forces one of KERNELS; a weight that it has no code for (int8 with tinygemm) is then dequantized.
"""

from __future__ import annotations

import os

import torch

from glm4lite_quant.config import QuantError
from glm4lite_quant.format import Planes
from glm4lite_quant.kernels.backend import Backend
from glm4lite_quant.kernels.dequant import DequantBackend
from glm4lite_quant.kernels.tinygemm import TinygemmBackend
from glm4lite_quant.kernels.tinygemm import problem as tinygemm_problem

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
            return found
    return DEQUANT


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
        return "triton is not installed (pip install triton; on Windows pip install triton-windows)"
    return triton_gpu.problem(device)


def status() -> str:
    """One line for people: which kernels run on the first GPU, and what keeps the faster ones from it."""
    try:
        chosen, device = forced(), _device()
    except QuantError as error:
        return f"error: {error}"
    if device is None:
        return "none needed: torch finds no GPU"
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


def backend(name: str) -> Backend:
    """A backend by its name in KERNELS, whether or not it can run."""
    if name == "triton":
        from glm4lite_quant.kernels.triton_gpu import TritonBackend

        return TritonBackend()
    return TinygemmBackend() if name == "tinygemm" else DEQUANT


def _device() -> torch.device | None:
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("mps") if torch.backends.mps.is_available() else None
