"""`load`: a language model from a folder, from "nano" or from the Hub, with a budget."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from glm4lite.checkpoint.codec_choice import Aim
from glm4lite.checkpoint.formats.format import Quant
from glm4lite.checkpoint.lora.folder import Loras
from glm4lite.checkpoint.streaming import ProgressCallback
from glm4lite.loading.load_options import LoadOptions
from glm4lite.loading.loader import load_class
from glm4lite.memory.budget import Budget, Size
from glm4lite.pretrained.models import Glm4ForCausalLM


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
    lora: str | Path | Sequence[str | Path] | None = None,
    bits: float | str | None = None,
    fit: Size = None,
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
        lora: the folder or Hub repo id of an adapter that PEFT or mlx-lm wrote, or several, each with "=0.5" behind it
            where that much of it is wanted. They are merged into weights before these are quantized; beside weights
            that are stored quantized they are computed in float32.

    Returns:
        The model in eval mode. With quantized weights its norms and biases are float32 and nothing requires gradients.

    Raises:
        Glm4liteError: one line saying which file, tensor, key or argument cannot be used, and what to do.
    """
    budget, loras = Budget.of(gpu_memory, ram, context, kv), Loras.of(lora)
    aim = Aim.of(bits, fit, budget, loads=True)
    options = LoadOptions(quant, device, dtype, progress, calibration, budget, loras=loras, aim=aim)
    return load_class(Glm4ForCausalLM, source, options)[0]
