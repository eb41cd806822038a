"""Which code multiplies with a quantized weight: on the CPU the native library where it is built, elsewhere `gpu`'s."""

from __future__ import annotations

from glm4lite_quant.format import Planes
from glm4lite_quant.kernels import gpu, native
from glm4lite_quant.kernels.backend import Backend
from glm4lite_quant.kernels.reference import ReferenceBackend

REFERENCE = ReferenceBackend()


def pick(weight: Planes) -> Backend:
    """The fastest backend for a weight; QuantError where the environment asks for what this machine has not."""
    if weight.device.type not in ("cpu", "meta"):
        return gpu.pick(weight)
    backend = native.backend()
    return backend if backend is not None and backend.supports(weight) else REFERENCE


def status() -> str:
    """One line for people: which CPU kernels run, or why the slow reference does."""
    return native.status()


def gpu_status() -> str:
    """The same for the GPU."""
    return gpu.status()


def check_environment() -> None:
    """QuantError where a GLM4LITE_ variable asks for what there is not: said before any work."""
    native.check_environment()
    gpu.forced()
