"""A weight's way into the quantized form: blocks of rows, read, quantized and dropped, with the bytes counted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from glm4lite.base.errors import CheckpointError, ConfigError
from glm4lite.base.events import Progress
from glm4lite.checkpoint.calibration import Calibrator, layer_bytes
from glm4lite.checkpoint.calibration_text import calibration_ids, read_text
from glm4lite.checkpoint.checkpoint import BLOCK_BYTES, Checkpoint
from glm4lite.checkpoint.formats.format import Quant
from glm4lite.checkpoint.load_plan import Fill, LoadPlan
from glm4lite.model.config import Glm4Config
from glm4lite_quant import BnbTensor, Inputs, QuantConfig, QuantError, QuantTensor
from glm4lite_quant.config import CALIBRATED, KEPT, MINMAX
from glm4lite_quant.format import ROWS

ProgressCallback = Callable[[Progress], None]


class Meter:
    """Counts bytes and reports them."""

    def __init__(self, stage: str, total: int, progress: ProgressCallback | None) -> None:
        self.stage, self.total, self.done, self._progress = stage, total, 0, progress

    def add(self, count: int = 0) -> None:
        """Reports `count` more bytes; 0 where nothing is done yet, but the user may want to stop."""
        self.done += count
        if self._progress is not None:
            self._progress(Progress(self.stage, self.done, self.total, "bytes"))


def blocks(checkpoint: Checkpoint, name: str, meter: Meter, held: Tensor | None = None) -> Iterator[tuple[int, Tensor]]:
    """(first row, rows) of a tensor in its own type, float16 widened to float32; the meter counts what was used.

    `held`: the tensor, where it is in memory already.
    """
    if not checkpoint.shape(name):
        raise CheckpointError(f"{name} in {checkpoint.file(name)} is a single number, not a weight")
    for start, block in checkpoint.row_blocks(name, BLOCK_BYTES, held=held):
        yield start, block.float() if block.dtype == torch.float16 else block
        meter.add(block.nbytes)


def finite_blocks(checkpoint: Checkpoint, name: str, meter: Meter) -> Iterator[tuple[int, Tensor]]:
    """`blocks` of a tensor that stays as it is (quantizing would check it); CheckpointError for NaN or infinity."""
    for start, rows in blocks(checkpoint, name, meter):
        checkpoint.check_finite(name, rows, start)
        yield start, rows


def begin(
    checkpoint: Checkpoint,
    plan: LoadPlan,
    config: Glm4Config,
    text: str | None,
    meter: Meter,
    state: tuple[int, Tensor] | None = None,
    outside: Mapping[str, Tensor] | None = None,
) -> Calibrator | None:
    """The calibrator of a plan some of whose weights are to be calibrated, else None; the last two as it takes them."""
    if not needs_calibration(plan):
        return None
    return Calibrator(checkpoint, plan, config, calibration_ids(checkpoint, config, text), meter.add, state, outside)


def calibration_text(path: str | Path | None, quant: Quant | None) -> str | None:
    """The text of one's own to calibrate with; ConfigError where it cannot be used or nothing is calibrated."""
    if path is None:
        return None
    method = quant and quant.method
    if method != CALIBRATED:
        made = "nothing is quantized" if method is None else f"the method {method!r} needs none"
        raise ConfigError(f"a calibration text is given, but {made}; leave it out or quantize to int4")
    return read_text(Path(path))


def recorded(quant: Quant, calibrator: Calibrator | None) -> Quant:
    """The config with what its weights were calibrated with."""
    if calibrator is None or not isinstance(quant, QuantConfig):
        return quant
    return replace(quant, calibration=calibrator.record)


def loading_bytes(checkpoint: Checkpoint, plan: LoadPlan) -> int:
    """What is held beside the weights while they are quantized: blocks of rows, when calibrating a layer as it is."""
    if not any(fill.quant for fill in plan.fills):
        return 0
    return 8 * BLOCK_BYTES + (layer_bytes(checkpoint, plan) if needs_calibration(plan) else 0)


def needs_calibration(plan: LoadPlan) -> bool:
    return any(isinstance(fill.quant, QuantConfig) and fill.quant.method == CALIBRATED for fill in plan.fills)


def quantize_weight(
    checkpoint: Checkpoint, fill: Fill, quant: Quant, meter: Meter, calibrator: Calibrator | None, device: torch.device
) -> QuantTensor | BnbTensor:
    """One weight, quantized block by block; without calibration, never all of it is in memory unquantized.

    Ours are made on the CPU, another tool's on the `device` where they will be.
    """
    n, k = fill.shape
    try:
        if not isinstance(quant, QuantConfig):
            foreign = BnbTensor.empty(n, k, quant, device)
            for start, rows in blocks(checkpoint, fill.source, meter):
                foreign.quantize_rows(start, rows)
            return foreign.double_quantized() if quant.double_quant else foreign
        if quant.method == KEPT:
            return _with_kept_codes(checkpoint, fill, quant, meter)
        held, given = (None, None) if calibrator is None else calibrator.take(fill)
        inputs = None if given is None else Inputs.of(given)
        if given is None and calibrator is not None:
            inputs = calibrator.outside(fill)
        weight = QuantTensor.empty(n, k, quant)
        for start, rows in blocks(checkpoint, fill.source, meter, held):
            weight.quantize_rows(start, rows, inputs, fast=quant.method == MINMAX)
        return weight
    except QuantError as error:
        where = f"{fill.source} in {checkpoint.file(fill.source)}"
        raise CheckpointError(f"{where} cannot be quantized: {error}; download the file again") from None


def _with_kept_codes(checkpoint: Checkpoint, fill: Fill, quant: QuantConfig, meter: Meter) -> QuantTensor:
    """A weight with another tool's codes; tiles of rows whose scales are too far apart for ours are quantized anew."""
    n, k = fill.shape
    weight = QuantTensor.empty(n, k, quant)
    row_bytes = checkpoint.nbytes(fill.source) // n
    step = max(ROWS, BLOCK_BYTES // row_bytes // ROWS * ROWS)
    for start in range(0, n, step):
        stop = min(start + step, n)
        codes = checkpoint.codes(fill.source, start, stop, quant.group_size)
        lossy = weight.take_codes(start, codes)
        for tile in (lossy.nonzero()[:, 0] // ROWS).unique().tolist():
            rows = slice(tile * ROWS, min((tile + 1) * ROWS, stop - start))
            weight.quantize_rows(start + rows.start, codes[rows].decoded())
        meter.add((stop - start) * row_bytes)
    return weight
