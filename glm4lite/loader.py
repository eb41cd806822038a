"""From a checkpoint to a model, one block of rows at a time.

The skeleton is built on the meta device; each weight is read in blocks of at most 16 MiB, quantized, assigned and
dropped, so the peak is the quantized model plus a few blocks, never the checkpoint. Weights that lie quantized in the
checkpoint are mapped in place and not copied; where a budget is given, they are read into memory or streamed from disk.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, overload

import torch
from torch import nn

from glm4lite.budget import Budget
from glm4lite.checkpoint import Checkpoint
from glm4lite.errors import CheckpointError, ConfigError
from glm4lite.graph import eager_by_choice
from glm4lite.hub import resolve
from glm4lite.out_of_memory import enough_for
from glm4lite.runner import attach
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
    parse_quant,
    read_config,
    say_notices,
    skeleton,
    stored_quant,
)
from glm4lite.weights.quantized import quantize_checkpoint, save_quantized
from glm4lite.weights.streaming import (
    Meter,
    ProgressCallback,
    begin,
    calibration_text,
    needs_calibration,
    recorded,
)
from glm4lite_quant import BnbConfig, QuantConfig, bnb
from glm4lite_quant.kernels import check_environment

if TYPE_CHECKING:
    from glm4lite.model import Glm4ForCausalLM

__all__ = ["load", "quantize_checkpoint", "save_quantized"]

logger = logging.getLogger("glm4lite")

DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
Size = int | str | None


@overload
def load(
    source: str | Path,
    quant: str | Quant | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    progress: ProgressCallback | None = None,
    cls: None = None,
    calibration: str | Path | None = None,
    *,
    gpu_memory: Size = None,
    ram: Size = None,
    context: int | str | None = None,
    kv: str = "auto",
) -> Glm4ForCausalLM: ...


@overload
def load(
    source: str | Path,
    quant: str | Quant | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    progress: ProgressCallback | None = None,
    *,
    cls: type[Model],
    calibration: str | Path | None = None,
    gpu_memory: Size = None,
    ram: Size = None,
    context: int | str | None = None,
    kv: str = "auto",
) -> Model: ...


def load(
    source: str | Path,
    quant: str | Quant | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    progress: ProgressCallback | None = None,
    cls: type[nn.Module] | None = None,
    calibration: str | Path | None = None,
    *,
    gpu_memory: Size = None,
    ram: Size = None,
    context: int | str | None = None,
    kv: str = "auto",
) -> nn.Module:
    """Load a model from a folder, from "nano", or from a Hub repo id.

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
        cls: Glm4ForCausalLM unless given.
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
    wanted, target, chosen = check_arguments(quant, device, dtype)
    budget = Budget.of(gpu_memory, ram, context, kv)
    text = calibration_text(calibration, wanted)
    checkpoint = Checkpoint.open(resolve(source, progress))
    stored = stored_quant(checkpoint, quant)
    if isinstance(stored, BnbConfig):
        checkpoint, stored, wanted = adapt(checkpoint, stored, wanted, quant is not None)
    config = read_config(checkpoint)
    model = skeleton(config, cls)
    plan = make_plan(model, checkpoint, None if stored else wanted)
    needs = needs_for(checkpoint, plan, config, stored or wanted)
    destinations = choose(checkpoint, plan, needs, target, chosen, budget)
    _check_memory(checkpoint, plan, wanted, destinations)
    say_notices(model, checkpoint, plan)
    if plan.bitsandbytes and destinations.home.type == "cpu":
        logger.warning("on a CPU bitsandbytes unpacks a whole weight at each use: quant='int4' is several times faster")
    meter = Meter("load", _total_bytes(checkpoint, plan), progress)
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
    return model.eval()


def check_arguments(
    quant: str | Quant | None, device: str | torch.device, dtype: str | torch.dtype
) -> tuple[Quant | None, torch.device | None, torch.dtype | None]:
    """What can be refused before a model is looked for or downloaded: `load`'s arguments (dtype None: "auto").

    Raises:
        ConfigError: naming the argument.
        QuantError: a GLM4LITE_ variable asks for what this machine has not, or bitsandbytes is needed.
    """
    check_environment()
    eager_by_choice()
    found = parse_quant(quant), _device(device), _dtype(dtype)
    if isinstance(found[0], BnbConfig):
        bnb.library()
    return found


def _device(device: str | torch.device) -> torch.device | None:
    """None means "auto"."""
    if device == "auto":
        return None
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        raise ConfigError(f"device {device!r} is not known; use auto, cpu, cuda or cuda:N") from None
    if found.type not in ("cpu", "cuda"):
        raise ConfigError(f"device {str(device)!r} is not supported; use auto, cpu, cuda or cuda:N")
    if found.type == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError(f"device {str(device)!r} was asked for, but torch finds no CUDA device; use device='cpu'")
        count = torch.cuda.device_count()
        if found.index is not None and found.index >= count:
            raise ConfigError(f"device {str(device)!r} was asked for, but there are {count} CUDA devices")
        return torch.device("cuda", torch.cuda.current_device() if found.index is None else found.index)
    return found


def _dtype(dtype: str | torch.dtype) -> torch.dtype | None:
    """None means "auto"."""
    if dtype == "auto":
        return None
    found = dtype if isinstance(dtype, torch.dtype) else DTYPES.get(str(dtype).removeprefix("torch."))
    if found == torch.float16:
        raise ConfigError(
            "dtype float16 is refused: GLM-4's activations reach 68000, above float16's largest number; "
            "use bfloat16 or float32"
        )
    if found not in (torch.float32, torch.bfloat16):
        raise ConfigError(f"dtype {str(dtype)!r} is not supported; use auto, float32 or bfloat16")
    return found


def _total_bytes(checkpoint: Checkpoint, plan: Plan) -> int:
    return sum(checkpoint.nbytes(name) for fill in plan.fills for name in (fill.parts or (fill.source,)))


def _check_memory(checkpoint: Checkpoint, plan: Plan, wanted: Quant | None, destinations: Destinations) -> None:
    """Refuse at once what cannot fit. What is mapped does not count: its pages can be dropped."""
    needed, free = plan.held_bytes(destinations.dtype("layers.0")), memory.available()
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
        f"{checkpoint.folder} needs {memory.readable(needed)} of memory, {memory.readable(free)} are free; {advice}"
    )
