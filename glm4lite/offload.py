"""Where a decoder layer's weights are when they are needed: the layer asks its place, and does not know.

At home: in the layer's modules, for good. On disk: read ahead into a ring of buffers (glm4lite.weights.ring), in the
layer's modules only while the layer runs, and nowhere in between: whoever looks then finds no weights, not old ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor, nn

from glm4lite.cache import Cache, HomeCache
from glm4lite.errors import CheckpointError
from glm4lite.weights.direct import DirectFile
from glm4lite.weights.ring import Span, WeightRing, span_of
from glm4lite.weights.shard import StoredTensor, torch_dtype
from glm4lite_quant import QuantLinear, QuantTensor

if TYPE_CHECKING:
    from glm4lite.model import DecoderLayer

Planes = Mapping[str, Mapping[str, StoredTensor]]
"""A layer's quantized weights: module -> plane (qweight, scales, ...) -> where it lies."""


class Place(Protocol):
    """Where a layer's weights are."""

    @property
    def at_home(self) -> bool:
        """Whether the layer's modules have their weights at all times."""

    def where(self, tokens: int) -> tuple[torch.device, torch.dtype] | None:
        """Where and in what so many tokens are computed; None: on the layer's own device, in its own type."""

    def at_hand(
        self, layer: DecoderLayer, device: torch.device, cache: HomeCache | None
    ) -> AbstractContextManager[tuple[DecoderLayer, Cache | None]]:
        """For an input on `device`: the layer that computes, which has its weights while this is open, and its cache.

        Raises CheckpointError where the disk fails.
        """

    def native(self, layer: DecoderLayer) -> bool:
        """Whether the layer runs in the native library once its weights are at hand."""


class AtHome:
    """The weights are in the layer's modules."""

    at_home = True

    def where(self, tokens: int) -> None:
        return None

    def at_hand(
        self, layer: DecoderLayer, device: torch.device, cache: HomeCache | None
    ) -> AbstractContextManager[tuple[DecoderLayer, Cache | None]]:
        return nullcontext((layer, cache))

    def native(self, layer: DecoderLayer) -> bool:
        return layer.kernel() is not None


AT_HOME = AtHome()


class OnDisk:
    """One layer of those that a ring reads."""

    at_home = False

    def __init__(self, ring: WeightRing, index: int, layout: _Layout) -> None:
        self.ring, self._index, self._layout = ring, index, layout
        self._weights: dict[int, dict[str, QuantTensor]] = {}  # by the buffer they lie in
        self._native: bool | None = None

    def where(self, tokens: int) -> None:
        return None

    @contextmanager
    def at_hand(
        self, layer: DecoderLayer, device: torch.device, cache: HomeCache | None
    ) -> Iterator[tuple[DecoderLayer, Cache | None]]:
        memory = self.ring.acquire(self._index)
        try:
            self._lend(layer, memory)
            yield layer, cache
        finally:
            _take_back(layer)
            self.ring.release()

    def native(self, layer: DecoderLayer) -> bool:
        if self._native is None:
            with self.shapes_at_hand(layer):
                self._native = layer.kernel() is not None
        return self._native

    @contextmanager
    def shapes_at_hand(self, layer: DecoderLayer) -> Iterator[None]:
        """As `at_hand`, for questions that shapes and types answer: nothing is read, and any values may be there."""
        self._lend(layer, self.ring.memory())
        try:
            yield
        finally:
            _take_back(layer)

    def _lend(self, layer: DecoderLayer, memory: Tensor) -> None:
        address = memory.data_ptr()
        if address not in self._weights:
            self._weights[address] = self._layout.weights(memory)
        for name, weight in self._weights[address].items():
            cast(QuantLinear, layer.get_submodule(name)).load(weight)


def _take_back(layer: nn.Module) -> None:
    for module in layer.modules():
        if isinstance(module, QuantLinear):
            module.unload()


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

    def weights(self, memory: Tensor) -> dict[str, QuantTensor]:
        """The weights over a buffer: no copies."""
        planes: dict[str, dict[str, Tensor]] = {}
        for (module, plane), tensor, at in zip(self._names, self._stored, self._places, strict=True):
            flat = memory[at : at + tensor.nbytes].view(torch_dtype(tensor))
            planes.setdefault(module, {})[plane] = flat.view(tensor.shape)
        return {module: QuantTensor.from_tensors(tensors) for module, tensors in planes.items()}


def streamed(layer: DecoderLayer) -> OnDisk | None:
    """The layer's place on disk, also where prompts take it on to a GPU; None where it has none."""
    place = getattr(layer.place, "home", layer.place)
    return place if isinstance(place, OnDisk) else None


def put_on_disk(layers: Mapping[int, DecoderLayer], planes: Mapping[int, Planes]) -> WeightRing:
    """Gives the layers (by number) their places on disk, and starts nothing yet: the first pass does.

    Raises:
        CheckpointError: a file cannot be read, or was not written for reading in place.
    """
    paths = {tensor.path for of in planes.values() for module in of.values() for tensor in module.values()}
    files = {path: DirectFile(path) for path in sorted(paths)}
    layouts = {number: _Layout(planes[number], files) for number in sorted(layers)}
    ring = WeightRing([layout.span for layout in layouts.values()])
    for index, (number, layout) in enumerate(layouts.items()):
        layers[number].place = OnDisk(ring, index, layout)
    return ring
