"""Layers that a CPU computes token by token and a GPU in long prompts: for those their weights cross the bus.

A token reads each weight once, so it is multiplied where it lies. A prompt of hundreds of tokens reads it once too, but
computes with it hundreds of times: sending it to the GPU takes less time. It goes through two pinned blocks and a
stream of its own, while the GPU computes the layer before; its keys and values follow to RAM a layer later.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from glm4lite.memory.resources import BUS_BLOCK_BYTES, BUS_BLOCKS, BUS_BUFFERS
from glm4lite.model.cache import Caches, HomeCaches, SpanCaches, StagedCache, parts_of
from glm4lite.model.layers import DecoderLayer, WeightStore
from glm4lite.runtime.disk_offload import shallow_clone
from glm4lite_quant import QuantLinear, QuantTensor
from glm4lite_quant.format import NAMES

logger = logging.getLogger("glm4lite")

ALIGNMENT = 256  # bytes: what a GPU's allocator gives


class _Part(NamedTuple):
    """One tensor of a layer, and where it lies in a buffer."""

    name: str
    dtype: torch.dtype
    shape: torch.Size
    at: int
    nbytes: int


class PrefetchedStore:
    """A layer whose own place is `home`, and that long prompts find on the bus's GPU."""

    resident: bool

    def __init__(self, home: WeightStore, bus: Prefetcher, index: int) -> None:
        self.home, self.bus, self._index = home, bus, index
        self.resident = home.resident
        self._clone: DecoderLayer | None = None

    def where(self, tokens: int) -> tuple[torch.device, torch.dtype] | None:
        return (self.bus.device, self.bus.dtype) if tokens >= self.bus.threshold else None

    def fused(self, layer: DecoderLayer) -> bool:
        return self.home.fused(layer)

    @contextmanager
    def acquire(
        self, layer: DecoderLayer, device: torch.device, cache: HomeCaches | None
    ) -> Iterator[tuple[DecoderLayer, Caches | None]]:
        if not self.bus.carries(device):
            with self.home.acquire(layer, device, cache) as borrowed:
                yield borrowed
            return
        clone = self._clone = self._clone or shallow_clone(layer)
        _materialize(clone, self.bus.weights(self._index), self.bus.dtype)
        away = [StagedCache(part) for part in parts_of(cache)]
        yield clone, SpanCaches(away) if isinstance(cache, SpanCaches) else away[0] if away else None
        self.bus.release(self._index, [_Writeback(part, self.bus.device, layer.dtype) for part in away])


class Prefetcher:
    """Carries the weights of some layers to a GPU, in their order, one ahead.

    device, dtype: where and in what the layers are computed; threshold: tokens from which on they cross.
    """

    def __init__(
        self, layers: Sequence[DecoderLayer], device: torch.device, dtype: torch.dtype, threshold: float
    ) -> None:
        self.device, self.dtype, self.threshold = device, dtype, threshold
        self._layers = [weakref.ref(layer) for layer in layers]  # which hold the bus: a cycle would keep their memory
        self._homes = [layer.store for layer in layers]
        self._parts: dict[int, list[_Part]] = {}
        self._slots: list[_Slot] = []
        self._staging: _Staging | None = None
        self._at = -1  # the layer computed last
        self._sent = -1  # the layer sent last, while a pass goes on
        self._writebacks: list[_Writeback] = []  # keys and values on their way to RAM
        self.bytes_sent = 0

    def carries(self, device: torch.device) -> bool:
        """Whether an input on `device` asks for a layer on the bus's GPU."""
        return device == self.device

    def weights(self, index: int) -> Mapping[str, Tensor]:
        """The layer's tensors on the GPU, as soon as what was launched before has run."""
        if index != self._at + 1:  # a new pass, perhaps after one that was stopped
            self._writebacks.clear()
            self._sent = -1
        if self._sent != index:
            self._send(index)
        slot = self._slots[index % BUS_BUFFERS]
        slot.wait()
        return {
            part.name: slot.memory[part.at : part.at + part.nbytes].view(part.dtype).view(part.shape)
            for part in self._parts[index]
        }

    def release(self, index: int, new: list[_Writeback]) -> None:
        """The layer's kernels are launched: the next layer is sent, the keys and values of the one before stored."""
        self._slots[index % BUS_BUFFERS].free()
        self._at = index
        last = index + 1 == len(self._layers)
        if last:
            self._writebacks += new
            self._at = self._sent = -1
        else:
            self._send(index + 1)
        for arriving in self._writebacks:
            arriving.store()
        self._writebacks = [] if last else new

    def _send(self, index: int) -> None:
        layer = self._layer(index)
        with self._homes[index].acquire(layer, torch.device("cpu"), None):
            tensors = {
                name: tensor
                for named in (layer.named_parameters(), layer.named_buffers())
                for name, tensor in named
                if not tensor.is_meta
            }
            parts = self._parts.setdefault(index, _parts(tensors))
            slot, staging = self._ready(index)
            slot.before_filling()
            for part in parts:
                source = tensors[part.name].detach().contiguous().view(-1).view(torch.uint8)
                staging.send(source, slot.memory[part.at : part.at + part.nbytes])
            slot.filled()
        self._sent = index
        self.bytes_sent += sum(part.nbytes for part in parts)

    def _layer(self, index: int) -> DecoderLayer:
        layer = self._layers[index]()
        if layer is None:
            raise RuntimeError("a bus carries layers of a model that is gone")
        return layer

    def _ready(self, index: int) -> tuple[_Slot, _Staging]:
        """The buffer of a layer and what sends into it; taken from memory when the first prompt crosses."""
        if self._staging is None:
            size = max(_size(self._layer(at)) for at in range(len(self._layers)))
            with torch.inference_mode(False):  # else a script could not go on under no_grad
                stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
                self._slots = [_Slot(size, self.device, stream) for _ in range(BUS_BUFFERS)]
                self._staging = _Staging(stream)
        return self._slots[index % BUS_BUFFERS], self._staging


class _Slot:
    """A buffer on the GPU, and the events that say when it is full and when it may be filled again.

    On a CPU, which stands for a GPU in tests, everything happens at once and there are no events.
    """

    def __init__(self, size: int, device: torch.device, stream: torch.cuda.Stream | None) -> None:
        self.memory, self._stream = torch.empty(size, dtype=torch.uint8, device=device), stream
        self._there: torch.cuda.Event | None = None
        self._free: torch.cuda.Event | None = None
        if stream is not None:  # the memory may have been another tensor's, of a stream that still uses it
            stream.wait_stream(torch.cuda.current_stream(device))
            self.memory.record_stream(stream)

    def before_filling(self) -> None:
        """What is sent from here on waits for what computes with the old contents."""
        if self._stream is not None and self._free is not None:
            self._stream.wait_event(self._free)

    def filled(self) -> None:
        """All that was sent up to here is the contents."""
        if self._stream is not None:
            self._there = self._stream.record_event(self._there or torch.cuda.Event())

    def wait(self) -> None:
        """What is launched from here on runs when the contents are there."""
        if self._there is not None:
            torch.cuda.current_stream(self.memory.device).wait_event(self._there)

    def free(self) -> None:
        """What was launched up to here needs the contents; after that others may come."""
        if self._stream is not None:
            self._free = torch.cuda.current_stream(self.memory.device).record_event(self._free or torch.cuda.Event())


class _Staging:
    """Blocks of pinned memory that bytes go through in turn: the bus reads one while the CPU writes the other."""

    def __init__(self, stream: torch.cuda.Stream | None) -> None:
        self._stream, self._turn = stream, 0
        self._blocks = [_pinned(BUS_BLOCK_BYTES) if stream is not None else None for _ in range(BUS_BLOCKS)]
        self._crossed: list[torch.cuda.Event | None] = [None] * BUS_BLOCKS

    def send(self, source: Tensor, target: Tensor) -> None:
        """uint8 on the CPU -> uint8 of the same size on the GPU, where it arrives on the bus's stream."""
        for start in range(0, source.numel(), BUS_BLOCK_BYTES):
            piece = slice(start, start + BUS_BLOCK_BYTES)
            self._send_block(source[piece], target[piece])

    def _send_block(self, source: Tensor, target: Tensor) -> None:
        block, crossed = self._blocks[self._turn], self._crossed[self._turn]
        if self._stream is None or block is None:
            target.copy_(source)
            return
        if crossed is not None:
            crossed.synchronize()
        staged = block[: source.numel()].copy_(source)
        with torch.cuda.stream(self._stream):
            target.copy_(staged, non_blocking=True)
        self._crossed[self._turn] = self._stream.record_event(crossed or torch.cuda.Event())
        self._turn = (self._turn + 1) % BUS_BLOCKS


class _Writeback:
    """Keys and values of a layer on their way into its cache in RAM."""

    def __init__(self, cache: StagedCache, device: torch.device, dtype: torch.dtype | None) -> None:
        """`dtype`: of the layer's activations at home; None: what is stored stays as it is."""
        self._home, self._length, self._dtype = cache.home, cache.home.length, dtype
        self._done: torch.cuda.Event | None = None
        self._keys, self._values = cache.new
        if device.type == "cuda":
            self._keys, self._values = (_pinned_like(new).copy_(new, non_blocking=True) for new in cache.new)
            self._done = torch.cuda.current_stream(device).record_event()

    def store(self) -> None:
        if self._done is not None:
            self._done.synchronize()
        if self._home.length == self._length:
            self._home.append(*(new.to(self._dtype or new.dtype) for new in (self._keys, self._values)))


def _pinned(size: int) -> Tensor:
    """uint8 [size] in memory that the bus reads by itself; ordinary memory, which is slower, where there is none."""
    try:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)
    except RuntimeError as error:
        _say_unpinned(str(error).partition("\n")[0][:200])
        return torch.empty(size, dtype=torch.uint8)


@lru_cache
def _say_unpinned(why: str) -> None:
    """Once for each reason."""
    logger.warning("no pinned memory can be had (%s): weights cross the bus more slowly", why)


def _pinned_like(tensor: Tensor) -> Tensor:
    return _pinned(tensor.nbytes).view(tensor.dtype).view(tensor.shape)


def _size(layer: DecoderLayer) -> int:
    """Bytes that a layer takes in a buffer; its shapes are known wherever its weights are."""
    tensors = dict(layer.named_parameters()) | dict(layer.named_buffers())
    parts = _parts(tensors)
    return parts[-1].at + parts[-1].nbytes


def _parts(tensors: Mapping[str, Tensor]) -> list[_Part]:
    parts, at = [], 0
    for name, tensor in tensors.items():
        parts.append(_Part(name, tensor.dtype, tensor.shape, at, tensor.nbytes))
        at = -(-(at + tensor.nbytes) // ALIGNMENT) * ALIGNMENT
    return parts


def _materialize(clone: nn.Module, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Gives a layer's clone its tensors; plain matrices in the type of the GPU's activations."""
    for name, module in clone.named_modules():
        own = {leaf: tensors[f"{name}.{leaf}"] for leaf in _leaves(module) if f"{name}.{leaf}" in tensors}
        if isinstance(module, QuantLinear):
            module.load(QuantTensor.from_tensors({leaf: own.pop(leaf) for leaf in NAMES if leaf in own}))
        for leaf, value in own.items():
            if leaf in module._buffers:
                module._buffers[leaf] = value
            else:
                matrix = value.to(dtype) if isinstance(module, nn.Linear) else value
                module._parameters[leaf] = nn.Parameter(matrix, requires_grad=False)


def _leaves(module: nn.Module) -> list[str]:
    return [*module._parameters, *module._buffers]


def prefetch_long_prompts(
    layers: Sequence[DecoderLayer], device: torch.device, dtype: torch.dtype, threshold: float
) -> Prefetcher:
    """Gives layers, in the order of a pass, a way to the GPU for prompts of at least `threshold` tokens."""
    bus = Prefetcher(layers, device, dtype, threshold)
    for index, layer in enumerate(layers):
        layer.store = PrefetchedStore(layer.store, bus, index)
    return bus
