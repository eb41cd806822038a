"""What a checkpoint's weights are quantized to, and what they are to become: the words and config.json's."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any

from glm4lite.base.errors import ConfigError
from glm4lite.base.files import CONFIG
from glm4lite.checkpoint.checkpoint import Checkpoint
from glm4lite.checkpoint.formats.format import Quant, Stored
from glm4lite.checkpoint.formats.registry import FORMATS, declared_format
from glm4lite_quant import BnbConfig, BnbTensor, QuantConfig, QuantError, QuantTensor, bnb
from glm4lite_quant.config import QUANT_METHOD
from glm4lite_quant.format import COLS

AUTO = "auto"
"""The `quant` of front ends: int4, unless the checkpoint is quantized, which then stays as it is."""


def parse_quant(quant: str | Quant | None) -> Quant | None:
    """What `quant` stands for: "int4", "int8", "nf4", "fp4", "none", None or a config; ConfigError on anything else."""
    if isinstance(quant, BnbConfig):
        return quant
    if isinstance(quant, str) and quant in bnb.QUANT_MAPS:
        return BnbConfig(quant)
    if quant == "llm.int8":
        raise ConfigError(bnb.INT8_REASON)
    try:
        return QuantConfig.parse(quant)
    except QuantError:
        raise ConfigError(f"quant is {quant!r}; use int4, int8, nf4, fp4 or none") from None


def chosen(checkpoint: Checkpoint, quant: str | Quant | None) -> str | Quant | None:
    """`quant`, with what "auto" means for this checkpoint."""
    if quant != AUTO:
        return quant
    plain = checkpoint.config.get("quantization_config") is None and declared_format(checkpoint.config) is None
    return "int4" if plain else None


def stored_quant(checkpoint: Checkpoint, asked: str | Quant | None = None) -> Stored | None:
    """How the checkpoint is quantized by its config.json (None: it is not).

    Raises:
        ConfigError: a tool that is not known quantized it, config.json does not say how, or it is quantized otherwise
            than asked: "none" asks for an unquantized one, None for nothing. (Of another tool's anything may be asked.)
    """
    given, path = checkpoint.config.get("quantization_config"), checkpoint.folder / CONFIG
    if given is None and declared_format(checkpoint.config) is None:
        codes = [name for name in checkpoint.names() if name.endswith((".qweight", ".absmax"))]
        if codes:
            raise ConfigError(
                f"{path} has no quantization_config, but {codes[0]} is stored; "
                "get back the config.json that belongs to the weights"
            )
        return None
    try:
        stored = _declared(checkpoint.config)
    except QuantError as error:
        raise ConfigError(f"{path}: {error}; use the model's BF16 checkpoint") from None
    if not isinstance(stored, QuantConfig):
        return stored
    wanted = parse_quant(asked)
    same = isinstance(wanted, QuantConfig) and (
        wanted.bits == stored.bits and not stored.mixed if isinstance(asked, str) else wanted.same_format(stored)
    )
    if asked is None or same:
        return stored
    how = "a number of bits for each weight" if stored.mixed else f"int{stored.bits} in groups of {stored.group_size}"
    raise ConfigError(
        f"{path} is quantized to {how} already; load it without quant, "
        f"or {'quantize' if wanted else 'load'} the original checkpoint"
    )


def _declared(config: Mapping[str, Any]) -> Stored:
    foreign = declared_format(config)
    if foreign is not None:
        return foreign[0].config(foreign[1])
    given: Any = config.get("quantization_config")
    method = given.get("quant_method") if isinstance(given, Mapping) else None
    if isinstance(method, str) and method != QUANT_METHOD:
        known = ", ".join(repr(one) for one in (QUANT_METHOD, *(known.method for known in FORMATS)))
        raise QuantError(f"quantization_config.quant_method is {reprlib.repr(method)}; known: {known}")
    return QuantConfig.from_dict(given)


def empty_weight(shape: tuple[int, ...], quant: Quant) -> QuantTensor | BnbTensor:
    """A quantized weight [rows, columns] on the meta device: its tensors' shapes and types."""
    rows, columns = shape
    if isinstance(quant, BnbConfig):
        return BnbTensor.empty(rows, columns, quant, "meta")
    return QuantTensor.empty(rows, columns, quant, "meta")


def column_multiple(quant: Quant) -> int:
    """What a weight's width must be a multiple of; another stays as it is."""
    return bnb.BLOCK_SIZE if isinstance(quant, BnbConfig) else COLS
