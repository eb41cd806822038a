"""What every way to multiply with a quantized weight is asked."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from glm4lite_quant.format import Planes


class Backend(Protocol):
    """A way to multiply with a quantized weight; chosen once per layer by `pick`."""

    @property
    def name(self) -> str:
        """What `glm4lite info` prints, for example native-avx512vnni."""

    @property
    def repacks(self) -> bool:
        """Whether `prepack` copies the codes into another layout; the layer then keeps only that."""

    def supports(self, weight: Planes) -> bool:
        """Whether this backend can use the weight where it is."""

    def prepack(self, weight: Planes) -> Any:
        """Done once per weight; the result goes into `matmul`. All but tinygemm read the weight in place."""

    def unpack(self, packed: Any) -> Planes:
        """The weight that was packed, exactly."""

    def matmul(self, x: Tensor, packed: Any, bias: Tensor | None, splits: int = 1) -> Tensor:
        """x [M, K] bfloat16 or float32, bias float32 [N] -> [M, N] in x.dtype.

        A backend that rounds x to int8 takes it in so many `splits`.
        """
