"""Which code multiplies with a quantized weight: on the CPU the native library where it is built, elsewhere `gpu`'s."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from glm4lite_quant.kernels import gpu, native
from glm4lite_quant.kernels.reference import ReferenceBackend

if TYPE_CHECKING:
    from glm4lite_quant.tensor import QuantTensor


class Backend(Protocol):
    """A way to multiply with a `QuantTensor`; chosen once per layer by `pick`."""

    @property
    def name(self) -> str:
        """What `glm4lite info` prints, for example native-avx512vnni."""

    @property
    def repacks(self) -> bool:
        """Whether `prepack` copies the codes into another layout; the layer then keeps only that."""

    def supports(self, weight: QuantTensor) -> bool:
        """Whether this backend can use the weight where it is."""

    def prepack(self, weight: QuantTensor) -> Any:
        """Done once per weight; the result goes into `matmul`. All but tinygemm read the weight in place."""

    def unpack(self, packed: Any) -> QuantTensor:
        """The weight that was packed, exactly."""

    def matmul(self, x: Tensor, packed: Any, bias: Tensor | None, parts: int = 1) -> Tensor:
        """x [M, K] bfloat16 or float32, bias float32 [N] -> [M, N] in x.dtype.

        A backend that rounds x to int8 takes it in so many `parts`.
        """


REFERENCE = ReferenceBackend()


def pick(weight: QuantTensor) -> Backend:
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
