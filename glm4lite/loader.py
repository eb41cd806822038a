"""From a checkpoint to a model, one block of rows at a time.

The skeleton is built on the meta device; each weight is read in blocks of at most 16 MiB, quantized, assigned and
dropped, so the peak is the quantized model plus a few blocks, never the checkpoint. Weights that lie quantized in the
checkpoint are mapped in place and not copied; where a budget is given, they are read into memory or streamed from disk.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from glm4lite.checkpoint import Checkpoint
from glm4lite.errors import CheckpointError
from glm4lite.hub import resolve
from glm4lite.load_options import LoadOptions, Size
from glm4lite.out_of_memory import enough_for
from glm4lite.runner import attach
from glm4lite.sentences import Sentence
from glm4lite.weights import memory
from glm4lite.weights.assembly import Assembly, check_as_stored
from glm4lite.weights.calibration import layer_bytes
from glm4lite.weights.destinations import Destinations, choose
from glm4lite.weights.foreign import Quant, adapt
from glm4lite.weights.needs import needs_for
from glm4lite.weights.plan import (
    Model,
    Plan,
    make_plan,
    say_notices,
    skeleton,
    stored_quant,
)
from glm4lite.weights.quantized import quantize_checkpoint
from glm4lite.weights.streaming import (
    Meter,
    ProgressCallback,
    begin,
    calibration_text,
    needs_calibration,
    recorded,
)
from glm4lite_quant import BnbConfig, QuantConfig

if TYPE_CHECKING:
    from glm4lite.model import Glm4ForCausalLM

__all__ = ["load", "load_class", "quantize_checkpoint"]

logger = logging.getLogger("glm4lite")


def load(
    source: str | Path,
    quant: str | Quant | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    progress: ProgressCallback | None = None,
    calibration: str | Path | None = None,
    *,
    gpu_memory: Size = None,
    ram: Size = None,
    context: int | str | None = None,
    kv: str = "auto",
) -> Glm4ForCausalLM:
    """Load a language model from a folder, from "nano", or from a Hub repo id. (Other classes: `from_pretrained`.)

    Args:
        source: a folder with config.json and safetensors, "nano", or "organisation/name" on the Hub.
        quant: "int4", "int8", "nf4", "fp4", "none", a QuantConfig or BnbConfig, or None for what is stored. A
            checkpoint that is quantized already is loaded as it is; another quant than its own is refused, "none" too.
            "int4" is calibrated, which runs a short text through the layers; QuantConfig(method="search") is quicker
            and less exact. "nf4" and "fp4" are bitsandbytes'. A checkpoint of its 4-bit weights is also decoded:
            to "int4", "int8" or "none" where that is asked for, to int4 where bitsandbytes is not installed.
        device: "auto" (as this machine's memory suggests), "cpu", "cuda", "cuda:1".
        dtype: of the activations (and of weights that are not quantized): "auto", "float32", "bfloat16".
        progress: called after each block with the bytes read; an exception it raises stops the load.
        gpu_memory, ram: what may be used of each GPU and of RAM, in bytes or as "8GiB" (None: what is free). Layers
            lie on the GPU, in RAM or on disk as `glm4lite plan` says; RAM is what the process holds, mapped files are
            not in it. Only layers that are stored quantized can lie on disk.
        context: tokens the budget has room for, and the longest conversation then (None: 8192, or the model's).
        kv: type of the cache of keys and values: "float" (the activations' own), "int8" (a quarter of float32), "auto"
            (int8 where a float cache would not fit or push layers to disk).
        calibration: a UTF-8 text to calibrate with, instead of the one that comes with the package.

    Returns:
        The model in eval mode. With quantized weights its norms and biases are float32 and nothing requires gradients.

    Raises:
        Glm4liteError: one line saying which file, tensor, key or argument cannot be used, and what to do.
    """
    from glm4lite.model import Glm4ForCausalLM

    budget: dict[str, Any] = {"gpu_memory": gpu_memory, "ram": ram, "context": context, "kv": kv}
    options = LoadOptions(quant, device, dtype, progress, calibration, **budget)
    return load_class(Glm4ForCausalLM, source, options)[0]


def load_class(cls: type[Model], source: str | Path, options: LoadOptions) -> tuple[Model, Plan]:
    """A model of any of the classes, as `load` says, and what became of the checkpoint's tensors."""
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
    needed, free = plan.held_bytes(destinations.dtype("layers.0")), memory.available()
    if needs_calibration(plan):
        needed += layer_bytes(checkpoint, plan)
    if destinations.home.type != "cpu" or destinations.placement is not None or free is None or needed <= free:
        return
    advice = Sentence("load a folder made by `glm4lite quantize`, which is mapped")
    if wanted is None and not plan.quantized:
        advice = Sentence("quantize it (quant='int4'), or {advice}", advice=advice)
    elif isinstance(wanted, QuantConfig) and wanted.bits == 8:
        advice = Sentence("use quant='int4', or {advice}", advice=advice)
    raise CheckpointError(
        "{model} needs {size} of memory, {free} are free; {advice}",
        model=checkpoint.folder,
        size=memory.readable(needed),
        free=memory.readable(free),
        advice=advice,
    )
