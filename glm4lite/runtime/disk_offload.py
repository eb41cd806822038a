"""Layers whose weights are on disk: a weight store (`model.layers.WeightStore`) that reads them when they are needed.

They are read ahead into a ring of buffers (`runtime.disk_ring`), are in the layer's modules only while the layer runs,
and nowhere in between: whoever looks then finds no weights, not old ones.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from glm4lite.base.direct_io import DirectFile
from glm4lite.base.errors import CheckpointError
from glm4lite.base.stored_tensor import StoredTensor
from glm4lite.checkpoint.shard import torch_dtype
from glm4lite.model.cache import Caches, HomeCaches
from glm4lite.model.layers import RESIDENT, DecoderLayer
from glm4lite.runtime.disk_ring import Span, WeightRing, span_of
from glm4lite_quant import QuantLinear, QuantTensor, pages

M = TypeVar("M", bound=nn.Module)
Planes = Mapping[str, Mapping[str, StoredTensor]]
"""A layer's quantized weights: module -> plane (qweight, scales, ...) -> where it lies."""


class DiskStore:
    """One layer of those that a ring reads."""

    resident = False

    def __init__(self, ring: WeightRing, index: int, layout: _Layout) -> None:
        self.ring, self._index, self._layout = ring, index, layout
        self._weights: dict[int, dict[str, QuantTensor]] = {}  # by the buffer they lie in
        self._fused: bool | None = None

    def where(self, tokens: int) -> None:
        return None

    @contextmanager
    def acquire(
        self, layer: DecoderLayer, device: torch.device, cache: HomeCaches | None
    ) -> Iterator[tuple[DecoderLayer, Caches | None]]:
        memory = self.ring.acquire(self._index)
        try:
            _materialize(layer, self._over(memory))
            yield layer, cache
        finally:
            _release(layer)
            self.ring.release()

    def fused(self, layer: DecoderLayer) -> bool:
        if self._fused is None:
            shaped = self.shaped(layer)
            self._fused = shaped.runner.fuses(shaped)
        return self._fused

    def shaped(self, layer: DecoderLayer) -> DecoderLayer:
        """A clone with weights of the same shapes but no values, for questions that shapes answer, in any thread."""
        clone = shallow_clone(layer)
        _materialize(clone, self._layout.weights(pages.zeros(self._layout.span.nbytes)))
        return clone

    def stored(self) -> Mapping[str, StoredTensor]:
        """Where the layer's planes lie, by their names in the layer."""
        return self._layout.stored()

    def _over(self, memory: Tensor) -> Mapping[str, QuantTensor]:
        address = memory.data_ptr()
        if address not in self._weights:
            self._weights[address] = self._layout.weights(memory)
        return self._weights[address]


def _materialize(layer: nn.Module, weights: Mapping[str, QuantTensor]) -> None:
    for name, weight in weights.items():
        cast(QuantLinear, layer.get_submodule(name)).load(weight)


def _release(layer: nn.Module) -> None:
    for module in layer.modules():
        if isinstance(module, QuantLinear):
            module.unload()


def shallow_clone(layer: DecoderLayer) -> DecoderLayer:
    """The same layer for tensors that lie elsewhere."""
    clone = _shell(layer)
    clone.store = RESIDENT
    return clone


def _shell(module: M) -> M:
    """A module of the same kind and settings with places of its own for tensors: they are set anew each time."""
    clone = copy.copy(module)
    clone._parameters, clone._buffers = dict(module._parameters), dict(module._buffers)
    clone._modules = {name: None if child is None else _shell(child) for name, child in module._modules.items()}
    return clone


class _Layout:
    """How a layer's planes lie in a buffer."""

    def __init__(self, planes: Planes, files: Mapping[Any, DirectFile]) -> None:
        self._names = [(module, plane) for module in planes for plane in planes[module]]
        self._stored = [planes[module][plane] for module, plane in self._names]
        parts = [(files[tensor.path], tensor.offset, tensor.nbytes) for tensor in self._stored]
        self.span: Span
        self.span, self._places = span_of(parts)
        for tensor in self._stored:
            if tensor.offset % torch_dtype(tensor).itemsize:
                raise CheckpointError(
                    f"{tensor.name} in {tensor.path} begins at byte {tensor.offset}, where its type cannot be read in "
                    "place; write the folder again with `glm4lite quantize`"
                )

    def stored(self) -> dict[str, StoredTensor]:
        return {f"{module}.{plane}": own for (module, plane), own in zip(self._names, self._stored, strict=True)}

    def weights(self, memory: Tensor) -> dict[str, QuantTensor]:
        """The weights over a buffer: no copies."""
        planes: dict[str, dict[str, Tensor]] = {}
        for (module, plane), tensor, at in zip(self._names, self._stored, self._places, strict=True):
            flat = memory[at : at + tensor.nbytes].view(torch_dtype(tensor))
            planes.setdefault(module, {})[plane] = flat.view(tensor.shape)
        return {module: QuantTensor.from_tensors(tensors) for module, tensors in planes.items()}


def streamed(layer: DecoderLayer) -> DiskStore | None:
    """The layer's place on disk, also where prompts take it on to a GPU; None where it has none."""
    store = getattr(layer.store, "home", layer.store)
    return store if isinstance(store, DiskStore) else None


def offload_to_disk(layers: Mapping[int, DecoderLayer], planes: Mapping[int, Planes]) -> WeightRing:
    """Gives the layers (by number) their places on disk, and starts nothing yet: the first pass does.

    Raises:
        CheckpointError: a file cannot be read, or was not written for reading in place.
    """
    paths = {tensor.path for of in planes.values() for module in of.values() for tensor in module.values()}
    files = {path: DirectFile(path) for path in sorted(paths)}
    layouts = {number: _Layout(planes[number], files) for number in sorted(layers)}
    ring = WeightRing([layout.span for layout in layouts.values()])
    for index, (number, layout) in enumerate(layouts.items()):
        layers[number].store = DiskStore(ring, index, layout)
    return ring
