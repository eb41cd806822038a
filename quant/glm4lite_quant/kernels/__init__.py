"""Which code multiplies with a quantized weight: the native library where it is built and fits, else plain torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from glm4lite_quant.kernels import native
from glm4lite_quant.kernels.reference import ReferenceBackend

if TYPE_CHECKING:
    from glm4lite_quant.tensor import QuantTensor


class Backend(Protocol):
    """A way to multiply with a `QuantTensor`; chosen once per layer by `pick`."""

    @property
    def name(self) -> str:
        """What `glm4lite info` prints, for example native-avx512vnni."""

    def supports(self, weight: QuantTensor) -> bool:
        """Whether this backend can use the weight where it is."""

    def prepack(self, weight: QuantTensor) -> Any:
        """Done once per weight; the result goes into `matmul`. CPU backends read the weight in place."""

    def matmul(self, x: Tensor, packed: Any, bias: Tensor | None, parts: int = 1) -> Tensor:
        """x [M, K] bfloat16 or float32, bias float32 [N] -> [M, N] in x.dtype.

        A backend that rounds x to int8 takes it in so many `parts`.
        """


REFERENCE = ReferenceBackend()


def pick(weight: QuantTensor) -> Backend:
    """The fastest backend for a weight; QuantError where GLM4LITE_ISA names what this machine has not."""
    backend = native.backend()
    return backend if backend is not None and backend.supports(weight) else REFERENCE


def status() -> str:
    """One line for people: which CPU kernels run, or why the slow reference does."""
    return native.status()
