"""What goes where: every parameter of a model matched with the tensors of a checkpoint before any of them is read.

All that can be wrong with names, shapes and types is said here, so a load that begins can end.
"""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import nn

from glm4lite.base.errors import CheckpointError, ConfigError
from glm4lite.base.files import CONFIG, INDEX, some
from glm4lite.checkpoint.checkpoint import Checkpoint
from glm4lite.checkpoint.folders import ADAPTER
from glm4lite.checkpoint.formats.format import ForeignWeight, Quant
from glm4lite.checkpoint.formats.registry import foreign_weight
from glm4lite.checkpoint.quant_choice import column_multiple, empty_weight
from glm4lite.model.config import Glm4Config
from glm4lite.model.layers import layer_of
from glm4lite_quant import QuantConfig, QuantError, QuantTensor
from glm4lite_quant.format import NAMES

Model = TypeVar("Model", bound=nn.Module)

logger = logging.getLogger("glm4lite")

FLOAT_TYPES = ("BF16", "F32", "F16")
_OTHER_PARTS = re.compile(
    r"(?:(?:model|transformer)\.)?(?:visual|vision|vision_\w+|audio_\w+|multi_modal_projector|mtp\w*)\..*"
)
"""Names of the tensors that see, hear or predict several tokens, as models with such parts call them."""


@dataclass(frozen=True)
class Fill:
    """One parameter of the model and how it gets its values.

    `quant` set: the weight is quantized while it is read. `parts` not empty: it lies quantized in the checkpoint, under
    these tensor names (`foreign`: as another tool stores it). Neither: it is read as it is.
    """

    module: str
    parameter: str
    source: str
    shape: tuple[int, ...]
    quant: Quant | None = None
    parts: tuple[str, ...] = ()
    foreign: ForeignWeight | None = None


@dataclass
class LoadPlan:
    """All fills in the model's order; `fresh` parameters are in no file and start from their initial values.

    `mismatched` are those whose stored shape is another: (name, the file's, the model's); they are fresh too.
    `kept` are the layers that were to be quantized, but whose width no code tile fits; `other_parts` are tensors of
    what is no part of the language model.
    """

    fills: list[Fill] = field(default_factory=list)
    fresh: list[tuple[str, str]] = field(default_factory=list)
    mismatched: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    other_parts: list[str] = field(default_factory=list)
    tied: bool = False

    @property
    def loading_info(self) -> dict[str, Any]:
        """What became of the names of model and checkpoint, as Transformers' `output_loading_info` tells it."""
        mismatched = {name for name, _, _ in self.mismatched}
        fresh = {f"{module}.{parameter}" for module, parameter in self.fresh}
        return {
            "missing_keys": fresh - mismatched,
            "unexpected_keys": {*self.unused, *self.other_parts},
            "mismatched_keys": set(self.mismatched),
            "error_msgs": [],
        }

    @property
    def quantized(self) -> bool:
        return any(fill.quant or fill.parts for fill in self.fills)

    @property
    def foreign(self) -> bool:
        """Whether some of the weights are held in another tool's format."""
        return any(fill.foreign or not isinstance(fill.quant, QuantConfig | None) for fill in self.fills)

    def plain_dtype(self, module: str, dimensions: int, activations: torch.dtype) -> torch.dtype:
        """What an unquantized parameter is held as: norms, and biases of quantized layers, stay exact."""
        exact = self.quantized and dimensions == 1 and module not in self._plain_matrices
        return torch.float32 if exact else activations

    @cached_property
    def _plain_matrices(self) -> frozenset[str]:
        """The modules whose matrix is not quantized; torch wants their bias in its type."""
        fresh = {module for module, parameter in self.fresh if parameter == "weight" and "norm" not in module}
        plain = {fill.module for fill in self.fills if len(fill.shape) == 2 and not fill.quant and not fill.parts}
        return frozenset(plain | fresh)

    def held_bytes(self, activations: torch.dtype) -> int:
        """Bytes of memory the filled parameters take. What is quantized in the file already is mapped and not held."""
        return sum(self.fill_bytes(fill, activations) for fill in self.fills if not fill.parts)

    def fill_bytes(self, fill: Fill, activations: torch.dtype) -> int:
        """Bytes of one filled parameter that does not lie quantized in the file."""
        if fill.quant:
            return empty_weight(fill.shape, fill.quant).nbytes
        return math.prod(fill.shape) * self.plain_dtype(fill.module, len(fill.shape), activations).itemsize


def read_config(checkpoint: Checkpoint) -> Glm4Config:
    return Glm4Config.from_dict(checkpoint.config, checkpoint.folder / CONFIG)


def skeleton(config: Glm4Config, cls: type[Model]) -> Model:
    """The model without weights, on the meta device."""
    with torch.device("meta"):
        return cls(config)


def automatic_dtype(checkpoint: Checkpoint, plan: LoadPlan, device: torch.device) -> torch.dtype:
    """The type of activations and unquantized weights where none is asked for."""
    if plan.quantized and device.type != "cpu":
        return torch.bfloat16
    if plan.quantized and not plan.foreign:
        return torch.float32
    embedding = next((fill for fill in plan.fills if fill.module.endswith("embed_tokens")), plan.fills[0])
    if embedding.parts:  # int8 beside another tool's layers, of which each says what it was
        said = next((fill.foreign.dtype for fill in plan.fills if fill.foreign), "bfloat16")
        return torch.bfloat16 if said == "bfloat16" else torch.float32
    return torch.bfloat16 if checkpoint.dtype(embedding.source) == "BF16" else torch.float32


def make_load_plan(
    model: nn.Module, checkpoint: Checkpoint, quant: Quant | None, ignore_mismatched_sizes: bool = False
) -> LoadPlan:
    """Match a model (on the meta device) with a checkpoint; each thing that does not fit is named.

    ignore_mismatched_sizes: parameters that are stored in another shape are `mismatched` and `fresh` instead.

    Raises:
        CheckpointError: tensors are missing, not expected, or of the wrong shape or type.
        ConfigError: a layer's width is not a multiple of the group size.
    """
    plan = LoadPlan()
    missing: list[tuple[str, str]] = []
    plan.tied = bool(getattr(model.config, "tie_word_embeddings", False)) and hasattr(model, "lm_head")
    prefix = "" if hasattr(model, "model") else "model."  # the bare trunk's parameters lie under model. in the file
    for module, parameter, shape in _parameters(model):
        if plan.tied and module == "lm_head":
            continue
        source = f"{prefix}{module}.{parameter}"
        weight = foreign_weight(checkpoint, source)
        parts = weight.parts if weight else _stored_parts(checkpoint, f"{prefix}{module}", parameter)
        if not parts and source not in checkpoint:
            new = not prefix and module.partition(".")[0] not in ("model", "lm_head")  # a head for another task
            (plan.fresh if new else missing).append((module, parameter))
            continue
        config = None if parts else _quant_for(model, module, parameter, shape, quant, plan.kept)
        config = checkpoint.quant_for(source, config) if isinstance(config, QuantConfig) else config
        plan.fills.append(Fill(module, parameter, source, shape, config, parts, weight))
    if missing:
        raise CheckpointError(_missing(checkpoint, [f"{prefix}{module}.{parameter}" for module, parameter in missing]))
    _check_unexpected(model, checkpoint, plan)
    if ignore_mismatched_sizes:
        _set_aside_mismatched(checkpoint, plan)
    for fill in plan.fills:
        _check_fill(checkpoint, fill)
    return plan


def _set_aside_mismatched(checkpoint: Checkpoint, plan: LoadPlan) -> None:
    fitting = []
    for fill in plan.fills:
        found = _stored_shape(checkpoint, fill)
        if found == fill.shape:
            fitting.append(fill)
        else:
            plan.mismatched.append((f"{fill.module}.{fill.parameter}", found, fill.shape))
            plan.fresh.append((fill.module, fill.parameter))
    if not fitting:
        raise CheckpointError(f"no tensor of {checkpoint.folder} has the shape that the config says; check the config")
    plan.fills = fitting


def _parameters(model: nn.Module) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """(module, parameter, shape), tied ones under each of their names."""
    for name, value in model.named_parameters(remove_duplicate=False):
        module, _, parameter = name.rpartition(".")
        yield module, parameter, tuple(value.shape)


def _stored_parts(checkpoint: Checkpoint, module: str, parameter: str) -> tuple[str, ...]:
    if parameter != "weight":
        return ()
    parts = tuple(f"{module}.{part}" for part in NAMES if f"{module}.{part}" in checkpoint)
    return parts if f"{module}.qweight" in parts else ()


def _quant_for(
    model: nn.Module, module: str, parameter: str, shape: tuple[int, ...], quant: Quant | None, kept: list[str]
) -> Quant | None:
    """The config this parameter is quantized with; `kept` collects the layers whose width no tile or block fits."""
    layer = model.get_submodule(module)
    if quant is None or parameter != "weight" or not isinstance(layer, nn.Linear | nn.Embedding):
        return None
    config, width = quant.for_module(module), shape[1]
    if config is None:
        return None
    if width % column_multiple(config):
        kept.append(module)
        return None
    if isinstance(config, QuantConfig) and width % config.group_size:
        fitting = max(size for size in (32, 64, 128) if width % size == 0)
        raise ConfigError(
            f"{module} has {width} input columns, not a multiple of the group size {config.group_size}; "
            f"quantize with group size {fitting}"
        )
    return config


def _missing(checkpoint: Checkpoint, names: list[str]) -> str:
    listed = [name for name in names if name in checkpoint.absent]
    if listed:
        index, file = checkpoint.folder / INDEX, checkpoint.absent[listed[0]]
        return f"{index} puts {some(listed)} in {some([file])}, which lacks it; download both again"
    what = "which config.json's model needs; download it again or correct config.json"
    return f"{checkpoint.folder} lacks {some(names)}, {what}"


def _check_unexpected(model: nn.Module, checkpoint: Checkpoint, plan: LoadPlan) -> None:
    used = {name for fill in plan.fills for name in (fill.parts or (fill.source,))}
    extra = [name for name in checkpoint.names() if name not in used]
    plan.unused = [name for name in extra if _is_of_another_head(model, name, plan.tied)]
    extra = [name for name in extra if name not in plan.unused]
    plan.other_parts = [name for name in extra if _OTHER_PARTS.fullmatch(name) or _predicts_ahead(model, name)]
    extra = [name for name in extra if name not in set(plan.other_parts)]
    if extra:
        raise CheckpointError(
            f"{checkpoint.folder} holds {some(extra)} (in {checkpoint.file(extra[0]).name}), which config.json's model "
            "does not have; correct config.json (model_type, attention_bias, num_hidden_layers) or use the right class"
        )


def _is_of_another_head(model: nn.Module, name: str, tied: bool) -> bool:
    head = name.partition(".")[0]
    return head in ("lm_head", "score") and (not hasattr(model, head) or (tied and head == "lm_head"))


def _predicts_ahead(model: nn.Module, name: str) -> bool:
    """Whether a tensor is of the layers behind the model's own that config.json counts as predicting several tokens."""
    config: Any = model.config
    layer, count = layer_of(name), (config.model_extra or {}).get("num_nextn_predict_layers")
    first = config.num_hidden_layers
    return layer is not None and isinstance(count, int) and first <= layer[0] < first + count


def _stored_shape(checkpoint: Checkpoint, fill: Fill) -> tuple[int, ...]:
    """Of the weight that the file's tensors make; CheckpointError where they contradict each other."""
    if fill.foreign is not None:
        return fill.foreign.shape
    if not fill.parts:
        return checkpoint.shape(fill.source)
    try:
        planes = {part.rpartition(".")[2]: checkpoint.outline(part) for part in fill.parts}
        return QuantTensor.from_tensors(planes).shape
    except QuantError as error:
        where = f"{fill.source} in {checkpoint.file(fill.parts[0])}"
        raise CheckpointError(f"{where}: {error}; download it or quantize the original again") from None


def _check_fill(checkpoint: Checkpoint, fill: Fill) -> None:
    stored = fill.parts[0] if fill.parts else fill.source
    where, found = f"{fill.source} in {checkpoint.file(stored)}", _stored_shape(checkpoint, fill)
    if found != fill.shape:
        again = "quantize the original again" if fill.parts and fill.foreign is None else "download it again"
        what = f"config.json needs {list(fill.shape)}; correct config.json or {again}"
        if fill.module == "score":
            what = (
                f"num_labels={fill.shape[0]} needs {list(fill.shape)}; load with num_labels={found[0]}, or with "
                "ignore_mismatched_sizes=True for a new head"
            )
        raise CheckpointError(f"{where} has shape {list(found)}, {what}")
    dtype = "F32" if fill.parts else checkpoint.dtype(fill.source)
    if dtype not in FLOAT_TYPES:
        raise CheckpointError(f"{where} has the type {dtype}, which cannot be loaded; use a BF16 or F32 checkpoint")


def say_notices(model: nn.Module, checkpoint: Checkpoint, plan: LoadPlan, exports: bool = False) -> None:
    """What is not wrong, but the user should know. `exports`: what becomes of codes is said where it is known."""
    if plan.unused:
        why = "the config ties the head to the embedding" if plan.tied else f"{type(model).__name__} has no such head"
        logger.warning("%s is not used: %s", some(plan.unused), why)
    if plan.other_parts:
        logger.warning("%s is not used: only the language model is run", some(plan.other_parts))
    if os.path.lexists(checkpoint.folder / ADAPTER):
        folder = checkpoint.folder
        if not checkpoint.adapted_by(folder):
            logger.warning("%s is not used: give the adapter as --lora %s", folder / ADAPTER, folder)
    outcome = checkpoint.outcome({fill.source: fill.quant for fill in plan.fills})
    if outcome is not None and not exports:
        logger.warning(outcome)
    if plan.kept:
        narrow = max(column_multiple(fill.quant) for fill in plan.fills if fill.quant)
        why = f"their input width is not a multiple of {narrow}"
        logger.warning("not quantized, because %s: %s", why, some(plan.kept))
    if plan.fresh:
        mismatched = [name for name, _, _ in plan.mismatched]
        fresh = (f"{module}.{parameter}" for module, parameter in plan.fresh)
        missing = [name for name in fresh if name not in mismatched]
        again = "starts from random values: train it before use"
        if missing:
            logger.warning("%s is not in the checkpoint and %s", some(missing), again)
        if mismatched:
            logger.warning("%s has another shape in the checkpoint and %s", some(mismatched), again)
    if any(not fill.parts and checkpoint.dtype(fill.source) == "F16" for fill in plan.fills):
        why = "GLM-4 overflows float16"
        logger.warning("%s stores float16: read as float32, because %s", checkpoint.folder, why)
