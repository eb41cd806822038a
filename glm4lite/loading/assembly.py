"""Putting weights into the skeleton of a model: each tensor read, moved and assigned as its destination wants it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from glm4lite.base.errors import CheckpointError
from glm4lite.base.stored_tensor import StoredTensor
from glm4lite.checkpoint.calibration import Calibrator
from glm4lite.checkpoint.checkpoint import Checkpoint
from glm4lite.checkpoint.load_plan import Fill, LoadPlan
from glm4lite.checkpoint.lora.adapted import Beside
from glm4lite.checkpoint.streaming import Meter, finite_blocks, quantize_weight
from glm4lite.loading.device_map import DeviceMap
from glm4lite.model.layers import layer_of
from glm4lite.model.lora import attach
from glm4lite.runtime.disk_offload import offload_to_disk
from glm4lite.runtime.gpu_prefetch import prefetch_long_prompts
from glm4lite_quant import (
    BnbLinear,
    BnbTensor,
    QuantConfig,
    QuantEmbedding,
    QuantError,
    QuantLinear,
    QuantTensor,
)
from glm4lite_quant.config import activation_splits


@dataclass
class Assembly:
    """A model being filled from a checkpoint, one parameter after the other."""

    model: nn.Module
    checkpoint: Checkpoint
    plan: LoadPlan
    destinations: DeviceMap
    meter: Meter
    beside: Sequence[Beside] = ()
    _streamed: dict[int, dict[str, dict[str, StoredTensor]]] = field(default_factory=lambda: defaultdict(dict))

    def fill(self, fill: Fill, calibrator: Calibrator | None) -> None:
        """Give one parameter its values."""
        device = self.destinations.device(fill.module)
        if fill.quant is not None:
            self._replace(fill, quantize_weight(self.checkpoint, fill, fill.quant, self.meter, calibrator, device))
        elif fill.foreign is not None:
            self._replace(fill, fill.foreign.read(self.checkpoint))
            self._count(fill)
        elif fill.parts:
            self._take_stored(fill)
            self._count(fill)
        else:
            values = self._read_plain(fill, device)
            _assign(self.model.get_submodule(fill.module), fill.parameter, values)

    def finish(self) -> None:
        """What is left when every parameter of the files has its values.

        Raises:
            CheckpointError: a parameter got none, or a file cannot be read layer by layer.
        """
        self._initialise()
        if self.plan.tied:
            self._tie()
        left = [
            name
            for name, value in self.model.state_dict().items()
            if value.is_meta and not self.destinations.on_disk(name)
        ]
        if left:
            raise CheckpointError(f"{left[0]} got no values; this is a defect of glm4lite, please report it")
        for beside in self.beside:
            self._attach(beside)
        layers = cast(Any, getattr(self.model, "model", self.model)).layers
        if self.destinations.placement is not None or self.destinations.home.type != "cpu":
            for number, layer in enumerate(layers):
                layer.dtype = self.destinations.dtype(f"layers.{number}")
        if self._streamed:
            offload_to_disk({number: layers[number] for number in self._streamed}, self._streamed)
        bus = self.destinations.bus
        if bus is not None:
            prefetch_long_prompts([layers[number] for number in bus.layers], bus.device, bus.dtype, bus.threshold)

    def _attach(self, beside: Beside) -> None:
        """The low-rank path of one weight, on the device where that is computed with."""
        fill, device = beside.fill, self.destinations.device(beside.fill.module)
        module = cast(Any, self.model.get_submodule(fill.module))
        bias = getattr(module, "bias", None)

        def weight(start: int, stop: int) -> Tensor:
            if fill.parts and fill.foreign is None:  # it may lie on disk
                return _mapped_weight(self.checkpoint, fill).rows(torch.arange(start, stop))
            if isinstance(module, QuantLinear | QuantEmbedding):
                held = module.weight_tensor
                return held.rows(torch.arange(start, stop, device=held.device)).cpu()
            if isinstance(module, BnbLinear):
                return module.weight_tensor.rows(start, stop).cpu()
            return cast(Tensor, module.weight[start:stop].detach().float().cpu())

        own = None if bias is None else bias.detach().float().cpu()
        rows, columns = fill.shape
        made = {path: path.made(weight, rows, columns, own) for path in set(beside.paths)}
        attach(module, [made[path] for path in beside.paths])
        module.lora.to(device)

    def _count(self, fill: Fill) -> None:
        self.meter.add(sum(self.checkpoint.nbytes(part) for part in fill.parts))

    def _take_stored(self, fill: Fill) -> None:
        """A weight that lies quantized in the file: mapped, read into memory, or left on disk."""
        mapped = _mapped_weight(self.checkpoint, fill)
        layer = layer_of(fill.module)
        if layer is not None and self.destinations.on_disk(fill.module):
            number, name = layer
            stored = {part.rpartition(".")[2]: self.checkpoint.stored(part) for part in fill.parts}
            self._streamed[number][name] = stored
            shapes = {part: torch.empty_like(tensor, device="meta") for part, tensor in mapped.tensors().items()}
            self._replace(fill, QuantTensor.from_tensors(shapes), torch.device("meta"))
        elif self.destinations.mapped(fill.module):
            self._replace(fill, mapped)
        else:
            held = {part.rpartition(".")[2]: self.checkpoint.tensor(part) for part in fill.parts}
            self._replace(fill, QuantTensor.from_tensors(held))

    def _replace(self, fill: Fill, weight: QuantTensor | BnbTensor, device: torch.device | None = None) -> None:
        """Put a quantized module in the place of the skeleton's."""
        device = device or self.destinations.device(fill.module)
        old = self.model.get_submodule(fill.module)
        if isinstance(weight, BnbTensor):
            if not isinstance(old, nn.Linear):
                raise CheckpointError(f"{fill.source} is {weight.kind}, but no linear layer; load it with quant='int4'")
            self._set_module(fill.module, BnbLinear(weight.to(device), old.bias is not None))
            return
        config = QuantConfig(weight.bits, weight.group_size)
        new: QuantLinear | QuantEmbedding
        if isinstance(old, nn.Linear):
            bias, parts = old.bias is not None, activation_splits(fill.module)
            new = QuantLinear(old.in_features, old.out_features, config, bias, device="meta", activation_splits=parts)
        elif isinstance(old, nn.Embedding):
            dtype = self.destinations.dtype(fill.module)
            new = QuantEmbedding(old.num_embeddings, old.embedding_dim, config, device="meta", dtype=dtype)
        else:
            raise CheckpointError(f"{fill.parts[0]} quantizes {fill.module}, which is neither linear nor an embedding")
        new.load(_moved(weight, device))
        self._set_module(fill.module, new)

    def _set_module(self, name: str, module: nn.Module) -> None:
        parent, _, leaf = name.rpartition(".")
        setattr(self.model.get_submodule(parent), leaf, module)

    def _read_plain(self, fill: Fill, device: torch.device) -> Tensor:
        """A tensor straight into its final memory, converted block by block."""
        dtype = self.plan.plain_dtype(fill.module, len(fill.shape), self.destinations.dtype(fill.module))
        values = torch.empty(fill.shape, dtype=dtype, device=device)
        for start, rows in finite_blocks(self.checkpoint, fill.source, self.meter):
            values[start : start + rows.shape[0]] = rows
        return values

    def _tie(self) -> None:
        """The head shares the embedding's tensors, one copy under two modules, unless it lies on a GPU."""
        embedding, device = self.model.get_submodule("model.embed_tokens"), self.destinations.device("lm_head")
        if isinstance(embedding, QuantEmbedding):
            weight = embedding.weight_tensor
            config = QuantConfig(weight.bits, weight.group_size)
            shape, parts = (embedding.embedding_dim, embedding.num_embeddings), activation_splits("lm_head")
            head = QuantLinear(*shape, config, bias=False, device="meta", activation_splits=parts)
            head.load(_moved(weight, device))
            self._set_module("lm_head", head)
            return
        weight = cast(Any, embedding).weight
        shared = device.type == "cpu"
        cast(Any, self.model).lm_head.weight = weight if shared else nn.Parameter(weight.detach().to(device))

    def _initialise(self) -> None:
        """Values for what no file holds: N(0, initializer_range), biases 0, norms 1, as the reference."""
        std = cast(Any, self.model).config.initializer_range
        for module, parameter in self.plan.fresh:
            layer, device = self.model.get_submodule(module), self.destinations.device(module)
            shape = getattr(layer, parameter).shape
            dtype = self.plan.plain_dtype(module, len(shape), self.destinations.dtype(module))
            values = torch.zeros(shape, dtype=dtype, device=device)
            if len(shape) > 1:
                values.normal_(std=std)
            elif parameter != "bias":
                values.fill_(1)
            if isinstance(layer, nn.Embedding) and layer.padding_idx is not None:
                values[layer.padding_idx] = 0
            _assign(layer, parameter, values)


def check_as_stored(model: nn.Module, checkpoint: Checkpoint, stored: QuantConfig) -> None:
    """The weights must be what config.json says of them: a config.json of another folder would be believed."""
    prefix = "" if hasattr(model, "model") else "model."  # of the trunk alone
    for inner, module in model.named_modules():
        name = f"{prefix}{inner}"
        said = stored.for_module(name)
        if said is None or not isinstance(module, QuantLinear | QuantEmbedding):
            continue
        weight = module.weight_tensor
        if (weight.bits, weight.group_size) != (said.bits, said.group_size):
            raise CheckpointError(
                f"{checkpoint.folder}: {name} is stored in int{weight.bits}, groups of {weight.group_size}, but "
                f"config.json says int{said.bits}, groups of {said.group_size}; get back the config.json that belongs "
                "to the weights, or quantize the original again"
            )


def _mapped_weight(checkpoint: Checkpoint, fill: Fill) -> QuantTensor:
    """A weight that is quantized in the file: its tensors over the map, of the shapes that were planned."""
    weight = QuantTensor.from_tensors({part.rpartition(".")[2]: checkpoint.mapped(part) for part in fill.parts})
    try:
        weight.check_finite()
    except QuantError as error:
        file = checkpoint.file(fill.parts[0])
        raise CheckpointError(f"{fill.source} in {file}: {error}; download it or quantize the original again") from None
    return weight


def _moved(weight: QuantTensor, device: torch.device) -> QuantTensor:
    if weight.device == device or device.type == "meta":
        return weight
    return QuantTensor.from_tensors({name: tensor.to(device) for name, tensor in weight.tensors().items()})


def _assign(module: nn.Module, name: str, values: Tensor) -> None:
    is_parameter = isinstance(getattr(module, name), nn.Parameter)
    setattr(module, name, nn.Parameter(values) if is_parameter else values)
