"""Where the modules of an adapter's names are in the model: older, split and fused names are mapped, rows cut."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from glm4lite.base.errors import CheckpointError
from glm4lite.base.files import some
from glm4lite.checkpoint import legacy
from glm4lite.model.config import Glm4Config

_IN_LAYER = re.compile(r"(?:.*\.)?layers\.([0-9]{1,9})\.(?:self_attn|self_attention|mlp)\.(\w+)")
_RENAMED = {"dense": "self_attn.o_proj", "dense_h_to_4h": "mlp.gate_up_proj", "dense_4h_to_h": "mlp.down_proj"}
_QKV = ("query_key_value", "qkv_proj")
_HALVES = {"gate_proj": 0, "up_proj": 1}

Place = tuple[str, int, int, int]
"""(module of the model, first of the adapter's rows, how many, the module's row that the first one is)."""


def places(name: str, rows: int, config: Glm4Config, file: Path) -> Iterator[Place]:
    """Which rows of which modules an adapter's module is; `name` as in its file, without PEFT's prefix.

    Raises:
        CheckpointError: it is a part of another shape than config.json's model has.
    """
    found = _IN_LAYER.fullmatch(name)
    layer, leaf = ("", "") if found is None else (f"model.layers.{found[1]}", found[2])
    if leaf in _QKV:
        whole = f"transformer.encoder.{layer.removeprefix('model.')}.self_attention.query_key_value.weight"
        for new, first, count in legacy.places(whole, rows, config, file):
            yield new.removesuffix(".weight"), first, count, 0
    elif leaf in _HALVES:
        if rows != config.intermediate_size:
            raise CheckpointError(
                f"{some([name])} in {file} has {rows} rows, the model's {leaf} {config.intermediate_size}: the adapter "
                "is for another model"
            )
        yield f"{layer}.mlp.gate_up_proj", 0, rows, _HALVES[leaf] * rows
    elif leaf in _RENAMED:
        yield f"{layer}.{_RENAMED[leaf]}", 0, rows, 0
    else:
        yield module_name(name), 0, rows, 0


def is_half(name: str) -> bool:
    """Whether a module is one of the two that gate_up_proj is here."""
    return name.rpartition(".")[2] in _HALVES


def module_name(name: str) -> str:
    """What a module or tensor that is not cut is called here."""
    for pattern, new in legacy.RENAMES:
        for ending in ("", ".weight"):
            match = re.fullmatch(pattern, name + ending)
            if match is not None:
                return match.expand(new).removesuffix(ending)
    return f"model.{name}" if name.partition(".")[0] in ("layers", "embed_tokens", "norm") else name
