"""A weight's way into the quantized form: blocks of rows, read, quantized and dropped, with the bytes counted."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from glm4lite.checkpoint import Checkpoint
from glm4lite.errors import CheckpointError
from glm4lite.events import Progress
from glm4lite.weights.plan import Fill
from glm4lite_quant import QuantError, QuantTensor

ProgressCallback = Callable[[Progress], None]

BLOCK_BYTES = 16 << 20
"""Bytes of a checkpoint in memory at a time: enough rows for every thread, little beside the model."""


class Meter:
    """Counts bytes and reports them."""

    def __init__(self, stage: str, total: int, progress: ProgressCallback | None) -> None:
        self.stage, self.total, self.done, self._progress = stage, total, 0, progress

    def add(self, count: int) -> None:
        self.done += count
        if self._progress is not None:
            self._progress(Progress(self.stage, self.done, self.total, "bytes"))


def blocks(checkpoint: Checkpoint, name: str, meter: Meter) -> Iterator[tuple[int, Tensor]]:
    """(first row, rows) of a tensor in its own type, float16 widened to float32; the meter counts what was used."""
    if not checkpoint.shape(name):
        raise CheckpointError(f"{name} in {checkpoint.file(name)} is a single number, not a weight")
    for start, block in checkpoint.row_blocks(name, BLOCK_BYTES):
        yield start, block.float() if block.dtype == torch.float16 else block
        meter.add(block.nbytes)


def quantize_weight(checkpoint: Checkpoint, fill: Fill, meter: Meter) -> QuantTensor:
    """One weight, quantized block by block; at no time is all of it in memory unquantized."""
    if fill.quant is None:
        raise CheckpointError(f"{fill.source} is not to be quantized")
    weight = QuantTensor.empty(fill.shape[0], fill.shape[1], fill.quant)
    try:
        for start, rows in blocks(checkpoint, fill.source, meter):
            weight.quantize_rows(start, rows)
    except QuantError as error:
        where = f"{fill.source} in {checkpoint.file(fill.source)}"
        raise CheckpointError(f"{where} cannot be quantized: {error}; download the file again") from None
    return weight
