"""`glm4lite export`: a checkpoint in the format of another engine, tensor by tensor, without the model in memory.

A weight goes in blocks of rows from the source through the calibrated search to the file, and nothing has its name
before all of it is on the disk. What is particular to a format is a `Target`; what is quantized already keeps its
codes where the format can hold them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from glm4lite.base.errors import CheckpointError, ConfigError, shown
from glm4lite.checkpoint.calibration import Calibrator
from glm4lite.checkpoint.checkpoint import BLOCK_BYTES, Checkpoint
from glm4lite.checkpoint.formats.decoded import DecodedCheckpoint
from glm4lite.checkpoint.formats.own import decoded_own
from glm4lite.checkpoint.formats.registry import format_of
from glm4lite.checkpoint.load_plan import Fill, say_notices
from glm4lite.checkpoint.prepare import Prepared, model_class, opened, prepare
from glm4lite.checkpoint.quant_choice import stored_quant
from glm4lite.checkpoint.streaming import (
    Meter,
    ProgressCallback,
    begin,
    blocks,
    calibration_text,
    finite_blocks,
)
from glm4lite.checkpoint.writer import FolderWriter, PlannedTensor
from glm4lite.export.compressed_tensors import CompressedTensorsTarget
from glm4lite.export.gguf_target import GgufTarget
from glm4lite.export.hugging_face import HuggingFaceTarget
from glm4lite.hub.options import HubOptions
from glm4lite_quant import QuantConfig, QuantError
from glm4lite_quant.config import CALIBRATED, KEPT, SEARCH
from glm4lite_quant.format import ROWS, Codes
from glm4lite_quant.grids import Grid, fit, hold
from glm4lite_quant.inputs import mean_square

logger = logging.getLogger("glm4lite")

TARGETS = ("compressed-tensors", "gguf", "hf")


class Target(Protocol):
    """What is particular to a format."""

    @property
    def quant(self) -> QuantConfig | None:
        """Which weights get codes, of how many bits, in which groups; None: none does."""

    def destination(self, path: str | Path) -> Path:
        """Where it is written; CheckpointError where nothing may be written there."""

    def check(self, prepared: Prepared[Any]) -> None:
        """Raises Glm4liteError where the format, or its engines, cannot have this model."""

    def grid(self, fill: Fill) -> Grid | None:
        """What the codes of a weight stand for; None where it gets none."""

    def planned(self, fill: Fill) -> list[PlannedTensor]:
        """The tensors that a parameter becomes."""

    def encoded(self, fill: Fill, rows: Tensor | Codes) -> Mapping[str, Tensor]:
        """Some rows as they are written, by the names of `planned`."""

    def writer(self, path: Path, planned: list[PlannedTensor], prepared: Prepared[Any]) -> FolderWriter: ...

    def finish(self, writer: FolderWriter, prepared: Prepared[Any]) -> None:
        """Writes what lies beside the tensors."""


def export_checkpoint(
    source: str | Path,
    destination: str | Path,
    to: str,
    kind: str | None = None,
    group_size: int | None = None,
    progress: ProgressCallback | None = None,
    calibration: str | Path | None = None,
    calibrate: bool = True,
    hub: HubOptions = HubOptions(),
) -> Path:
    """Write a checkpoint for another engine; one layer at most is in memory at a time.

    Args:
        to: "compressed-tensors": 4 bits with zero points, for vLLM, SGLang and Transformers. "gguf": one file for
            llama.cpp and what is built on it. "hf": bfloat16 as Transformers writes it.
        kind: of GGUF: "q4_0", "q4_1" (unless given), "q8_0" or "bf16".
        group_size: of compressed-tensors: 32 (unless given), 64 or 128 weights to a scale.
        calibration: a UTF-8 text to calibrate 4-bit weights with, instead of the one that comes with the package.
        calibrate: False: 4-bit weights are searched by their values alone.

    Returns:
        The folder, or of "gguf" the file, that was written.

    Raises:
        Glm4liteError: the source cannot be loaded, the format cannot have this model, or the destination cannot be
            written. Nothing is left behind then, nor after Ctrl-C or an exception from `progress`.
    """
    target = _target(to, kind, group_size, CALIBRATED if calibrate else SEARCH)
    path = target.destination(destination)
    text = calibration_text(calibration, target.quant)
    checkpoint = _plain(opened(source, progress, hub))
    prepared = prepare(checkpoint, target.quant, model_class(checkpoint))
    plan = prepared.plan
    if plan.fresh:
        module, parameter = plan.fresh[0]
        raise CheckpointError(f"{checkpoint.folder} lacks {module}.{parameter}; train the head before exporting")
    target.check(prepared)
    say_notices(prepared.model, checkpoint, plan, exports=True)
    meter = Meter("export", sum(checkpoint.nbytes(fill.source) for fill in plan.fills), progress)
    planned = [tensor for fill in plan.fills for tensor in target.planned(fill)]
    with target.writer(path, planned, prepared) as writer:
        calibrator = begin(checkpoint, plan, prepared.config, text, meter)
        kept = {fill.source: _write(writer, target, checkpoint, fill, meter, calibrator) for fill in plan.fills}
        target.finish(writer, prepared)
    if isinstance(checkpoint, DecodedCheckpoint):
        logger.warning("%s: %s", checkpoint.origin, _outcome([kept[name] for name in checkpoint.packed & kept.keys()]))
    return path


def _target(to: str, kind: str | None, group_size: int | None, method: str) -> Target:
    if kind is not None and to != "gguf":
        raise ConfigError(f"the type {shown(kind)} is one of GGUF; leave it out, or export to gguf")
    if group_size is not None and to != "compressed-tensors":
        raise ConfigError(f"a group size is chosen for compressed-tensors alone; leave it out for {shown(to)}")
    if to == "compressed-tensors":
        return CompressedTensorsTarget(32 if group_size is None else group_size, method)
    if to == "gguf":
        return GgufTarget("q4_1" if kind is None else kind, method)
    if to == "hf":
        return HuggingFaceTarget()
    raise ConfigError(f"a checkpoint cannot be exported to {shown(to)}; use one of {', '.join(TARGETS)}")


def _plain(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with all of its weights as rows, of which those that are quantized also have codes."""
    stored = stored_quant(checkpoint)
    if isinstance(stored, QuantConfig):
        return decoded_own(checkpoint)
    return checkpoint if stored is None else format_of(stored).adapt(checkpoint, stored, None, True)[0]


def _write(
    writer: FolderWriter,
    target: Target,
    checkpoint: Checkpoint,
    fill: Fill,
    meter: Meter,
    calibrator: Calibrator | None,
) -> bool | None:
    """Writes one parameter. Returns whether its codes were kept; None: it gets none."""
    grid, kept = target.grid(fill), True

    def append(rows: Tensor | Codes) -> None:
        for name, encoded in target.encoded(fill, rows).items():
            writer.append(name, encoded)

    if grid is None or not isinstance(fill.quant, QuantConfig):
        for _, rows in finite_blocks(checkpoint, fill.source, meter):
            append(rows)
        return None
    try:
        for codes, own in _codes(checkpoint, fill, grid, fill.quant, meter, calibrator):
            kept = kept and own
            append(codes)
    except QuantError as error:
        where = f"{fill.source} in {checkpoint.file(fill.source)}"
        raise CheckpointError(f"{where} cannot be quantized: {error}; download the file again") from None
    return kept


def _codes(
    checkpoint: Checkpoint, fill: Fill, grid: Grid, quant: QuantConfig, meter: Meter, calibrator: Calibrator | None
) -> Iterator[tuple[Codes, bool]]:
    """(codes of some rows, whether they are the source's own), from the first row to the last."""
    group = quant.group_size
    if isinstance(checkpoint, DecodedCheckpoint) and checkpoint.has_codes(fill.source, group):
        for start, stop in _ranges(checkpoint, fill):
            codes = hold(checkpoint.codes(fill.source, start, stop, group), grid, group)
            if codes is None:
                yield fit(checkpoint.rows(fill.source, start, stop), grid, group, first_row=start), False
            else:
                yield codes, True
            meter.add((stop - start) * checkpoint.nbytes(fill.source) // fill.shape[0])
        return
    held, inputs = (None, None) if calibrator is None or quant.method == KEPT else calibrator.take(fill)
    importance = None if inputs is None else mean_square(inputs)
    for start, rows in blocks(checkpoint, fill.source, meter, held):
        yield fit(rows, grid, group, importance, start), False


def _ranges(checkpoint: Checkpoint, fill: Fill) -> Iterator[tuple[int, int]]:
    n = fill.shape[0]
    step = max(ROWS, BLOCK_BYTES // (checkpoint.nbytes(fill.source) // n) // ROWS * ROWS)
    return ((start, min(start + step, n)) for start in range(0, n, step))


def _outcome(kept: list[bool | None]) -> str:
    """What became of weights that were quantized before."""
    counts = (
        (kept.count(True), "keep their codes"),
        (kept.count(False), "were decoded and quantized again, which loses a little"),
        (kept.count(None), "were decoded"),
    )
    said = ", ".join(f"{count} {what}" for count, what in counts if count)
    return f"of {len(kept)} weights that were quantized {said}"
