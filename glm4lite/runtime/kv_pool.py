"""KVPool: one memory for the keys and values of many sequences, in blocks that those which begin alike share.

pool = KVPool(model, tokens=8192)
cache = pool.new()                      # a KVCache of one sequence
model.step([Span(ids, cache)])
other = cache.copy(1000)                # shares its whole blocks, and gets its own where it writes

A cache that grows by itself is copied each time, and two that share a beginning hold it twice. Here each layer has one
allocation, and a sequence a table of block numbers, which serves all layers (PagedAttention, arXiv 2309.06180). A block
is 64 tokens, a tile of the native attention, so that finding one costs a look-up a tile; a sequence wastes 32 tokens of
room on the average, and a beginning is shared but for its last 63.

Layers that keep their cache on a GPU, or in another type than the native code reads, have ordinary ones.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from glm4lite.model.cache import HomeCache, KVCache, PackedLayerCache
from glm4lite_quant.kernels.decoder import BLOCK, TOKENS, CacheView, Heads

if TYPE_CHECKING:
    from glm4lite.model.causal_lm import CausalLM


class PoolFull(Exception):
    """A sequence needs more blocks than are free: the others' have to be given back first. Nothing has changed."""

    def __init__(self, needed: int, free: int) -> None:
        super().__init__(f"{needed} more blocks of the KV pool are needed, {free} are free")
        self.needed, self.free = needed, free


class KVPool:
    """A fixed number of blocks. Its memory is the system's until a block is used for the first time.

    For the thread that computes with the model; caches may be dropped in any.
    """

    def __init__(self, model: CausalLM, tokens: int) -> None:
        """`tokens`: of all sequences together, those that share blocks counted once; in whole blocks."""
        self._model, count = model, blocks_of(tokens)
        self._memory = [
            _LayerMemory.of(count, layer.self_attn.heads, own.int8)
            if isinstance(own, PackedLayerCache) and layer.device.type == "cpu"
            else None
            for layer, own in zip(model.model.layers, model.new_cache().layers, strict=True)
        ]
        self._blocks = _Blocks(count, [memory for memory in self._memory if memory is not None])

    def new(self) -> PoolCache:
        """An empty cache of one sequence."""
        table = _Table(self._blocks)
        layers = [
            own if memory is None else PooledLayerCache(memory, table, 0)
            for memory, own in zip(self._memory, self._model.new_cache().layers, strict=True)
        ]
        return PoolCache(layers, table)

    @property
    def blocks(self) -> int:
        return self._blocks.count

    @classmethod
    def of_whole(cls, model: CausalLM, tokens: int) -> KVPool | None:
        """One for a model all of whose layers it serves; None for others."""
        if not all(isinstance(own, PackedLayerCache) for own in model.new_cache().layers):
            return None
        return cls(model, tokens) if all(layer.device.type == "cpu" for layer in model.model.layers) else None

    @property
    def free(self) -> int:
        """Blocks that no sequence holds."""
        return self._blocks.free

    @property
    def block_bytes(self) -> int:
        """What a block takes, in all layers that have it."""
        return self._blocks.nbytes


class PoolCache(KVCache):
    """A KVCache of one sequence whose blocks are a pool's. Dropping it gives them back."""

    def __init__(self, layers: list[HomeCache], table: _Table) -> None:
        super().__init__(0)
        self.layers, self._table = layers, table

    @property
    def batch(self) -> int | None:
        return 1 if self.layers[0].length else None

    @property
    def blocks(self) -> Sequence[int]:
        """The numbers of its blocks."""
        return self._table.held

    def reserve(self, tokens: int) -> None:
        """Takes the blocks of so many more positions, and a copy of the one that others read where it goes on in one.

        Raises PoolFull, with nothing done.
        """
        length = self.get_seq_length()
        self._table.reserve(length, length + tokens)

    def truncate(self, length: int) -> None:
        """Forgets everything after the first `length` positions, and gives their blocks back."""
        super().truncate(length)
        self._table.cut(max(layer.length for layer in self.layers))

    def copy(self, length: int) -> PoolCache:
        """Another cache with the first `length` positions of this one: it shares whole blocks. Raises PoolFull."""
        length = min(length, self.get_seq_length())
        table = self._table.copy(length)
        layers = [
            layer.over(table, length) if isinstance(layer, PooledLayerCache) else layer.copy(length)
            for layer in self.layers
        ]
        return PoolCache(layers, table)

    @property
    def nbytes(self) -> int:
        """Bytes held: whole blocks, those it shares with others too (`KVPool.free` counts each once)."""
        ordinary = sum(layer.nbytes for layer in self.layers if not isinstance(layer, PooledLayerCache))
        return len(self._table) * self._table.blocks.nbytes + ordinary


class PooledLayerCache(PackedLayerCache):
    """One layer's part of a PoolCache."""

    def __init__(self, memory: _LayerMemory, table: _Table, length: int) -> None:
        super().__init__(memory.scales is not None)
        self._memory, self._table, self.length = memory, table, length

    @property
    def buffer(self) -> Tensor | None:
        return self._memory.values

    def view(self, tokens: int, heads: Heads, device: torch.device, dtype: torch.dtype) -> CacheView:
        self._table.reserve(self.length, self.length + tokens)
        keys, values, scales = self._memory
        key_scale, value_scale = (None, None) if scales is None else (scales[0], scales[1])
        return CacheView(keys, values, key_scale, value_scale, self.length, self._table.numbers)

    def copy(self, length: int) -> PooledLayerCache:
        """Over blocks of its own; the layers of a whole cache share theirs (`PoolCache.copy`)."""
        length = min(length, self.length)
        return self.over(self._table.copy(length), length)

    def over(self, table: _Table, length: int) -> PooledLayerCache:
        """The same layer of another sequence."""
        return PooledLayerCache(self._memory, table, length)

    @property
    def nbytes(self) -> int:
        return len(self._table) * self._memory.nbytes // len(self._memory.values)

    def _reserve(self, end: int, outer: tuple[int, int], head_dim: int, device: torch.device) -> None:
        if outer[0] != 1:
            raise ValueError(f"a pool's cache is of one sequence, not of {outer[0]}")
        self._table.reserve(self.length, end)

    def _write(self, which: int, at: Tensor, codes: Tensor, scales: Tensor | None) -> None:
        blocks, place = self._table.numbers[at // BLOCK].long(), at % BLOCK
        new = codes[0].transpose(0, 1)  # [T, kv_heads, head_dim]
        if which == 0:
            self._memory.keys[blocks, :, place // TOKENS, :, place % TOKENS] = new.to(self._memory.keys.dtype)
        else:
            self._memory.values[blocks, :, place] = new.to(self._memory.values.dtype)
        if scales is not None and self._memory.scales is not None:
            self._memory.scales[which][blocks, :, place] = scales[0].transpose(0, 1)

    def _codes(self, which: int, begin: int, end: int) -> tuple[Tensor, Tensor | None]:
        first = begin // BLOCK
        blocks = self._table.numbers[first : blocks_of(end)].long()
        part = slice(begin - first * BLOCK, end - first * BLOCK)
        keys, values, scales = self._memory
        codes = keys[blocks].transpose(3, 4).flatten(2, 3) if which == 0 else values[blocks]
        whole = codes.transpose(0, 1).flatten(1, 2)[None, :, part]
        return whole, None if scales is None else scales[which][blocks].transpose(0, 1).flatten(1)[None, :, part]

    def _read(self, which: int) -> Tensor:
        codes, scales = self._codes(which, 0, self.length)
        return codes.float() if scales is None else codes.float() * scales[..., None]


class _LayerMemory(NamedTuple):
    """Of one layer, as `CacheView` describes blocks; scales [keys or values, blocks, kv_heads, 64]."""

    keys: Tensor
    values: Tensor
    scales: Tensor | None

    @classmethod
    def of(cls, blocks: int, heads: Heads, int8: bool) -> _LayerMemory:
        dtype, kv_heads = torch.int8 if int8 else torch.float32, heads.key_value
        with torch.inference_mode(False):  # else a script could not go on under no_grad
            keys = torch.empty(blocks, kv_heads, BLOCK // TOKENS, heads.dim, TOKENS, dtype=dtype, device="cpu")
            values = torch.empty(blocks, kv_heads, BLOCK, heads.dim, dtype=dtype, device="cpu")
            return cls(keys, values, torch.empty(2, blocks, kv_heads, BLOCK, device="cpu") if int8 else None)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self if tensor is not None)

    def copy_block(self, source: int, target: int) -> None:
        self.keys[target], self.values[target] = self.keys[source], self.values[source]
        if self.scales is not None:
            self.scales[:, target] = self.scales[:, source]


class _Blocks:
    """How many tables hold each block of a pool, and the memory in which they lie."""

    def __init__(self, count: int, memory: list[_LayerMemory]) -> None:
        self.count, self._memory = count, memory
        self.users = [0] * count
        self._unused = list(range(count))[::-1]  # the last one given back is taken first: its pages are there
        self._lock = threading.RLock()  # the collector may drop a cache in the middle of anything

    @property
    def free(self) -> int:
        return len(self._unused)

    @property
    def nbytes(self) -> int:
        """Of one block."""
        return sum(memory.nbytes for memory in self._memory) // max(self.count, 1)

    def take(self, count: int) -> list[int]:
        """Blocks for one user each; all or none."""
        with self._lock:
            if count > len(self._unused):
                raise PoolFull(count, len(self._unused))
            taken = [self._unused.pop() for _ in range(count)]
            for number in taken:
                self.users[number] = 1
            return taken

    def share(self, numbers: list[int]) -> None:
        """They have one user more."""
        with self._lock:
            for number in numbers:
                self.users[number] += 1

    def give_back(self, numbers: list[int]) -> None:
        """They have one user less."""
        with self._lock:
            for number in numbers:
                self.users[number] -= 1
                if not self.users[number]:
                    self._unused.append(number)

    def copy(self, source: int, target: int) -> None:
        for memory in self._memory:
            memory.copy_block(source, target)


class _Table:
    """The blocks of one sequence, in order, for all of its layers. They are given back when nobody holds it."""

    def __init__(self, blocks: _Blocks) -> None:
        self.blocks, self._held = blocks, list[int]()
        with torch.inference_mode(False):
            self._numbers = torch.empty(blocks.count, dtype=torch.int32, device="cpu")  # never moved: kernels read it

    def __len__(self) -> int:
        return len(self._held)

    def __del__(self) -> None:
        self.blocks.give_back(self._held)

    @property
    def held(self) -> Sequence[int]:
        return self._held

    @property
    def numbers(self) -> Tensor:
        return self._numbers[: len(self._held)]

    def missing(self, end: int) -> int:
        return max(blocks_of(end) - len(self._held), 0)

    def held_by_others(self, length: int) -> bool:
        """Whether position `length` lies in a block that others hold too: it has to be copied before it is written."""
        at = length // BLOCK
        return at < len(self._held) and self.blocks.users[self._held[at]] > 1

    def reserve(self, length: int, end: int) -> None:
        """Blocks up to `end`, those from `length` on its own; PoolFull, with nothing done."""
        copied, missing = self.held_by_others(length), self.missing(end)
        if not copied and not missing:
            return
        taken = self.blocks.take(missing + copied)
        if copied:
            at, own = length // BLOCK, taken.pop()
            shared = self._held[at]
            self.blocks.copy(shared, own)
            self._numbers[at] = own  # first, so that Ctrl-C leaves no number that is not ours to write to
            self._held[at] = own
            self.blocks.give_back([shared])
        self._add(taken)

    def cut(self, length: int) -> None:
        """Gives back what lies behind the first `length` positions."""
        kept = blocks_of(length)
        surplus, self._held = self._held[kept:], self._held[:kept]
        self.blocks.give_back(surplus)

    def copy(self, length: int) -> _Table:
        """Another one of the first `length` positions: whole blocks are shared, what is left is copied."""
        whole, made = length // BLOCK, _Table(self.blocks)
        rest = self.blocks.take(blocks_of(length) - whole)
        for number in rest:
            self.blocks.copy(self._held[whole], number)
        self.blocks.share(self._held[:whole])
        made._add([*self._held[:whole], *rest])
        return made

    def _add(self, numbers: list[int]) -> None:
        begin = len(self._held)
        self._numbers[begin : begin + len(numbers)] = torch.tensor(numbers, dtype=torch.int32)
        self._held += numbers  # last, for Ctrl-C may come between: no number that nobody wrote is read


def blocks_of(tokens: int) -> int:
    """Blocks that hold so many tokens."""
    return -(-tokens // BLOCK)
