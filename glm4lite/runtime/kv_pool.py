"""KVPool: one memory for the keys and values of many sequences, in blocks that those which begin alike share.

pool = KVPool(model, tokens=8192)
cache = pool.new()                      # a KVCache of one sequence
model.step([Span(ids, cache)])
other = cache.copy(1000)                # shares its whole blocks, and gets its own where it writes

A cache that grows by itself is copied each time, and two that share a beginning hold it twice. Here each layer has one
allocation, and a sequence a table of block numbers, which serves all layers (PagedAttention, arXiv 2309.06180). A block
is 64 tokens, a tile of the native attention, so that finding one costs a look-up a tile; a sequence wastes 32 tokens of
room on the average, and a beginning is shared but for its last 63.

The layers of a GPU have blocks in its memory, with the same numbers: there a block is one turn of the attention's loop.
Float keys lie there as values do, int8 ones in tiles of 16 tokens as on the CPU. Layers that neither the native code
nor a recorded graph computes have ordinary caches.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from glm4lite.base.errors import one_line
from glm4lite.model.cache import HomeCache, KVCache
from glm4lite.model.packed_cache import PackedLayerCache
from glm4lite.runtime import cuda_graph
from glm4lite.runtime.block_table import Blocks, BlockTable, blocks_of
from glm4lite_quant.kernels.decoder import BLOCK, TOKENS, CacheView, Heads

if TYPE_CHECKING:
    from glm4lite.model.causal_lm import CausalLM
    from glm4lite.model.layers import DecoderLayer

logger = logging.getLogger("glm4lite")


class KVPool:
    """A fixed number of blocks. RAM is the system's until a block is used for the first time; a GPU's is taken at once.

    For the thread that computes with the model; caches may be dropped in any.
    """

    def __init__(self, model: CausalLM, tokens: int) -> None:
        """`tokens`: of all sequences together, those that share blocks counted once; in whole blocks."""
        self._model, count = model, blocks_of(tokens)
        self._memory = [
            None if kind is None else _LayerMemory.of(count, layer.self_attn.heads, kind)
            for layer, kind in zip(model.model.layers, _kinds(model), strict=True)
        ]
        self._blocks = Blocks(count, [memory for memory in self._memory if memory is not None])

    def new(self) -> PoolCache:
        """An empty cache of one sequence."""
        table = BlockTable(self._blocks)
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
        """One for a model all of whose layers it serves; None for others, and where a GPU has no room for it."""
        if not serves(model):
            return None
        try:
            return cls(model, tokens)
        except torch.OutOfMemoryError as error:
            logger.warning(
                "a KV pool of %d tokens finds no room (%s): each answer gets a cache that grows, and several at once "
                "are slow; give a shorter context, or kv int8",
                tokens,
                one_line(error),
            )
            return None

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

    def __init__(self, layers: list[HomeCache], table: BlockTable) -> None:
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

    in_blocks = True

    def __init__(self, memory: _LayerMemory, table: BlockTable, length: int) -> None:
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

    def over(self, table: BlockTable, length: int) -> PooledLayerCache:
        """The same layer of another sequence."""
        return PooledLayerCache(self._memory, table, length)

    @property
    def nbytes(self) -> int:
        return len(self._table) * self._memory.block_bytes

    def _reserve(self, end: int, outer: tuple[int, int], head_dim: int, device: torch.device) -> None:
        if outer[0] != 1:
            raise ValueError(f"a pool's cache is of one sequence, not of {outer[0]}")
        self._table.reserve(self.length, end)

    def _write(self, which: int, codes: Tensor, scales: Tensor | None) -> None:
        memory, device = self._memory, self._memory.values.device
        at = torch.arange(self.length, self.length + codes.shape[2], device=device)
        blocks, place = self._table.on(device)[at // BLOCK], at % BLOCK
        new = codes[0].transpose(0, 1).to(memory.values)  # [T, kv_heads, head_dim]
        if which == 0 and memory.tiled:
            memory.keys[blocks, :, place // TOKENS, :, place % TOKENS] = new
        else:
            (memory.keys, memory.values)[which][blocks, :, place] = new
        if scales is not None and memory.scales is not None:
            memory.scales[which][blocks, :, place] = scales[0].transpose(0, 1).to(device)

    def _codes(self, which: int, begin: int, end: int) -> tuple[Tensor, Tensor | None]:
        memory, first = self._memory, begin // BLOCK
        blocks = self._table.on(memory.values.device)[first : blocks_of(end)]
        part = slice(begin - first * BLOCK, end - first * BLOCK)
        codes = memory.keys[blocks] if which == 0 else memory.values[blocks]
        if which == 0 and memory.tiled:
            codes = codes.transpose(3, 4).flatten(2, 3)
        whole, scales = codes.transpose(0, 1).flatten(1, 2)[None, :, part], memory.scales
        return whole, None if scales is None else scales[which][blocks].transpose(0, 1).flatten(1)[None, :, part]

    def _read(self, which: int) -> Tensor:
        """As a PackedLayerCache's, but a GPU's float cache in its own type."""
        codes, scales = self._codes(which, 0, self.length)
        return codes if scales is None else codes.float() * scales[..., None]


class _Kind(NamedTuple):
    """How a layer's keys and values lie in a pool."""

    device: torch.device
    dtype: torch.dtype
    tiled: bool
    """Keys in tiles of 16 tokens, as the native attention reads them, and the int8 caches of a GPU too."""

    @classmethod
    def of(cls, layer: DecoderLayer, own: HomeCache, dtype: torch.dtype) -> _Kind | None:
        """None where nothing reads blocks of the layer's: its caches are of their own. `dtype`: of its activations."""
        packed = isinstance(own, PackedLayerCache)
        int8 = isinstance(own, PackedLayerCache) and own.int8
        if cuda_graph.records(layer.device):
            kind = cls(layer.device, torch.int8 if int8 else dtype, int8)
            return None if cuda_graph.unfit((layer,), dtype) else kind
        native = packed and layer.device.type == "cpu"
        return cls(layer.device, torch.int8 if int8 else torch.float32, True) if native else None


class _LayerMemory(NamedTuple):
    """Of one layer, as `CacheView` describes blocks; scales [keys or values, blocks, kv_heads, 64]."""

    keys: Tensor
    values: Tensor
    scales: Tensor | None

    @classmethod
    def of(cls, blocks: int, heads: Heads, kind: _Kind) -> _LayerMemory:
        device, dtype, tiled = kind
        plain = (blocks, heads.key_value, BLOCK, heads.dim)
        tiles = (blocks, heads.key_value, BLOCK // TOKENS, heads.dim, TOKENS)
        with torch.inference_mode(False):  # else a script could not go on under no_grad
            keys = torch.empty(tiles if tiled else plain, dtype=dtype, device=device)
            values = torch.empty(plain, dtype=dtype, device=device)
            return cls(keys, values, torch.empty(2, *plain[:3], device=device) if dtype == torch.int8 else None)

    @property
    def tiled(self) -> bool:
        return self.keys.dim() == 5

    @property
    def block_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self if tensor is not None) // max(len(self.values), 1)

    def copy_block(self, source: int, target: int) -> None:
        self.keys[target], self.values[target] = self.keys[source], self.values[source]
        if self.scales is not None:
            self.scales[:, target] = self.scales[:, source]


def serves(model: CausalLM) -> bool:
    """Whether a pool has the keys and values of all layers."""
    return all(kind is not None for kind in _kinds(model))


def _kinds(model: CausalLM) -> list[_Kind | None]:
    return [
        _Kind.of(layer, own, layer.dtype or model.model.dtype)
        for layer, own in zip(model.model.layers, model.new_cache().layers, strict=True)
    ]
