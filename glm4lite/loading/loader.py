"""From a checkpoint to a model, one block of rows at a time.

The skeleton is built on the meta device; each weight is read in blocks of at most 16 MiB, quantized, assigned and
dropped, so the peak is the quantized model plus a few blocks, never the checkpoint. Weights that lie quantized in the
checkpoint are mapped in place and not copied; where a budget is given, they are read into memory or streamed from disk.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from glm4lite.base.errors import CheckpointError, ConfigError
from glm4lite.base.sentences import Sentence
from glm4lite.base.sizes import readable
from glm4lite.checkpoint.calibration import layer_bytes
from glm4lite.checkpoint.checkpoint import Checkpoint
from glm4lite.checkpoint.codec_choice import choose as choose_codecs
from glm4lite.checkpoint.formats.registry import format_of
from glm4lite.checkpoint.load_plan import LoadPlan, Model, say_notices
from glm4lite.checkpoint.lora.adapted import AdaptedCheckpoint
from glm4lite.checkpoint.prepare import Prepared, opened, prepare
from glm4lite.checkpoint.quant_choice import stored_quant
from glm4lite.checkpoint.streaming import Meter, begin, calibration_text, needs_calibration, recorded
from glm4lite.loading.assembly import Assembly, check_as_stored
from glm4lite.loading.device_map import DeviceMap, choose
from glm4lite.loading.load_options import LoadOptions
from glm4lite.loading.requirements import requirements_for
from glm4lite.memory import system
from glm4lite.runtime.out_of_memory import enough_for
from glm4lite.runtime.runner import attach
from glm4lite_quant import QuantConfig

logger = logging.getLogger("glm4lite")


def load_class(cls: type[Model], source: str | Path, options: LoadOptions) -> tuple[Model, LoadPlan]:
    """A model of any of the classes, and what became of the checkpoint's tensors."""
    text = calibration_text(options.calibration, options.wanted)  # wrong before anything is downloaded
    return load_checkpoint(cls, opened(source, options.progress, options.hub), options, str(source), text)


def load_checkpoint(
    cls: type[Model], checkpoint: Checkpoint, options: LoadOptions, name: str, calibrating: str | None = None
) -> tuple[Model, LoadPlan]:
    """The same of an open checkpoint. name: for config.name_or_path; calibrating: a text of one's own."""
    budget, aim = options.limits, options.aim
    if aim is not None and isinstance(stored_quant(checkpoint), QuantConfig):
        raise ConfigError(f"{checkpoint.origin} is quantized already; load it as it is, without {aim.option}")
    found = prepare(
        checkpoint,
        options.quant if aim is None else QuantConfig(),
        cls,
        options.config_for,
        options.ignore_mismatched_sizes,
        options.loras,
        progress=options.progress,
        hub=replace(options.hub, revision=None, subfolder=""),
    )
    choice = None if aim is None else choose_codecs(found, aim, calibrating, options.progress)
    found = found if choice is None else choice.prepared
    checkpoint, config, model, plan = found.checkpoint, found.config, found.model, found.plan
    config.name_or_path = name
    needs = requirements_for(found)
    device_map = choose(checkpoint, plan, needs, options.target, options.activations, budget)
    _check_memory(checkpoint, plan, found, device_map)
    say_notices(model, checkpoint, plan)
    if device_map.home.type == "cpu" and not isinstance(found.quant, QuantConfig | None):
        logger.warning(format_of(found.quant).cpu_note)
    meter = Meter("load", _total_bytes(checkpoint, plan), options.progress)
    outside = None if choice is None else choice.outside
    calibrator = begin(checkpoint, plan, config, calibrating, meter, outside=outside)
    assembly = Assembly(model, checkpoint, plan, device_map, meter, found.beside)
    with enough_for(checkpoint.folder):
        for fill in plan.fills:
            assembly.fill(fill, calibrator)
        if isinstance(found.stored, QuantConfig):
            check_as_stored(model, checkpoint, found.stored)
        assembly.finish()
    attach(model)
    if plan.quantized:
        model.requires_grad_(False)
        made = recorded(found.quant or QuantConfig(), calibrator)
        cast(Any, model).config.quantization_config = made.to_dict()
    cast(Any, model).stored_generation_config = checkpoint.generation_config
    trunk = cast(Any, getattr(model, "model", model))
    trunk.adapters = found.choices
    if isinstance(checkpoint, AdaptedCheckpoint):
        trunk.adapter_identities = checkpoint.identities
    trunk.kv, trunk.context = device_map.cache(needs, budget)
    return model.eval(), plan


def _total_bytes(checkpoint: Checkpoint, plan: LoadPlan) -> int:
    return sum(checkpoint.nbytes(name) for fill in plan.fills for name in (fill.parts or (fill.source,)))


def _check_memory(checkpoint: Checkpoint, plan: LoadPlan, found: Prepared[Any], device_map: DeviceMap) -> None:
    """Refuse at once what cannot fit. What is mapped does not count: its pages can be dropped."""
    needed, free, wanted = plan.held_bytes(device_map.dtype("layers.0")), system.available(), found.wanted
    needed += sum(one.nbytes for one in found.beside)
    if needs_calibration(plan):
        needed += layer_bytes(checkpoint, plan)
    if device_map.home.type != "cpu" or device_map.placement is not None or needed <= free:
        return
    advice = Sentence("load a folder made by `glm4lite quantize`, which is mapped")
    if wanted is None and not plan.quantized:
        advice = Sentence("quantize it (quant='int4'), or {advice}", advice=advice)
    elif isinstance(wanted, QuantConfig) and wanted.bits == 8:
        advice = Sentence("use quant='int4', or {advice}", advice=advice)
    raise CheckpointError(
        "{model} needs {size} of memory, {free} are free; {advice}",
        model=checkpoint.origin,
        size=readable(needed),
        free=readable(free),
        advice=advice,
    )
