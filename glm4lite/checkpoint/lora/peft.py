"""What PEFT writes: adapter_config.json with `peft_type`, adapter_model.safetensors.

Tensor names decide what is adapted, not `target_modules`. Source: PEFT 0.21, `LoraConfig`, `LoraLayer.update_layer`,
`get_pattern_key` and `get_peft_model_state_dict`.
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

FILE = "adapter_model.safetensors"

_READ = {"peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_bias"}
_OF_TRAINING = {
    *("auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "peft_version"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "bias"),
    *("lora_dropout", "fan_in_fan_out", "init_lora_weights", "megatron_config", "megatron_core", "runtime_config"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "velora_config", "qalora_group_size"),
    *("ensure_weight_tying",),
}
"""What the tensors' names say better, or what only training needs."""

_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Ways to begin a training that take a part out of the base's weights, which are then other ones."""

_PART = re.compile(
    r"(.+)\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)(?:\.default)?(?:\.(weight|bias))?"
)
_PREFIX = re.compile(r"(?:base_model\.model\.)+")
_MOST_PATTERNS, _LONGEST_PATTERN, _MOST_REPEATS = 4096, 200, 3


def read_peft(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> AdapterFile:
    """The adapter of adapter_config.json's values and the file's tensors.

    Raises:
        ConfigError: it is no LoRA, or of a kind that is not supported, which is named.
        CheckpointError: tensors contradict each other or the config, or are unknown.
    """
    scales = _Scales(folder, config)
    parts: dict[str, dict[str, StoredTensor]] = {}
    saved: dict[str, StoredTensor] = {}
    for name, tensor in tensors.items():
        short = _PREFIX.sub("", name, count=1)
        found = _PART.fullmatch(short)
        if found is None:
            saved[short.replace(".base_layer.", ".").replace(".modules_to_save.", ".")] = tensor
            continue
        parts.setdefault(found[1], {})[f"{found[2]}.bias" if found[3] == "bias" else found[2]] = tensor
    base = config.get("base_model_name_or_path")
    factors = tuple(_factors(folder, name, of, scales) for name, of in parts.items())
    return AdapterFile(folder, base if isinstance(base, str) else "", factors, saved)


def _factors(folder: Path, name: str, parts: Mapping[str, StoredTensor], scales: _Scales) -> Factors:
    embedding = "lora_embedding_A" in parts or "lora_embedding_B" in parts
    first, second = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
    if first not in parts or second not in parts:
        raise CheckpointError(f"{folder}: {some([name])} lacks its {first} or {second}; get the adapter again")
    magnitude, bias = parts.get("lora_magnitude_vector"), parts.get("lora_B.bias")
    unknown = parts.keys() - {first, second, "lora_magnitude_vector", "lora_B.bias"}
    if unknown:
        tensor = parts[min(unknown)]
        raise wrong(tensor, "is nothing that an adapter is known to hold")
    if (magnitude is not None) != scales.dora:
        tensor = magnitude or parts[first]
        raise wrong(tensor, f"does not fit {ADAPTER}, which says use_dora={scales.dora}")
    if embedding and magnitude is not None:
        raise ConfigError(f"{folder}: DoRA of an embedding ({some([name])}) is not supported")
    if magnitude is not None and bias is not None:
        raise ConfigError(f"{folder}: DoRA with lora_bias ({some([name])}) is not supported, as PEFT has no such thing")
    a, b = parts[first], parts[second]
    if embedding:  # A is [r, vocabulary] and B [hidden, r] in the file: of the table, B^T and A^T
        found = Factors(name, b, a, 0.0, True, embedding=True)
    else:
        found = Factors(name, a, b, 0.0, False, magnitude, bias)
    found.check()
    rank, scale = scales.of(name)
    if found.rank != rank:
        raise wrong(a, f"has rank {found.rank}, but {ADAPTER} says {rank}")
    return Factors(name, found.a, found.b, scale, found.transposed, magnitude, bias, embedding)


class _Scales:
    """What adapter_config.json says of ranks and scales."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        self._path = folder / ADAPTER
        kind = config.get("peft_type")
        if kind != "LORA":
            raise ConfigError(f"{self._path}: peft_type is {shown(kind)}; only LORA adapters can be used")
        for key, value in config.items():
            if key not in _READ and key not in _OF_TRAINING and value not in (None, False) and value != {}:
                raise ConfigError(f"{self._path} sets {some([str(key)])}, which is not supported")
        began = str(config.get("init_lora_weights")).lower()
        if began.startswith(_CHANGES_BASE):
            raise ConfigError(
                f"{self._path}: init_lora_weights is {shown(began)}, which changes the base's weights too; save the "
                "adapter with path_initial_model_for_weight_conversion"
            )
        self._rank, self._alpha = self._number(config, "r", 8), self._number(config, "lora_alpha", 8)
        self._ranks, self._alphas = self._patterns(config, "rank_pattern"), self._patterns(config, "alpha_pattern")
        self._root = config.get("use_rslora") is True
        self.dora = config.get("use_dora") is True

    def of(self, module: str) -> tuple[int, float]:
        """(rank, scale) of a module, by the first pattern that its name ends in."""
        rank = next((value for pattern, value in self._ranks if pattern.match(module)), self._rank)
        alpha = next((value for pattern, value in self._alphas if pattern.match(module)), self._alpha)
        return int(rank), alpha / (math.sqrt(rank) if self._root else rank)

    def _patterns(self, config: Mapping[str, Any], key: str) -> list[tuple[re.Pattern[str], float]]:
        given = config.get(key) or {}
        if not isinstance(given, Mapping) or len(given) > _MOST_PATTERNS:
            raise ConfigError(f"{self._path}: {key} must be an object of at most {_MOST_PATTERNS} patterns")
        return [(self._pattern(key, pattern), self._number(given, pattern, 0)) for pattern in given]

    def _pattern(self, key: str, pattern: str) -> re.Pattern[str]:
        """A stranger's regular expression: of a kind whose search ends soon."""
        repeats = sum(pattern.count(sign) for sign in "*+?")
        nested = any(f"){sign}" in pattern for sign in "*+?") or "{" in pattern
        if len(pattern) <= _LONGEST_PATTERN and repeats <= _MOST_REPEATS and not nested:
            try:
                return re.compile(rf"(.*\.)?({pattern})$")
            except (re.error, RecursionError, OverflowError):
                pass
        raise ConfigError(f"{self._path}: {key} has {shown(pattern)}, which is no pattern of module names")

    def _number(self, given: Mapping[str, Any], key: str, default: float) -> float:
        value = given.get(key, default)
        whole = not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value)
        if not whole or not 0 < value < 1e6:
            raise ConfigError(f"{self._path}: {some([key])} is {shown(value)}; expected a number above 0")
        return float(value)
