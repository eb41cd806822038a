"""From a checkpoint to a model, one block of rows at a time.

The skeleton is built on the meta device; each weight is read in blocks of at most 16 MiB, quantized, assigned and
dropped, so the peak is the quantized model plus a few blocks, never the checkpoint. Weights that lie quantized in the
checkpoint are mapped in place and not copied; where a budget is given, they are read into memory or streamed from disk.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, cast

from glm4lite.base.errors import CheckpointError
from glm4lite.base.sizes import readable
from glm4lite.checkpoint.calibration import layer_bytes
from glm4lite.checkpoint.checkpoint import Checkpoint
from glm4lite.checkpoint.formats.bitsandbytes import Quant, adapt
from glm4lite.checkpoint.load_plan import (
    Model,
    Plan,
    make_plan,
    say_notices,
    skeleton,
    stored_quant,
)
from glm4lite.checkpoint.streaming import (
    Meter,
    begin,
    calibration_text,
    needs_calibration,
    recorded,
)
from glm4lite.hub.sources import resolve
from glm4lite.loading.assembly import Assembly, check_as_stored
from glm4lite.loading.device_map import Destinations, choose
from glm4lite.loading.load_options import LoadOptions
from glm4lite.loading.requirements import needs_for
from glm4lite.memory import system
from glm4lite.runtime.out_of_memory import enough_for
from glm4lite.runtime.runner import attach
from glm4lite_quant import BnbConfig, QuantConfig

logger = logging.getLogger("glm4lite")


def load_class(cls: type[Model], source: str | Path, options: LoadOptions) -> tuple[Model, Plan]:
    """A model of any of the classes, and what became of the checkpoint's tensors."""
    wanted, budget = options.wanted, options.budget
    text = calibration_text(options.calibration, wanted)
    checkpoint = Checkpoint.open(resolve(source, options.progress, options.hub))
    stored = stored_quant(checkpoint, options.quant)
    quantized = stored is not None
    if isinstance(stored, BnbConfig):
        checkpoint, stored, wanted = adapt(checkpoint, stored, wanted, options.quant is not None)
    config = options.config_for(checkpoint, quantized)
    config.name_or_path = str(source)
    model = skeleton(config, cls)
    plan = make_plan(model, checkpoint, None if stored else wanted, options.ignore_mismatched_sizes)
    needs = needs_for(checkpoint, plan, config, stored or wanted)
    destinations = choose(checkpoint, plan, needs, options.target, options.activations, budget)
    _check_memory(checkpoint, plan, wanted, destinations)
    say_notices(model, checkpoint, plan)
    if plan.bitsandbytes and destinations.home.type == "cpu":
        logger.warning("on a CPU bitsandbytes unpacks a whole weight at each use: quant='int4' is several times faster")
    meter = Meter("load", _total_bytes(checkpoint, plan), options.progress)
    calibrator = begin(checkpoint, plan, config, text, meter)
    assembly = Assembly(model, checkpoint, plan, destinations, meter)
    with enough_for(checkpoint.folder):
        for fill in plan.fills:
            assembly.fill(fill, calibrator)
        if isinstance(stored, QuantConfig):
            check_as_stored(model, checkpoint, stored)
        assembly.finish()
    attach(model)
    if plan.quantized:
        model.requires_grad_(False)
        made = recorded(stored or wanted or QuantConfig(), calibrator)
        cast(Any, model).config.quantization_config = made.to_dict()
    cast(Any, model).stored_generation_config = checkpoint.generation_config
    trunk = cast(Any, getattr(model, "model", model))
    trunk.kv, trunk.context = destinations.cache(needs, budget)
    return model.eval(), plan


def _total_bytes(checkpoint: Checkpoint, plan: Plan) -> int:
    return sum(checkpoint.nbytes(name) for fill in plan.fills for name in (fill.parts or (fill.source,)))


def _check_memory(checkpoint: Checkpoint, plan: Plan, wanted: Quant | None, destinations: Destinations) -> None:
    """Refuse at once what cannot fit. What is mapped does not count: its pages can be dropped."""
    needed, free = plan.held_bytes(destinations.dtype("layers.0")), system.available()
    if needs_calibration(plan):
        needed += layer_bytes(checkpoint, plan)
    if destinations.home.type != "cpu" or destinations.placement is not None or free is None or needed <= free:
        return
    advice = "load a folder made by `glm4lite quantize`, which is mapped"
    if wanted is None and not plan.quantized:
        advice = f"quantize it (quant='int4'), or {advice}"
    elif isinstance(wanted, QuantConfig) and wanted.bits == 8:
        advice = f"use quant='int4', or {advice}"
    raise CheckpointError(
        f"{checkpoint.folder} needs {readable(needed)} of memory, {readable(free)} are free; {advice}"
    )
