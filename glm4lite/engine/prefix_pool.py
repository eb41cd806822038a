"""PrefixPool: what was computed for the last conversations, so that a next prompt of any of them pays for its end only.

A server keeps no sessions: each request brings its whole history. The pool finds the conversation it belongs to by its
token ids. Conversations that share only a beginning (a system prompt, the declared tools) get a copy of that, which
takes nothing (blocks are shared) or milliseconds where computing it takes seconds or minutes.

All kept caches and those in use hold no more memory than the cache of one whole context, which is what a model's
placement has set aside; the conversation that was used longest ago goes first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from copy import copy
from typing import TYPE_CHECKING, Protocol

from glm4lite.model.cache import KVCache
from glm4lite.model.layer_cache import GPU_STEP, STEP, with_room
from glm4lite.runtime.block_table import PoolFull, blocks_of
from glm4lite.runtime.kv_pool import KVPool, PoolCache
from glm4lite_quant.kernels.decoder import BLOCK

if TYPE_CHECKING:
    from glm4lite.model.causal_lm import CausalLM

MOST = 16  # conversations kept, however short
_SLICE = 256  # ids compared at once
COPIED = 0.5  # a conversation that would lose more than this part of itself is kept, and its beginning copied


class PrefixCache:
    """A KVCache and the ids it was computed from, so that the next prompt only pays for what is new.

    `adapter`: the one that computed it, of those that requests choose from; with another there is nothing in common.
    """

    def __init__(self, kv: KVCache, adapter: str | None = None) -> None:
        self.kv, self.adapter = kv, adapter
        self.ids: list[int] = []

    def common_prefix(self, ids: list[int], adapter: str | None) -> int:
        """Length of the longest common prefix with `ids` (short of its last id, which must be computed)."""
        length, limit = 0, min(len(self.ids), len(ids) - 1) if adapter == self.adapter else 0
        while length + _SLICE <= limit and self.ids[length : length + _SLICE] == ids[length : length + _SLICE]:
            length += _SLICE
        while length < limit and self.ids[length] == ids[length]:
            length += 1
        return length

    def keep_common_prefix(self, ids: list[int]) -> int:
        """Cuts back to the longest common prefix with `ids`."""
        length = self.common_prefix(ids, self.adapter)
        self.cut(length)
        return length

    def copy(self, length: int) -> PrefixCache:
        """Another one with the first `length` ids."""
        made = copy(self)
        made.kv, made.ids = self.kv.copy(length), self.ids[:length]
        return made

    def cut(self, length: int) -> None:
        """Keeps the first `length` ids."""
        self.kv.truncate(length)
        del self.ids[length:]

    def settle(self, most: int | None = None) -> None:
        """After a forward pass that was stopped half-way, or of guesses: keep what every layer has and `ids` names.

        `most`: of the ids, that are kept at all.
        """
        held = min(self.kv.get_seq_length(), len(self.ids))
        self.cut(held if most is None else min(held, most))


class Disk(Protocol):
    """Where prefixes outlive the pool and the process: `glm4lite.engine.kept_prefixes`."""

    def extend(self, cache: PrefixCache, ids: list[int], reserve: Callable[[int], bool]) -> None:
        """Cuts a cache back to what it has of `ids`, and appends what the disk has beyond that.

        `reserve`: makes room for so many ids in all; whether there is.
        """

    def rests(self, cache: PrefixCache) -> None:
        """The cache stays as it is until it leaves."""

    def leaves(self, cache: PrefixCache) -> None:
        """The cache is used again, or given up."""

    def close(self) -> None:
        """Writes what rests, and holds no cache any more."""


InUse = Sequence[tuple[PrefixCache, int]]
"""Caches that are in use, each with the ids that it is to hold next."""


class PrefixPool:
    """The kept prefixes of one model, oldest first. For the thread that computes with the model, like the model."""

    def __init__(self, model: CausalLM, memory: int | None = None, disk: Disk | None = None) -> None:
        """`memory`: bytes of all caches, those in use included; None: what one full context takes."""
        self.model, self._memory, self.disk = model, memory, disk
        self._kept: list[PrefixCache] = []
        tokens = model.context if memory is None else memory // model.model.cache_bytes
        self.blocks = KVPool.of_whole(model, tokens)

    def take(self, ids: list[int], in_use: InUse = (), adapter: str | None = None) -> PrefixCache:
        """The cache that has most of `ids`, computed with that adapter.

        It is the caller's until it is given back; dropping it is no harm."""
        best = max(self._kept, key=lambda cache: cache.common_prefix(ids, adapter), default=None)
        shared = best.common_prefix(ids, adapter) if best else 0
        if best is None or not shared:
            return self._new(adapter)
        if shared < COPIED * len(best.ids):
            copied = self.copied(best, shared, in_use)
            if copied is not None:
                return copied
        self._withdraw(best)
        return best

    def extend(self, cache: PrefixCache, ids: list[int], in_use: InUse = ()) -> None:
        """Cuts a cache that was taken back to what it has of `ids`, and appends what the disk has beyond that.

        `in_use`: the caches beside it. It may take a second.
        """
        if self.disk is not None:
            self.disk.extend(cache, ids, lambda held: self.reserve([*in_use, (cache, held)]))

    def copied(self, cache: PrefixCache, length: int, in_use: InUse = ()) -> PrefixCache | None:
        """The first `length` ids of a cache that stays as it is; None where there is no memory for that."""
        others = [kept for kept in self._kept if kept is not cache]
        while True:
            if self.blocks is not None or self.nbytes + self._wanted(in_use) + self.bytes_of(length) <= self.memory:
                try:
                    return cache.copy(length)
                except PoolFull:
                    pass
            if not others:
                return None
            self._forget(others.pop(0))

    def give(self, cache: PrefixCache) -> None:
        """Keeps what an answer left behind."""
        if cache.ids and all(cache is not kept for kept in self._kept):
            self._kept.append(cache)
            if self.disk is not None:
                self.disk.rests(cache)
        while len(self._kept) > MOST:
            self._forget(self._kept[0])
        self.reserve(())

    def drop(self, cache: PrefixCache) -> None:
        """Gives back the blocks of one that is not kept, whoever still refers to it: the traceback of an error, say."""
        cache.kv.truncate(0)
        cache.ids.clear()

    def reserve(self, in_use: InUse) -> bool:
        """Room for what the caches are to hold next, for which the oldest are forgotten; whether there is."""
        if self.blocks is None:
            wanted = self._wanted(in_use)
            while self._kept and self.nbytes + wanted > self.memory:
                self._forget(self._kept[0])
            return wanted <= self.memory
        return all(self._reserved(cache, ids) for cache, ids in in_use)

    def fits(self, ids: list[int], more: int, in_use: InUse, adapter: str | None = None) -> bool:
        """Whether there is room for these ids and some more beside the caches in use, if nothing is kept."""
        if self.blocks is None:
            return self._wanted(in_use) + self.bytes_of(len(ids) + more) <= self.memory
        shared = max((cache.common_prefix(ids, adapter) for cache, _ in in_use), default=0)
        wanted = blocks_of(self._bounded(len(ids) + more)) - shared // BLOCK
        for cache, held in in_use:
            wanted += max(0, blocks_of(self._bounded(held)) - len(_blocks(cache)))
        return len(self._held(cache for cache, _ in in_use)) + wanted <= self.blocks.blocks

    def close(self) -> None:
        """The model goes: what is to outlive it is written."""
        if self.disk is not None:
            self.disk.close()

    def _withdraw(self, cache: PrefixCache) -> None:
        self._kept.remove(cache)
        if self.disk is not None:
            self.disk.leaves(cache)

    @property
    def nbytes(self) -> int:
        """Bytes held by the kept caches."""
        kept = tuple(self._kept)
        if self.blocks is None:
            return sum(cache.kv.nbytes for cache in kept)
        return len(self._held(kept)) * self.blocks.block_bytes

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def memory(self) -> int:
        """Bytes that all caches may hold together."""
        if self.blocks is not None:
            return self.blocks.blocks * self.blocks.block_bytes
        return self.bytes_of(self.model.context) if self._memory is None else self._memory

    def bytes_of(self, tokens: int) -> int:
        """What the cache of so many tokens takes, its room to grow included."""
        if self.blocks is not None:
            return blocks_of(tokens) * self.blocks.block_bytes
        trunk = self.model.model
        step = STEP if trunk.norm.weight.device.type == "cpu" else GPU_STEP
        return trunk.cache_bytes * min(with_room(tokens, step), self.model.context)

    def _forget(self, kept: PrefixCache) -> None:
        self._withdraw(kept)
        self.drop(kept)

    def _new(self, adapter: str | None) -> PrefixCache:
        return PrefixCache(self.model.new_cache() if self.blocks is None else self.blocks.new(), adapter)

    def _reserved(self, cache: PrefixCache, ids: int) -> bool:
        while True:
            try:
                cache.kv.reserve(self._bounded(ids) - cache.kv.get_seq_length())
            except PoolFull:
                if not self._kept:
                    return False
                self._forget(self._kept[0])
            else:
                return True

    def _bounded(self, ids: int) -> int:
        """A guess may be looked for beyond the context's end, but is not computed there."""
        return min(ids, self.model.context)

    def _wanted(self, in_use: InUse) -> int:
        """Bytes of caches that are in use, where each has its own."""
        return sum(max(cache.kv.nbytes, self.bytes_of(ids)) for cache, ids in in_use)

    def _held(self, caches: Iterable[PrefixCache]) -> set[int]:
        return {number for cache in caches for number in _blocks(cache)}


def _blocks(cache: PrefixCache) -> Sequence[int]:
    return cache.kv.blocks if isinstance(cache.kv, PoolCache) else ()
