"""Pre-quantized checkpoints: made from a checkpoint tensor by tensor, without the model in memory.

The result is an ordinary folder: config.json with `quantization_config`, `<module>.qweight`, `.scales`, `.mins`,
`.row_scale`, `.row_min` beside the other tensors, and the source's tokenizer, chat template and generation config.
`load` maps it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from glm4lite.base.errors import CheckpointError, ConfigError, HubError
from glm4lite.base.files import COMPANIONS, CONFIG
from glm4lite.checkpoint.calibration import Calibrator
from glm4lite.checkpoint.checkpoint import Checkpoint
from glm4lite.checkpoint.codec_choice import Aim, choose
from glm4lite.checkpoint.formats.format import Quant
from glm4lite.checkpoint.load_plan import Fill, LoadPlan, say_notices
from glm4lite.checkpoint.lora.adapted import AdaptedCheckpoint
from glm4lite.checkpoint.lora.folder import Loras
from glm4lite.checkpoint.prepare import Prepared, model_class, opened, prepare
from glm4lite.checkpoint.quant_choice import empty_weight, parse_quant, stored_quant
from glm4lite.checkpoint.resumable import SHARDS_IN, ResumableWriter, unfinished
from glm4lite.checkpoint.shard import DTYPES
from glm4lite.checkpoint.streaming import (
    Meter,
    ProgressCallback,
    begin,
    calibration_text,
    finite_blocks,
    quantize_weight,
    recorded,
)
from glm4lite.checkpoint.writer import SHARD_BYTES, FolderWriter, PlannedTensor, check_destination
from glm4lite.hub.options import HubOptions
from glm4lite.hub.sources import is_choice, is_url, locate
from glm4lite.model.config import Glm4Config
from glm4lite.model.layers import layer_of
from glm4lite_quant import QuantConfig

if TYPE_CHECKING:
    from glm4lite.checkpoint.arrivals import Arrivals


def quantize_checkpoint(
    source: str | Path,
    destination: str | Path,
    quant: str | QuantConfig = "int4",
    progress: ProgressCallback | None = None,
    shard_bytes: int = SHARD_BYTES,
    calibration: str | Path | None = None,
    hub: HubOptions = HubOptions(),
    lora: str | Path | Sequence[str | Path] | None = None,
    aim: Aim | None = None,
) -> Path:
    """Quantize a checkpoint into a new folder, one weight (when calibrating: one layer) in memory at a time.

    A repo's shards are fetched as they are needed and dropped behind their last use; a run that ends early, however, is
    gone on with by the next one, at the cost of a layer. (Not so with an `aim`, whose choice goes through all
    layers first: a repo is fetched whole then, as `glm4lite pull` does it.)

    Args:
        calibration: a UTF-8 text to calibrate int4 weights with, instead of the one that comes with the package.
        lora: adapters that become a part of the weights, as `load` takes them.
        aim: bits a weight on average, or memory to fit: each weight then gets the codec that the model's answers
            lose least with, and `quant` says nothing.

    Returns:
        The folder written.

    Raises:
        Glm4liteError: the source cannot be loaded, is quantized already (what bitsandbytes quantized to 4 bits is
            decoded and quantized again), or the destination cannot be written.
            Of a source on this machine nothing is left behind then, nor after Ctrl-C or an exception from `progress`.
    """
    target = destination_folder(destination)
    config = QuantConfig() if aim else parse_quant(quant)
    if not isinstance(config, QuantConfig | None):
        how = f"`glm4lite chat MODEL --quant {config.kind}`"
        raise ConfigError(f"{config.kind} is made while a model loads ({how}); a quantized folder is int4 or int8")
    if config is None:
        raise ConfigError("quant 'none' leaves nothing to do; use int4 or int8")
    text = calibration_text(calibration, config)
    arrivals = None if aim else _arrivals(source, progress, hub)
    checkpoint = (
        opened(source, progress, hub) if arrivals is None else arrivals.checkpoint(unfinished(target) / SHARDS_IN)
    )
    if isinstance(stored_quant(checkpoint), QuantConfig):
        raise ConfigError(f"{checkpoint.folder} is quantized already; quantize the original checkpoint")
    loras = Loras.of(lora)
    prepared = prepare(checkpoint, config, model_class(checkpoint), None, False, loras, False, progress, hub)
    if prepared.beside:
        raise ConfigError(f"an adapter adds a bias to {prepared.beside[0].fill.module}, which has none to be saved in")
    choice = choose(prepared, aim, text, progress) if aim else None
    prepared = choice.prepared if choice else prepared
    checkpoint, plan = prepared.checkpoint, prepared.plan
    if plan.fresh:
        module, parameter = plan.fresh[0]
        raise CheckpointError(f"{checkpoint.folder} lacks {module}.{parameter}; train the head before quantizing")
    say_notices(prepared.model, checkpoint, plan)
    meter = Meter("quantize", sum(checkpoint.nbytes(fill.source) for fill in plan.fills), progress)
    planned = [tensor for fill in plan.fills for tensor in _planned(checkpoint, fill)]
    if arrivals is None:
        with FolderWriter(target, planned, shard_bytes) as writer:
            outside = choice.outside if choice else None
            calibrator = begin(checkpoint, plan, prepared.config, text, meter, outside=outside)
            for fill in plan.fills:
                _write_fill(writer, checkpoint, fill, meter, calibrator)
            _write_rest(writer, checkpoint, prepared.config, recorded(prepared.wanted or config, calibrator))
    else:
        key = hashlib.sha256(
            repr((arrivals.identity, planned, config, text, *_adapters(checkpoint))).encode()
        ).hexdigest()
        with ResumableWriter(target, planned, key, shard_bytes, arrivals.largest) as kept:
            try:
                calibrator = _as_it_arrives(arrivals, kept, prepared, text, meter)
            finally:
                arrivals.stop()
            _write_rest(kept, checkpoint, prepared.config, recorded(prepared.wanted or config, calibrator))
    return target


def _arrivals(source: str | Path, progress: ProgressCallback | None, hub: HubOptions) -> Arrivals | None:
    """A repo's shards, to be quantized as they arrive; None where all of it is on this machine, or comes as GGUF."""
    found = locate(source)
    if isinstance(found, Path) or is_url(found) or is_choice(found):
        return None
    from glm4lite.checkpoint.arrivals import Arrivals  # huggingface_hub takes a while to import
    from glm4lite.hub.download import OnlyGguf, Snapshot, whole_in_cache

    try:
        if hub.local_files_only:
            return None
        return Arrivals(Snapshot.of(found, hub, progress))
    except OnlyGguf:
        return None
    except HubError:
        if whole_in_cache(found, hub) is None:
            raise
        return None


def _as_it_arrives(
    arrivals: Arrivals, writer: ResumableWriter, prepared: Prepared[Any], text: str | None, meter: Meter
) -> Calibrator | None:
    """Layer by layer, from where an earlier run came to."""
    checkpoint, units = prepared.checkpoint, _units(prepared.plan)
    calibrator: Calibrator | None = None
    made = {fill.source: sum(one.nbytes for one in _planned(checkpoint, fill)) for unit in units for fill in unit}
    arrivals.begin()
    for number, unit in enumerate(units):
        later = [fill.source for after in units[number + 1 :] for fill in after]
        names = [tensor.name for fill in unit for tensor in _planned(checkpoint, fill)]
        if number < writer.units:
            writer.whole(names)
            meter.add(sum(checkpoint.nbytes(fill.source) for fill in unit))
            continue
        arrivals.bring(checkpoint, (fill.source for fill in unit), later)
        arrivals.look_ahead(checkpoint, later, made.__getitem__)
        if calibrator is None:
            calibrator = begin(checkpoint, prepared.plan, prepared.config, text, meter, writer.stream)
        for fill in unit:
            _write_fill(writer, checkpoint, fill, meter, calibrator)
        writer.commit(names, None if calibrator is None else calibrator.state)
        arrivals.drop(checkpoint, later)
    if calibrator is None:  # the earlier run had come to the end
        calibrator = begin(checkpoint, prepared.plan, prepared.config, text, meter, writer.stream)
    return calibrator


def _adapters(checkpoint: Checkpoint) -> Iterator[bytes]:
    """What tells the adapters in it from others."""
    if isinstance(checkpoint, AdaptedCheckpoint):
        yield checkpoint.identities()[0]


def _units(plan: LoadPlan) -> list[list[Fill]]:
    """What is made and kept as a whole: each layer, and what lies in none one by one, in the model's order."""
    return [list(fills) for _, fills in groupby(plan.fills, lambda fill: (layer_of(fill.module) or (fill.module,))[0])]


def destination_folder(destination: str | Path, replace: bool = False) -> Path:
    """The folder to write, checked before any work; with `replace` it may hold files."""
    try:
        target = Path(destination).expanduser()
    except RuntimeError as error:  # "~name" of a user who does not exist
        raise CheckpointError(f"{destination} cannot be written ({error}); choose another folder") from None
    check_destination(target, replace)
    return target


def _planned(checkpoint: Checkpoint, fill: Fill) -> Iterator[PlannedTensor]:
    if fill.quant is None:
        stored = DTYPES[checkpoint.dtype(fill.source)]
        yield PlannedTensor(fill.source, torch.float32 if stored == torch.float16 else stored, fill.shape)
        return
    for part, tensor in empty_weight(fill.shape, fill.quant).tensors().items():
        yield PlannedTensor(_part_name(fill, part), tensor.dtype, tuple(tensor.shape))


def _part_name(fill: Fill, part: str) -> str:
    return f"{fill.source.removesuffix('.weight')}.{part}"


def _write_fill(
    writer: FolderWriter, checkpoint: Checkpoint, fill: Fill, meter: Meter, calibrator: Calibrator | None
) -> None:
    if fill.quant is None:
        for _, rows in finite_blocks(checkpoint, fill.source, meter):
            writer.append(fill.source, rows)
        return
    made = quantize_weight(checkpoint, fill, fill.quant, meter, calibrator, torch.device("cpu"))
    for part, tensor in made.tensors().items():
        writer.write(_part_name(fill, part), tensor)


def _write_rest(writer: FolderWriter, checkpoint: Checkpoint, config: Glm4Config, quant: Quant) -> None:
    legacy = checkpoint.config.get("model_type") == "chatglm"
    values = config.to_diff_dict() if legacy else dict(checkpoint.config)
    writer.write_json(CONFIG, values | {"quantization_config": quant.to_dict()})
    writer.copy(checkpoint.folder / name for name in COMPANIONS)
