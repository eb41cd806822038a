"""What Transformers' `quantization_config` asks for, as one of ours: an object, its dict, or the older load_in_4bit.

An object is known by its `to_dict`, so that neither Transformers nor bitsandbytes is imported for it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch

from glm4lite.base.errors import ConfigError, shown, unknown_name
from glm4lite.checkpoint.formats.format import Quant
from glm4lite_quant import BnbConfig, QuantConfig, QuantError, bnb
from glm4lite_quant.config import EXCEPTIONS, QUANT_METHOD

logger = logging.getLogger("glm4lite")

BNB_DEFAULTS: Mapping[str, Any] = {
    "load_in_4bit": False,
    "load_in_8bit": False,
    "bnb_4bit_quant_type": "fp4",
    "bnb_4bit_use_double_quant": False,
    "bnb_4bit_compute_dtype": "float32",
    "bnb_4bit_quant_storage": "uint8",
    "llm_int8_threshold": 6.0,
    "llm_int8_skip_modules": None,
    "llm_int8_enable_fp32_cpu_offload": False,
    "llm_int8_has_fp16_weight": False,
}
"""The settings of Transformers' BitsAndBytesConfig, and what they are where it is not told."""

_REMARKS = ("quant_method", "modules_to_not_convert", "_load_in_4bit", "_load_in_8bit", "transformers_version")
"""What its dict holds beside them: repetitions and metadata."""


def requested(config: Any) -> tuple[Quant, torch.dtype | None]:
    """What to quantize to, and the type to compute in (None: not said).

    Raises:
        ConfigError: naming the setting that glm4lite does not have, and why.
    """
    if isinstance(config, QuantConfig | BnbConfig):
        return config, None
    values = config.to_dict() if hasattr(config, "to_dict") else config
    if not isinstance(values, Mapping):
        raise ConfigError(
            f"quantization_config is {shown(config)}; give a BitsAndBytesConfig, its dict, a QuantConfig or a BnbConfig"
        )
    method = values.get("quant_method", bnb.QUANT_METHOD)
    method = getattr(method, "value", method)
    if method == QUANT_METHOD:
        try:
            return QuantConfig.from_dict(values), None
        except QuantError as error:
            raise ConfigError(str(error)) from None
    if method != bnb.QUANT_METHOD:
        raise ConfigError(
            f"quantization_config asks for {shown(method)}; glm4lite quantizes with bitsandbytes (4 bits) or by itself "
            "(quant='int4', 'int8')"
        )
    return bitsandbytes({name: value for name, value in values.items() if name not in _REMARKS})


def bitsandbytes(given: Mapping[str, Any]) -> tuple[Quant, torch.dtype | None]:
    """The settings of a BitsAndBytesConfig as ours. Raises ConfigError."""
    for name in given:
        if name not in BNB_DEFAULTS:
            raise ConfigError(unknown_name("quantization_config", name, BNB_DEFAULTS))
    values = {**BNB_DEFAULTS, **{name: value for name, value in given.items() if value is not None}}
    switches = [name for name, default in BNB_DEFAULTS.items() if isinstance(default, bool)]
    for name in switches:
        if not isinstance(values[name], bool):
            raise ConfigError(f"{name} is {shown(values[name])}; use True or False")
    if values["load_in_4bit"] and values["load_in_8bit"]:
        raise ConfigError("load_in_4bit and load_in_8bit contradict each other; leave one out")
    if values["load_in_8bit"]:
        return _eight_bits(values), None
    if not values["load_in_4bit"]:
        raise ConfigError("quantization_config sets neither load_in_4bit nor load_in_8bit; set one, or leave it out")
    return _four_bits(values)


def _four_bits(values: Mapping[str, Any]) -> tuple[Quant, torch.dtype]:
    storage = _type_name(values["bnb_4bit_quant_storage"])
    if storage != "uint8":
        raise ConfigError(f"bnb_4bit_quant_storage is {storage!r}; 4-bit weights are held as uint8, leave it out")
    compute = _type_name(values["bnb_4bit_compute_dtype"])
    if compute == "float16":
        raise ConfigError(
            "bnb_4bit_compute_dtype float16 is refused: GLM-4's activations reach 68000, above float16's largest "
            "number; use bfloat16"
        )
    if compute not in ("float32", "bfloat16"):
        raise ConfigError(f"bnb_4bit_compute_dtype is {compute!r}; use bfloat16 or float32")
    if kept := [name for name in values["llm_int8_skip_modules"] or () if name != "score"]:
        raise ConfigError(
            f"llm_int8_skip_modules names {shown(kept[0])}: in 4 bits glm4lite leaves the norms and the classification "
            "head as they are, and makes the embedding and the language-model head int8; leave it out"
        )
    try:
        quant = BnbConfig(values["bnb_4bit_quant_type"], values["bnb_4bit_use_double_quant"])
    except QuantError:
        kind = values["bnb_4bit_quant_type"]
        raise ConfigError(f"bnb_4bit_quant_type is {shown(kind)}; use nf4 or fp4") from None
    logger.warning("%s: embedding and head become int8, which Transformers leaves as they are", quant.kind)
    return quant, torch.float32 if compute == "float32" else torch.bfloat16


def _eight_bits(values: Mapping[str, Any]) -> Quant:
    if values["llm_int8_has_fp16_weight"]:
        raise ConfigError("llm_int8_has_fp16_weight is refused: GLM-4 overflows float16; leave it out")
    skipped = [str(name).rpartition(".")[2] for name in values["llm_int8_skip_modules"] or ()]
    logger.warning(
        "load_in_8bit: %s become glm4lite's own int8, not LLM.int8, which computes in float16; its threshold and its "
        "CPU offload have no meaning there",
        f"all weights but {', '.join(skipped)}" if skipped else "all weights, embedding and head too,",
    )
    others = [(pattern, bits) for pattern, bits in EXCEPTIONS if pattern not in skipped]
    return QuantConfig(bits=8, exceptions=(*((name, None) for name in skipped), *others))


def _type_name(value: Any) -> str:
    return str(value).removeprefix("torch.")
