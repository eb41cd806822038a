"""What a model asks for: by the headers of its shards, or by config.json where there are none. No weight is read."""

from __future__ import annotations

import math
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from glm4lite.base.errors import ConfigError, HubError
from glm4lite.base.files import CONFIG, INDEX, SINGLE, read_json
from glm4lite.base.stored_tensor import StoredTensor
from glm4lite.checkpoint.checkpoint import Checkpoint
from glm4lite.checkpoint.folders import other_weights
from glm4lite.checkpoint.formats.format import Quant
from glm4lite.checkpoint.formats.registry import format_of, open_source
from glm4lite.checkpoint.load_plan import Fill, LoadPlan, automatic_dtype
from glm4lite.checkpoint.lora.folder import Loras
from glm4lite.checkpoint.prepare import Prepared, model_class, prepare
from glm4lite.checkpoint.quant_choice import stored_quant
from glm4lite.checkpoint.shard import DTYPE_NAMES
from glm4lite.checkpoint.streaming import loading_bytes
from glm4lite.gguf.companions import file_in
from glm4lite.hub.options import HubOptions
from glm4lite.hub.sources import is_choice, is_url, locate, resolve
from glm4lite.memory.resources import Requirements
from glm4lite.model.config import Glm4Config
from glm4lite.model.layers import layer_of
from glm4lite_quant import QuantConfig, QuantTensor


def headers(source: str | Path) -> Checkpoint:
    """A checkpoint to be planned, not read: a folder's, an undownloaded Hub repo's, or that of a lone config.json.

    Raises:
        Glm4liteError: what `load` raises for it, before any weight is read.
    """
    found = locate(source)
    if isinstance(found, str) and is_choice(found):
        return open_source(resolve(found, options=HubOptions(local_files_only=True)))
    if isinstance(found, str) and is_url(found):
        raise HubError(f"{found} is not on this machine; pull it first, and plan with the file")
    if isinstance(found, str):
        from glm4lite.checkpoint.remote import remote_headers  # huggingface_hub takes a while to import

        return remote_headers(found)
    has_weights = any(os.path.lexists(found / name) for name in (SINGLE, INDEX))
    alone = (found / CONFIG).exists() and other_weights(found) is None and file_in(found) is None
    if has_weights or not alone:
        return open_source(found)
    return imagined(found)


def imagined(folder: Path, values: dict[str, Any] | None = None) -> Checkpoint:
    """The checkpoint that a folder's config.json (or its `values`) describes: bfloat16, or quantized as it says."""
    values = read_json(folder / CONFIG) if values is None else values
    config = Glm4Config.from_dict(values, folder / CONFIG)
    empty = Checkpoint(folder, values, {})
    quant = stored_quant(empty)
    if not isinstance(quant, QuantConfig | None):
        method = format_of(quant).method
        raise ConfigError(f"{folder} is a checkpoint of {method} without weights; plan with its original")
    with torch.device("meta"):
        model = model_class(empty)(config)
    tensors: dict[str, StoredTensor] = {}
    for name, parameter in model.named_parameters():
        for part, tensor in _stored_as(name, parameter, quant).items():
            dtype = DTYPE_NAMES[tensor.dtype]
            tensors[part] = StoredTensor(part, dtype, tuple(tensor.shape), folder / SINGLE, 0)
    return Checkpoint(folder, values, tensors)


def _stored_as(name: str, parameter: torch.Tensor, quant: QuantConfig | None) -> dict[str, torch.Tensor]:
    """Names and meta tensors of one parameter in the file."""
    module, _, leaf = name.rpartition(".")
    own = quant.for_module(module) if quant is not None and leaf == "weight" and parameter.dim() == 2 else None
    if own is None:
        return {name: parameter.to(torch.bfloat16)}
    empty = QuantTensor.empty(parameter.shape[0], parameter.shape[1], own, "meta")
    return {f"{module}.{part}": tensor for part, tensor in empty.tensors().items()}


def requirements_of(checkpoint: Checkpoint, quant: str | Quant | None = None, loras: Loras = Loras()) -> Requirements:
    """Bytes that a checkpoint asks for where it is loaded with `quant` (None: as it is stored) and these adapters.

    Raises:
        Glm4liteError: what `load` raises, before any weight is read.
    """
    return requirements_for(prepare(checkpoint, quant, model_class(checkpoint), loras=loras))


def requirements_for(prepared: Prepared[Any]) -> Requirements:
    """The same where it is prepared already."""
    checkpoint, plan, config = prepared.checkpoint, prepared.plan, prepared.config
    dtype = automatic_dtype(checkpoint, plan, torch.device("cpu"))
    sizes: dict[str, int] = defaultdict(int)
    for fill in plan.fills:
        sizes[_part(fill)] += _bytes(checkpoint, plan, fill, dtype)
    for beside in prepared.beside:
        sizes[_part(beside.fill)] += beside.nbytes
    return Requirements(
        config,
        _precision(prepared, dtype),
        tuple(sizes[str(index)] for index in range(config.num_hidden_layers)),
        sizes["embedding"],
        sizes["head"],
        sizes["rest"],
        _as_held(checkpoint, plan, dtype),
        dtype.itemsize,
        loading_bytes(checkpoint, plan),
    )


def _part(fill: Fill) -> str:
    """The number of the layer a parameter belongs to, or "embedding", "head", "rest"."""
    layer = layer_of(fill.module)
    if layer is not None:
        return str(layer[0])
    return {"embed_tokens": "embedding", "lm_head": "head"}.get(fill.module.rpartition(".")[2], "rest")


def _bytes(checkpoint: Checkpoint, plan: LoadPlan, fill: Fill, dtype: torch.dtype) -> int:
    if fill.parts:
        return sum(checkpoint.nbytes(part) for part in fill.parts)
    return plan.fill_bytes(fill, dtype)


def _as_held(checkpoint: Checkpoint, plan: LoadPlan, dtype: torch.dtype) -> bool:
    """Whether the large weights lie in the files as they are held (norms and biases do not matter)."""
    matrices = [fill for fill in plan.fills if len(fill.shape) > 1]
    return all(
        fill.parts or (not fill.quant and checkpoint.dtype(fill.source) == DTYPE_NAMES[dtype]) for fill in matrices
    )


def average_bits(checkpoint: Checkpoint, plan: LoadPlan) -> float:
    """Bits a weight of those in our format, their scales included."""
    fills = [fill for fill in plan.fills if isinstance(fill.quant, QuantConfig) or (fill.parts and not fill.foreign)]
    nbytes = sum(_bytes(checkpoint, plan, fill, torch.float32) for fill in fills)
    return 8 * nbytes / max(1, sum(math.prod(fill.shape) for fill in fills))


def _precision(prepared: Prepared[Any], dtype: torch.dtype) -> str:
    quant = prepared.quant
    if isinstance(quant, QuantConfig) and quant.mixed:
        return f"{average_bits(prepared.checkpoint, prepared.plan):.2f} bits"
    if not isinstance(quant, QuantConfig | None):
        return quant.kind
    return f"int{quant.bits}" if quant else str(dtype).removeprefix("torch.")
