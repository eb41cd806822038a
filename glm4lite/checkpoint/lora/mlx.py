"""What mlx-lm writes: adapter_config.json with `lora_parameters`, adapters.safetensors.

Its `lora_a` is [K, r] and `lora_b` [r, N]; `scale` is taken as it is. Source: mlx-lm's tuner (`LoRALinear`,
`LoRAEmbedding`, `DoRALinear`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from glm4lite.base.errors import CheckpointError, ConfigError, shown
from glm4lite.base.files import some
from glm4lite.base.stored_tensor import StoredTensor
from glm4lite.checkpoint.folders import ADAPTER
from glm4lite.checkpoint.lora.factors import AdapterFile, Factors, wrong

FILE = "adapters.safetensors"

_PART = re.compile(r"(.+)\.(lora_a|lora_b|m)")
_KINDS = ("lora", "dora")


def read_mlx(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> AdapterFile:
    """The adapter of adapter_config.json's values and the file's tensors. Raises ConfigError, CheckpointError."""
    kind = config.get("fine_tune_type", "lora")
    if kind not in _KINDS:
        raise ConfigError(f"{folder / ADAPTER}: fine_tune_type is {shown(kind)}; only lora and dora can be used")
    given = config.get("lora_parameters")
    scale = given.get("scale", 10.0) if isinstance(given, Mapping) else None
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale):
        raise ConfigError(f"{folder / ADAPTER}: lora_parameters.scale is {shown(scale)}; expected a number")
    parts: dict[str, dict[str, StoredTensor]] = {}
    for name, tensor in tensors.items():
        found = _PART.fullmatch(name)
        if found is None:
            raise wrong(tensor, "is nothing that an adapter of mlx-lm is known to hold")
        parts.setdefault(found[1], {})[found[2]] = tensor
    base = config.get("model")
    factors = tuple(_factors(folder, name, of, float(scale), kind == "dora") for name, of in parts.items())
    return AdapterFile(folder, base if isinstance(base, str) else "", factors)


def _factors(folder: Path, name: str, parts: Mapping[str, StoredTensor], scale: float, dora: bool) -> Factors:
    if "lora_a" not in parts or "lora_b" not in parts:
        raise CheckpointError(f"{folder}: {some([name])} lacks its lora_a or lora_b; get the adapter again")
    a, b, magnitude = parts["lora_a"], parts["lora_b"], parts.get("m")
    if (magnitude is not None) != dora:
        raise wrong(magnitude or a, f"does not fit {ADAPTER}, which says fine_tune_type={'dora' if dora else 'lora'}")
    embedding = name.rpartition(".")[2] == "embed_tokens"
    if embedding and dora:
        raise ConfigError(f"{folder}: DoRA of an embedding ({some([name])}) is not supported")
    of_table = Factors(name, b, a, scale, embedding=True)  # [vocabulary, r] and [r, hidden]: B and A, as they are
    found = of_table if embedding else Factors(name, a, b, scale, True, magnitude)
    found.check()
    return found
