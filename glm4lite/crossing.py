"""Layers that a CPU computes token by token and a GPU in long prompts: for those their weights cross the bus.

A token reads each weight once, so it is multiplied where it lies. A prompt of hundreds of tokens reads it once too, but
computes with it hundreds of times: sending it to the GPU takes less time. It goes through two pinned buffers and a
stream of its own, while the GPU computes the layer before; its keys and values follow to RAM a layer later.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from glm4lite.cache import AwayCache, Cache, HomeCache
from glm4lite.fused import FusedLayer
from glm4lite.offload import Place
from glm4lite_quant import QuantLinear, QuantTensor
from glm4lite_quant.tensor import NAMES

if TYPE_CHECKING:
    from glm4lite.model import DecoderLayer

logger = logging.getLogger("glm4lite")

M = TypeVar("M", bound=nn.Module)

BUFFERS = 2  # one is computed with while the other is filled
ALIGNMENT = 256  # bytes: what a GPU's allocator gives
BLOCK_BYTES = 16 << 20  # copied into pinned memory at a time, so that the bus begins while the rest is copied


class _Part(NamedTuple):
    """One tensor of a layer, and where it lies in a buffer."""

    name: str
    dtype: torch.dtype
    shape: torch.Size
    at: int
    nbytes: int


class Crossing:
    """A layer whose own place is `home`, and that long prompts find on the bus's GPU."""

    at_home: bool

    def __init__(self, home: Place, bus: Bus, index: int) -> None:
        self.home, self.bus, self._index = home, bus, index
        self.at_home = home.at_home
        self._twin: DecoderLayer | None = None

    def where(self, tokens: int) -> tuple[torch.device, torch.dtype] | None:
        return (self.bus.device, self.bus.dtype) if tokens >= self.bus.threshold else None

    def native(self, layer: DecoderLayer) -> bool:
        return self.home.native(layer)

    @contextmanager
    def at_hand(
        self, layer: DecoderLayer, device: torch.device, cache: HomeCache | None
    ) -> Iterator[tuple[DecoderLayer, Cache | None]]:
        if not self.bus.carries(device):
            with self.home.at_hand(layer, device, cache) as lent:
                yield lent
            return
        twin = self._twin = self._twin or _twin(layer)
        _lend(twin, self.bus.arrived(self._index), self.bus.dtype)
        away = None if cache is None else AwayCache(cache)
        yield twin, away
        self.bus.leave(self._index, away)


class Bus:
    """Carries the weights of some layers to a GPU, in their order, one ahead.

    device, dtype: where and in what the layers are computed; threshold: tokens from which on they cross.
    """

    def __init__(
        self, layers: Sequence[DecoderLayer], device: torch.device, dtype: torch.dtype, threshold: float
    ) -> None:
        self.device, self.dtype, self.threshold = device, dtype, threshold
        self._layers, self._homes = list(layers), [layer.place for layer in layers]
        self._parts: dict[int, list[_Part]] = {}
        self._slots: list[_Slot] = []
        self._at = -1  # the layer computed last
        self._sent = -1  # the layer sent last, while a pass goes on
        self._following: list[_Following] = []  # keys and values on their way to RAM
        self.bytes_sent = 0

    def carries(self, device: torch.device) -> bool:
        """Whether an input on `device` asks for a layer on the bus's GPU."""
        return device == self.device

    def arrived(self, index: int) -> Mapping[str, Tensor]:
        """The layer's tensors on the GPU, as soon as what was launched before has run."""
        if index != self._at + 1:  # a new pass, perhaps after one that was stopped
            self._following.clear()
            self._sent = -1
        if self._sent != index:
            self._send(index)
        slot = self._slots[index % BUFFERS]
        slot.wait()
        return {
            part.name: slot.memory[part.at : part.at + part.nbytes].view(part.dtype).view(part.shape)
            for part in self._parts[index]
        }

    def leave(self, index: int, cache: AwayCache | None) -> None:
        """The layer's kernels are launched: the next layer is sent, the keys and values of the one before stored."""
        self._slots[index % BUFFERS].free()
        self._at = index
        new = [] if cache is None else [_Following(cache, self.device)]
        last = index + 1 == len(self._layers)
        if last:
            self._following += new
            self._at = self._sent = -1
        else:
            self._send(index + 1)
        for following in self._following:
            following.store()
        self._following = [] if last else new

    def _send(self, index: int) -> None:
        layer = self._layers[index]
        with self._homes[index].at_hand(layer, torch.device("cpu"), None):
            tensors = {
                name: tensor
                for named in (layer.named_parameters(), layer.named_buffers())
                for name, tensor in named
                if not tensor.is_meta
            }
            parts = self._parts.setdefault(index, _parts(tensors))
            self._slot(index).fill([(part, tensors[part.name]) for part in parts])
        self._sent = index
        self.bytes_sent += sum(part.nbytes for part in parts)

    def _slot(self, index: int) -> _Slot:
        if not self._slots:
            size = max(_size(layer) for layer in self._layers)
            stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
            self._slots = [_Slot(size, self.device, stream) for _ in range(BUFFERS)]
        return self._slots[index % BUFFERS]


class _Slot:
    """A buffer in pinned memory, one on the GPU, and the events that say when either may be written again.

    On a CPU, which stands for a GPU in tests, everything happens at once.
    """

    def __init__(self, size: int, device: torch.device, stream: torch.cuda.Stream | None) -> None:
        self.memory = torch.empty(size, dtype=torch.uint8, device=device)
        self._staging = torch.empty(size, dtype=torch.uint8) if stream is None else _pinned(size)
        self._stream = stream
        self._there: torch.cuda.Event | None = None
        self._free: torch.cuda.Event | None = None

    def fill(self, tensors: Sequence[tuple[_Part, Tensor]]) -> None:
        """Sends tensors to the buffer on the GPU, once what computes with its old contents is done."""
        if self._there is not None:
            self._there.synchronize()  # the pinned buffer is still being read
        if self._stream is not None and self._free is not None:
            self._stream.wait_event(self._free)
        for part, tensor in tensors:
            source = tensor.detach().contiguous().view(-1).view(torch.uint8)
            for start in range(0, part.nbytes, BLOCK_BYTES):
                stop = min(start + BLOCK_BYTES, part.nbytes)
                self._copy(part.at + start, source[start:stop])
        if self._stream is not None:
            self._there = self._stream.record_event(self._there or torch.cuda.Event())

    def _copy(self, at: int, source: Tensor) -> None:
        here = slice(at, at + source.numel())
        self._staging[here].copy_(source)
        if self._stream is None:
            self.memory[here].copy_(self._staging[here])
            return
        with torch.cuda.stream(self._stream):
            self.memory[here].copy_(self._staging[here], non_blocking=True)

    def wait(self) -> None:
        """What is launched from here on runs when the tensors are there."""
        if self._there is not None:
            torch.cuda.current_stream(self.memory.device).wait_event(self._there)

    def free(self) -> None:
        """What was launched up to here needs the buffer; after that it may be filled."""
        if self._stream is not None:
            self._free = torch.cuda.current_stream(self.memory.device).record_event(self._free or torch.cuda.Event())


class _Following:
    """Keys and values of a layer on their way into its cache in RAM."""

    def __init__(self, cache: AwayCache, device: torch.device) -> None:
        self._home, self._length = cache.home, cache.home.length
        self._done: torch.cuda.Event | None = None
        self._keys, self._values = cache.new
        if device.type == "cuda":
            self._keys, self._values = (_pinned_like(new).copy_(new, non_blocking=True) for new in cache.new)
            self._done = torch.cuda.current_stream(device).record_event()

    def store(self) -> None:
        if self._done is not None:
            self._done.synchronize()
        if self._home.length == self._length:
            self._home.append(self._keys, self._values)


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


def _twin(layer: DecoderLayer) -> DecoderLayer:
    """The same layer for tensors that lie elsewhere."""
    twin = _shell(layer)
    twin._fused = FusedLayer()
    return twin


def _shell(module: M) -> M:
    """A module of the same kind and settings with places of its own for tensors: they are set anew each time."""
    twin = copy.copy(module)
    twin._parameters, twin._buffers = dict(module._parameters), dict(module._buffers)
    twin._modules = {name: None if child is None else _shell(child) for name, child in module._modules.items()}
    return twin


def _lend(twin: nn.Module, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Gives a layer's twin its tensors; plain matrices in the type of the GPU's activations."""
    for name, module in twin.named_modules():
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


def put_on_bus(layers: Sequence[DecoderLayer], device: torch.device, dtype: torch.dtype, threshold: float) -> Bus:
    """Gives layers, in the order of a pass, a way to the GPU for prompts of at least `threshold` tokens."""
    bus = Bus(layers, device, dtype, threshold)
    for index, layer in enumerate(layers):
        layer.place = Crossing(layer.place, bus, index)
    return bus
