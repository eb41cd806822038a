"""A checkpoint that glm4lite quantized, as a plain one: rows are decoded as they are read."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from glm4lite.base.errors import CheckpointError
from glm4lite.checkpoint.checkpoint import Checkpoint
from glm4lite.checkpoint.formats.decoded import DecodedCheckpoint
from glm4lite.checkpoint.formats.weight import Affine, PackedWeight
from glm4lite_quant import QuantError, QuantTensor
from glm4lite_quant.format import NAMES, ROWS
from glm4lite_quant.grids import as_codes, steps


def decoded_own(checkpoint: Checkpoint) -> DecodedCheckpoint:
    """Raises CheckpointError where the planes of a weight contradict each other."""
    return DecodedCheckpoint(checkpoint, dict(_weights(checkpoint)))


def _weights(checkpoint: Checkpoint) -> Iterator[tuple[str, PackedWeight]]:
    for name in checkpoint.names():
        module = name.removesuffix(".qweight")
        if module != name:
            yield f"{module}.weight", _weight(checkpoint, module)


def _weight(checkpoint: Checkpoint, module: str) -> PackedWeight:
    parts = tuple(f"{module}.{plane}" for plane in NAMES if f"{module}.{plane}" in checkpoint)

    def made(planes: dict[str, Tensor]) -> QuantTensor:
        try:
            weight = QuantTensor.from_tensors(planes)
            if weight.device.type != "meta":
                weight.check_finite()
        except QuantError as error:
            where = f"{module} in {checkpoint.file(parts[0])}"
            raise CheckpointError(f"{where}: {error}; download it or quantize the original again") from None
        return weight

    def opened(source: Checkpoint) -> Affine:
        weight = made({part.rpartition(".")[2]: source.mapped(part) for part in parts})
        step, low, levels = steps(weight)

        def unpack(start: int, stop: int) -> Tensor:
            first = start // ROWS * ROWS
            tiles = weight.tiles(first, min(-(-stop // ROWS) * ROWS, weight.shape[0]))
            return as_codes(QuantTensor.of(tiles)).values[start - first : stop - first]

        return Affine(step, low, levels, unpack)

    told = made({part.rpartition(".")[2]: checkpoint.outline(part) for part in parts})
    return PackedWeight(parts, told.shape, "F32", told.bits, told.group_size, opened, calibrate=told.bits == 8)
