"""AutoRound's own checkpoints: GPTQ's or AWQ's layout, by `packing_format`. Source: auto-round 0.16 (export)."""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from glm4lite.checkpoint.checkpoint import Checkpoint
from glm4lite.checkpoint.formats.awq import awq_gemm
from glm4lite.checkpoint.formats.gptq import AS_THEY_ARE, BITS, ONE_LESS, gptq_weights
from glm4lite.checkpoint.formats.imported import ImportedFormat, group_size, one_of
from glm4lite.checkpoint.formats.weight import PackedWeight
from glm4lite_quant import QuantError

_AWQ = "awq"
_LAYOUTS = {
    "auto_round:auto_gptq": ONE_LESS,
    "auto_round": AS_THEY_ARE,
    "auto_round:auto_awq": _AWQ,
}


@dataclass(frozen=True)
class Settings:
    """layout: as GPTQ's reader takes it, or "awq". group: for the latter, which does not show it."""

    layout: Any
    group: int | None


class AutoRound(ImportedFormat):
    """quant_method "auto-round", or "intel/auto-round" as older versions write it."""

    method = "auto-round"

    def declared(self, config: Mapping[str, Any]) -> Mapping[str, Any] | None:
        given = config.get("quantization_config")
        known = isinstance(given, Mapping) and given.get("quant_method") in (self.method, f"intel/{self.method}")
        return given if known else None

    def settings(self, given: Mapping[str, Any]) -> Settings:
        one_of(given, "bits", BITS)
        if given.get("data_type", "int") not in ("int", "int_sym", "int_asym", "int_asym_dq"):
            raise QuantError(
                f"quantization_config.data_type is {reprlib.repr(given['data_type'])}; only whole numbers can be read"
            )
        packing = given.get("packing_format", given.get("backend", "auto_round:auto_gptq"))
        text = packing if isinstance(packing, str) else ""
        kernel = text.removeprefix("auto_round").removeprefix(":")
        if kernel in ("gptqmodel", "exllamav2", "tritonv2", "torch", ""):
            text = "auto_round"
        layout = _LAYOUTS.get(text if text else "?")
        if layout is None:
            raise QuantError(
                f"quantization_config.packing_format is {reprlib.repr(packing)}; known: {', '.join(_LAYOUTS)}"
            )
        return Settings(layout, group_size(given))

    def weights(self, checkpoint: Checkpoint, settings: Settings) -> Iterator[tuple[str, PackedWeight]]:
        if settings.layout is not _AWQ:
            yield from gptq_weights(checkpoint, settings.layout)
            return
        for name in checkpoint.names():
            module = name.removesuffix(".qweight")
            if module != name:
                yield f"{module}.weight", awq_gemm(checkpoint, module, settings.group)
