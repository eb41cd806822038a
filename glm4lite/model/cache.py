"""KVCache: keys and values of every layer, cut back to keep a common prefix; and what else may stand in its place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from glm4lite.model.layer_cache import DynamicLayerCache, LayerCache
from glm4lite.model.packed_cache import PackedLayerCache

if TYPE_CHECKING:
    from glm4lite.model.config import Glm4Config


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
