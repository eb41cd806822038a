"""KVCache: keys and values of every layer, grown in steps, cut back to keep a common prefix."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Literal, Protocol, TypeVar

import torch
from torch import Tensor

from glm4lite_quant.kernels.decoder import TOKENS, CacheView, Heads

if TYPE_CHECKING:
    from glm4lite.model.config import Glm4Config

KVType = Literal["float", "int8"]
STEP = 256  # positions added when a buffer is full: few copies, little slack
GPU_STEP = 1024  # there a buffer that moves has to be recorded anew (glm4lite.runtime.cuda_graph)


class LayerCache:
    """Keys and values [B, kv_heads, length, head_dim] of one layer in their own type; any device, differentiable.

    limit: tokens that memory is planned for; up to there the buffers never grow beyond it.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.length, self.limit = 0, limit

    @property
    def buffer(self) -> Tensor | None:
        """One of the buffers: while it is the same tensor, views stay true."""
        return self.values

    def view(self, tokens: int, heads: Heads, device: torch.device, dtype: torch.dtype) -> CacheView:
        """The buffers of a batch of one, with room for `tokens` more, for a kernel that writes them and reads all."""
        like, end = torch.empty(1, heads.key_value, 0, heads.dim, device=device, dtype=dtype), self.length + tokens
        self.keys, self.values = self._reserved(self.keys, like, end), self._reserved(self.values, like, end)
        if self.keys.shape[0] != 1 or self.keys.dtype != dtype or self.keys.device != device:
            raise ValueError(
                f"the cache holds {self.keys.shape[0]} sequences in {self.keys.dtype} on {self.keys.device}"
            )
        return CacheView(self.keys[0], self.values[0], None, None, self.length)

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Adds [B, kv_heads, T, head_dim] and returns all positions so far (views, not copies)."""
        end = self.length + keys.shape[2]
        if keys.requires_grad:  # a buffer written in place would cut the graph
            keys, values = self._concatenated(keys, values)
            self.keys, self.values, self.length = keys, values, end
            return keys, values
        # Both grow or none does: memory may run out between them.
        self.keys, self.values = self._reserved(self.keys, keys, end), self._reserved(self.values, values, end)
        self.keys[:, :, self.length : end] = keys
        self.values[:, :, self.length : end] = values
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def past(self) -> tuple[Tensor, Tensor] | None:
        """All positions so far, None where there are none."""
        if self.keys is None or self.values is None or not self.length:
            return None
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def rounded(self, new: Tensor) -> Tensor:
        """Keys or values as they read back once they are stored."""
        return new

    def stored(self, begin: int, end: int) -> tuple[Tensor, ...]:
        """Positions begin..end-1 of one sequence as `stored_forms` says, copied to the CPU."""
        if self.keys is None or self.values is None:
            raise ValueError("the cache is empty")
        return (torch.stack((self.keys[0, :, begin:end], self.values[0, :, begin:end])).cpu(),)

    def restore(self, stored: tuple[Tensor, ...], room: int = 0) -> None:
        """Appends what a cache of this kind gave as `stored`, bit by bit, on the device where that lies now.

        `room`: positions that it and what follows soon will take.
        """
        keys, values = stored[0][:, None]
        end = self.length + max(room, keys.shape[2])
        self.keys, self.values = self._reserved(self.keys, keys, end), self._reserved(self.values, values, end)
        self.append(keys, values)

    def _concatenated(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        if self.keys is None or self.values is None:
            return keys, values
        past = slice(0, self.length)
        return torch.cat((self.keys[:, :, past], keys), 2), torch.cat((self.values[:, :, past], values), 2)

    def _reserved(self, buffer: Tensor | None, like: Tensor, end: int) -> Tensor:
        """The buffer, or a larger one with what it holds, where it has no room for `end` positions."""
        if buffer is not None and buffer.shape[2] >= end:
            return buffer
        batch, heads, _, head_dim = like.shape
        with torch.inference_mode(False):  # else a script could not go on under no_grad
            grown = like.new_empty(batch, heads, _capacity(end, self.limit, like.device), head_dim)
        if buffer is not None:
            grown[:, :, : self.length] = buffer[:, :, : self.length]
        return grown

    def copy(self, length: int) -> LayerCache:
        """The first `length` positions, in buffers of their own without room to grow."""
        made = LayerCache(self.limit)
        made.length = min(length, self.length)
        if self.keys is not None and self.values is not None:
            made.keys, made.values = self.keys[:, :, : made.length].clone(), self.values[:, :, : made.length].clone()
        return made

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in (self.keys, self.values) if buffer is not None)


class DynamicLayerCache(LayerCache):
    """One layer of a DynamicCache of Transformers, which a script made and keeps."""

    def __init__(self, cache: Any, layer: int) -> None:
        self._cache, self._layer = cache, layer
        self.keys, self.values, self.limit = None, None, None

    @property
    def length(self) -> int:
        return int(self._cache.get_seq_length(self._layer))

    @length.setter
    def length(self, length: int) -> None:
        stored = self._cache.layers[self._layer] if self.length > length else None
        if stored is not None:
            stored.keys, stored.values = stored.keys[:, :, :length], stored.values[:, :, :length]

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        both: tuple[Tensor, Tensor] = self._cache.update(keys, values, self._layer)
        return both

    def past(self) -> tuple[Tensor, Tensor] | None:
        stored = self._cache.layers[self._layer] if self.length else None
        return None if stored is None else (stored.keys, stored.values)


class PackedLayerCache:
    """As LayerCache, in the layout the native attention reads: float32, or int8 with a scale per head and token.

    keys [B, kv_heads, capacity / 16, head_dim, 16], values [B, kv_heads, capacity, head_dim]. `append` serves the code
    that knows no layout: it returns whole float copies and is slow. Not differentiable.

    limit: tokens that memory is planned for; up to there the buffers never grow beyond it.
    """

    def __init__(self, int8: bool, limit: int | None = None) -> None:
        self.int8, self.length, self.limit = int8, 0, limit
        self._keys: Tensor | None = None
        self._values: Tensor | None = None
        self._scales: Tensor | None = None  # [keys or values, B, kv_heads, capacity]

    @property
    def buffer(self) -> Tensor | None:
        """As LayerCache's."""
        return self._values

    def view(self, tokens: int, heads: Heads, device: torch.device, dtype: torch.dtype) -> CacheView:
        """As LayerCache's; `dtype` is that of the activations, not of the cache."""
        self._reserve(self.length + tokens, (1, heads.key_value), heads.dim, device)
        keys, values, scales = self._buffers()
        if keys.shape[0] != 1:
            raise ValueError(f"the cache holds a batch of {keys.shape[0]}, not of one")
        key_scale, value_scale = (None, None) if scales is None else (scales[0, 0], scales[1, 0])
        return CacheView(keys[0], values[0], key_scale, value_scale, self.length)

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Adds [B, kv_heads, T, head_dim] and returns all positions so far in that type."""
        batch, heads, tokens, head_dim = keys.shape
        end = self.length + tokens
        self._reserve(end, (batch, heads), head_dim, keys.device)
        at = torch.arange(self.length, end, device=keys.device)
        for which, new in enumerate((keys.float(), values.float())):
            self._write(which, at, *(_int8(new) if self.int8 else (new, None)))
        self.length = end
        return self._read(0).to(keys.dtype), self._read(1).to(values.dtype)

    def past(self) -> tuple[Tensor, Tensor] | None:
        """All positions so far as float32, None where there are none."""
        return (self._read(0), self._read(1)) if self.length else None

    def rounded(self, new: Tensor) -> Tensor:
        """Keys or values as they read back once they are stored."""
        if not self.int8:
            return new
        codes, scale = _int8(new.float())
        return (codes * scale[..., None]).to(new.dtype)

    def stored(self, begin: int, end: int) -> tuple[Tensor, ...]:
        """As LayerCache's."""
        (keys, key_scales), (values, value_scales) = (self._codes(which, begin, end) for which in (0, 1))
        both = torch.stack((keys[0], values[0]))
        if key_scales is None or value_scales is None:
            return (both.cpu(),)
        return both.cpu(), torch.stack((key_scales[0], value_scales[0])).cpu()

    def restore(self, stored: tuple[Tensor, ...], room: int = 0) -> None:
        """As LayerCache's."""
        both, *scales = stored
        _, heads, tokens, head_dim = both.shape
        self._reserve(self.length + max(room, tokens), (1, heads), head_dim, both.device)
        at = torch.arange(self.length, self.length + tokens, device=both.device)
        for which in (0, 1):
            self._write(which, at, both[which][None], scales[0][which][None] if scales else None)
        self.length += tokens

    def _write(self, which: int, at: Tensor, codes: Tensor, scales: Tensor | None) -> None:
        """Keys (0) or values (1) [B, kv_heads, T, head_dim] of the positions `at`, and the scales of int8 codes."""
        keys, values, all_scales = self._buffers()
        if which == 0:
            keys[:, :, at // TOKENS, :, at % TOKENS] = codes.permute(2, 0, 1, 3).to(keys.dtype)
        else:
            values[:, :, at] = codes.to(values.dtype)
        if scales is not None and all_scales is not None:
            all_scales[which][:, :, at] = scales

    def _codes(self, which: int, begin: int, end: int) -> tuple[Tensor, Tensor | None]:
        """Keys or values [B, kv_heads, T, head_dim] of positions begin..end-1 as they lie there; of int8 codes the
        scales [B, kv_heads, T]."""
        keys, values, scales = self._buffers()
        if which == 0:
            first = begin // TOKENS
            codes = keys[:, :, first : -(-end // TOKENS)].transpose(3, 4).flatten(2, 3)
            codes = codes[:, :, begin - first * TOKENS : end - first * TOKENS]
        else:
            codes = values[:, :, begin:end]
        return codes, None if scales is None else scales[which, :, :, begin:end]

    def _read(self, which: int) -> Tensor:
        """All positions so far as float32, [B, kv_heads, length, head_dim]."""
        keys, values, scales = self._buffers()
        codes = keys.transpose(3, 4).flatten(2, 3) if which == 0 else values
        whole = codes[:, :, : self.length].float()
        return whole if scales is None else whole * scales[which, :, :, : self.length, None]

    def _buffers(self) -> tuple[Tensor, Tensor, Tensor | None]:
        if self._keys is None or self._values is None:
            raise ValueError("the cache is empty")
        return self._keys, self._values, self._scales

    def _reserve(self, end: int, outer: tuple[int, int], head_dim: int, device: torch.device) -> None:
        if self._values is not None and end <= self._values.shape[2]:
            return
        capacity = _capacity(end, self.limit, device)
        dtype = torch.int8 if self.int8 else torch.float32
        with torch.inference_mode(False):
            keys = torch.empty(*outer, capacity // TOKENS, head_dim, TOKENS, dtype=dtype, device=device)
            values = torch.empty(*outer, capacity, head_dim, dtype=dtype, device=device)
            scales = torch.empty(2, *outer, capacity, device=device) if self.int8 else None
        if self._keys is not None and self._values is not None:
            keys[:, :, : self._keys.shape[2]] = self._keys
            values[:, :, : self._values.shape[2]] = self._values
            if scales is not None and self._scales is not None:
                scales[..., : self._scales.shape[3]] = self._scales
        self._keys, self._values, self._scales = keys, values, scales

    def copy(self, length: int) -> PackedLayerCache:
        """The first `length` positions, in buffers of their own with little room to grow."""
        made = PackedLayerCache(self.int8, self.limit)
        made.length = min(length, self.length)
        if self._keys is not None and self._values is not None:
            blocks = -(-made.length // TOKENS)
            made._keys, made._values = self._keys[:, :, :blocks].clone(), self._values[:, :, : blocks * TOKENS].clone()
            made._scales = None if self._scales is None else self._scales[..., : blocks * TOKENS].clone()
        return made

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in (self._keys, self._values, self._scales) if buffer is not None)


class StagedCache:
    """One layer's part while the layer is computed away from where that lies: `new` is stored there afterwards.

    What is read has the same bits as if the cache lay here.
    """

    def __init__(self, home: LayerCache | PackedLayerCache) -> None:
        self.home, self.length = home, home.length
        self._new: tuple[Tensor, Tensor] | None = None

    @property
    def new(self) -> tuple[Tensor, Tensor]:
        """Keys and values that were appended."""
        if self._new is None:
            raise ValueError("nothing was appended")
        return self._new

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Adds [B, kv_heads, T, head_dim] and returns all positions so far in that type."""
        self._new, past = (keys, values), self.home.past()
        both = [self.home.rounded(new) for new in self.new]
        if past is not None:
            both = [torch.cat((old.to(new), new), 2) for old, new in zip(past, both, strict=True)]
        self.length += keys.shape[2]
        return both[0], both[1]


HomeCache = LayerCache | PackedLayerCache
Cache = HomeCache | StagedCache
AnyCache = TypeVar("AnyCache", bound=Cache, covariant=True)


@dataclass(frozen=True)
class SpanCaches(Generic[AnyCache]):
    """One layer's caches of the sequences of a step, in the place of one cache."""

    parts: Sequence[AnyCache]


HomeCaches = HomeCache | SpanCaches[HomeCache]
Caches = Cache | SpanCaches[Cache]


def parts_of(caches: AnyCache | SpanCaches[AnyCache] | None) -> Sequence[AnyCache]:
    """Each sequence's; of one cache, that."""
    if isinstance(caches, SpanCaches):
        return caches.parts
    return () if caches is None else (caches,)


def with_room(end: int, step: int = STEP) -> int:
    """Positions to make room for: a long cache grows in larger steps, so that it is copied a few times only."""
    return -(-(end + end // 8) // step) * step


def _capacity(end: int, limit: int | None, device: torch.device) -> int:
    """Positions of a buffer that has to hold `end`: up to the limit never more than that, in whole blocks."""
    capacity = with_room(end, STEP if device.type == "cpu" else GPU_STEP)
    return capacity if limit is None or end > limit else min(capacity, -(-limit // TOKENS) * TOKENS)


def _int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """[B, heads, T, head_dim] -> int8 codes and scales [B, heads, T], as csrc/layer.cpp makes them."""
    top = x.abs().amax(-1)
    inverse = torch.where(top < 1e-30, 0, 127 / top)  # the inverse of less may be infinite
    return (x * inverse[..., None]).round().nan_to_num(0).to(torch.int8), top / 127


def stored_forms(
    config: Glm4Config, kv: KVType, dtype: torch.dtype, tokens: int
) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and types of what `stored` gives of one layer, whatever the layout it has in memory.

    Keys and values [2, kv_heads, tokens, head_dim] in `dtype`, or as int8 codes with scales [2, kv_heads, tokens].
    """
    heads = (2, config.num_key_value_heads, tokens)
    if kv == "int8":
        return [((*heads, config.head_dim), torch.int8), (heads, torch.float32)]
    return [((*heads, config.head_dim), dtype)]


def bytes_per_token(config: Glm4Config, kv: KVType, float_bytes: int) -> int:
    """What one token adds to a model's cache; `float_bytes` is the size of the activations' type."""
    heads = 2 * config.num_hidden_layers * config.num_key_value_heads
    return heads * (config.head_dim + 4 if kv == "int8" else config.head_dim * float_bytes)


class PastKeyValues(Protocol):
    """A cache that forward takes and gives back: KVCache, or DynamicCache of Transformers."""

    def get_seq_length(self) -> int: ...


class KVCache:
    """The `past_key_values` of a model: comes back from forward, can be passed in again.

    Keys and values of each layer, [B, kv_heads, tokens, head_dim], in the layout of the code that reads them. For the
    next tokens of the same sequences only: what is passed in is extended in place, and `truncate` takes tokens back.
    `layer_cache` makes one layer's part; `Glm4Model.new_cache` chooses the ones that suit the layers.
    `dynamic` is Transformers' DynamicCache where the keys and values are kept in one.
    """

    def __init__(self, num_layers: int, layer_cache: Callable[[], LayerCache | PackedLayerCache] = LayerCache) -> None:
        self.layers = [layer_cache() for _ in range(num_layers)]
        self.dynamic: Any = None

    @classmethod
    def of(cls, layers: list[LayerCache | PackedLayerCache]) -> KVCache:
        """Of parts that need not be of one kind."""
        cache = cls(0)
        cache.layers = layers
        return cache

    @classmethod
    def over(cls, dynamic: Any, num_layers: int) -> KVCache:
        """That reads and writes a DynamicCache of Transformers."""
        cache = cls.of([DynamicLayerCache(dynamic, layer) for layer in range(num_layers)])
        cache.dynamic = dynamic
        return cache

    def __len__(self) -> int:
        """Layers, as Transformers counts a cache."""
        return len(self.layers)

    def get_seq_length(self, layer_idx: int | None = None) -> int:
        """Positions held by every layer (a forward stopped half-way leaves some layers longer), or by one."""
        if layer_idx is not None:
            return self.layers[layer_idx].length
        return min(layer.length for layer in self.layers)

    @property
    def batch(self) -> int | None:
        """Sequences it holds; None while it is empty."""
        first = self.layers[0]
        if not first.length:
            return None
        past = first.past() if first.buffer is None else (first.buffer, first.buffer)
        return None if past is None else past[0].shape[0]

    def crop(self, max_length: int) -> None:
        """Transformers' name: keeps so many positions, or with a negative number forgets so many of the last."""
        self.truncate(max_length if max_length >= 0 else max(self.get_seq_length() + max_length, 0))

    def reserve(self, tokens: int) -> None:
        """Room for so many more positions in every layer, where that may run out (`glm4lite.runtime.kv_pool`)."""

    def truncate(self, length: int) -> None:
        """Forgets everything after the first `length` positions."""
        for layer in self.layers:
            layer.length = min(layer.length, length)

    def copy(self, length: int) -> KVCache:
        """Another cache with the first `length` positions of this one."""
        made = KVCache(0)
        made.layers = [layer.copy(length) for layer in self.layers]
        return made

    @property
    def nbytes(self) -> int:
        """Bytes held, room to grow included."""
        return sum(layer.nbytes for layer in self.layers)


def as_cache(
    given: PastKeyValues | Sequence[tuple[Tensor, Tensor]], new_cache: Callable[[], KVCache], config: Glm4Config
) -> KVCache:
    """What a script may pass as past_key_values, as a KVCache of the model. Raises ValueError for anything else."""
    num_layers = config.num_hidden_layers
    if isinstance(given, KVCache):
        cache = given
    elif isinstance(given, list | tuple):
        cache = new_cache()
        if len(given) == num_layers:
            for number, (layer, pair) in enumerate(zip(cache.layers, given, strict=True)):
                layer.append(*_checked(number, pair, config))
    elif _grows(given):
        return KVCache.over(given, num_layers)
    else:
        name = type(given).__name__
        raise ValueError(
            f"past_key_values must be a KVCache, a DynamicCache or (key, value) pairs, found {name}; "
            "leave it out, or give DynamicCache()"
        )
    layers = len(given)
    if layers != num_layers:
        raise ValueError(f"past_key_values has {layers} layers, the model {num_layers}")
    return cache


def _checked(layer: int, pair: Any, config: Glm4Config) -> tuple[Tensor, Tensor]:
    """The keys and values of a layer, which must be [B, kv heads, S, head_dim] both."""
    given = list(pair)[:2] if isinstance(pair, list | tuple) else []
    if len(given) != 2 or not all(isinstance(part, Tensor) and part.is_floating_point() for part in given):
        raise ValueError(f"past_key_values must hold a pair of float tensors a layer; layer {layer} has none")
    keys, values = given
    heads, head_dim = config.num_key_value_heads, config.head_dim
    if keys.dim() != 4 or keys.shape != values.shape or (keys.shape[1], keys.shape[3]) != (heads, head_dim):
        found = f"{list(keys.shape)} and {list(values.shape)}"
        raise ValueError(f"past_key_values: keys and values are [batch, {heads}, tokens, {head_dim}], found {found}")
    return keys, values


def _grows(value: object) -> bool:
    """Whether it is Transformers' DynamicCache with plain layers, in memory: others have limits and masks."""
    known = any(base.__name__ == "DynamicCache" for base in type(value).__mro__)
    layers = getattr(value, "layers", ())
    return (
        known
        and all(type(layer).__name__ == "DynamicLayer" for layer in layers)
        and not getattr(value, "offloading", False)
    )
