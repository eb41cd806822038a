"""PrefixPool: what was computed for the last conversations, so that a next prompt of any of them pays for its end only.

A server keeps no sessions: each request brings its whole history. The pool finds the conversation it belongs to by its
token ids. Conversations that share only a beginning (a system prompt, the declared tools) get a copy of that, which
takes milliseconds where computing it takes seconds or minutes.

All kept caches and those in use hold no more memory than the cache of one whole context, which is what a model's
placement has set aside; the conversation that was used longest ago goes first.
"""

from __future__ import annotations

from copy import copy
from typing import TYPE_CHECKING, Protocol

from glm4lite.model.cache import GPU_STEP, STEP, with_room

if TYPE_CHECKING:
    from glm4lite.model.causal_lm import CausalLM

MOST = 16  # conversations kept, however short
COPIED = 0.5  # a conversation that would lose more than this part of itself is kept, and its beginning copied


class PrefixCache:
    """A KVCache and the ids it was computed from, so that the next prompt only pays for what is new."""

    def __init__(self, model: CausalLM) -> None:
        self.kv = model.new_cache()
        self.ids: list[int] = []

    def common_prefix(self, ids: list[int]) -> int:
        """Length of the longest common prefix with `ids` (short of its last id, which must be computed)."""
        length, limit = 0, min(len(self.ids), len(ids) - 1)
        while length < limit and self.ids[length] == ids[length]:
            length += 1
        return length

    def keep_common_prefix(self, ids: list[int]) -> int:
        """Cuts back to the longest common prefix with `ids`."""
        length = self.common_prefix(ids)
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

    def settle(self) -> None:
        """After a forward pass that was stopped half-way, or of guesses: keep what every layer has and `ids` names."""
        self.cut(min(self.kv.get_seq_length(), len(self.ids)))


class Disk(Protocol):
    """Where prefixes outlive the pool and the process: `glm4lite.engine.kept_prefixes`."""

    def extend(self, cache: PrefixCache, ids: list[int]) -> None:
        """Cuts a cache back to what it has of `ids`, and appends what the disk has beyond that."""

    def rests(self, cache: PrefixCache) -> None:
        """The cache stays as it is until it leaves."""

    def leaves(self, cache: PrefixCache) -> None:
        """The cache is used again, or given up."""

    def close(self) -> None:
        """Writes what rests, and holds no cache any more."""


class PrefixPool:
    """The kept prefixes of one model, oldest first. For the thread that computes with the model, like the model."""

    def __init__(self, model: CausalLM, memory: int | None = None, disk: Disk | None = None) -> None:
        """`memory`: bytes of all caches, those in use included; None: what one full context takes."""
        self.model, self._memory, self.disk = model, memory, disk
        self._kept: list[PrefixCache] = []

    def take(self, ids: list[int], in_use: int = 0) -> PrefixCache:
        """The cache that has most of `ids`. It is the caller's until it is given back; dropping it is no harm.

        `in_use`: bytes of other caches that are in use.
        """
        cache = self._take(ids, in_use)
        if self.disk is not None:
            self.disk.extend(cache, ids)
        return cache

    def _take(self, ids: list[int], in_use: int) -> PrefixCache:
        best = max(self._kept, key=lambda cache: cache.common_prefix(ids), default=None)
        shared, needed = best.common_prefix(ids) if best else 0, in_use + self.bytes_of(len(ids))
        if best is None or not shared:
            self.make_room(needed)
            return PrefixCache(self.model)
        self._kept.remove(best)
        if self.disk is not None:
            self.disk.leaves(best)
        if shared < COPIED * len(best.ids) and best.kv.nbytes + needed <= self.memory:
            self.make_room(best.kv.nbytes + needed)
            self._keep(best)
            return best.copy(shared)
        self.make_room(needed)
        return best

    def give(self, cache: PrefixCache) -> None:
        """Keeps what an answer left behind."""
        if cache.ids and all(cache is not kept for kept in self._kept):
            self._keep(cache)
        while len(self._kept) > MOST:
            self._forget_oldest()
        self.make_room(0)

    def make_room(self, nbytes: int) -> None:
        """Forgets the oldest until `nbytes`, those of the caches in use, fit too."""
        while self._kept and self.nbytes + nbytes > self.memory:
            self._forget_oldest()

    def close(self) -> None:
        """The model goes: what is to outlive it is written."""
        if self.disk is not None:
            self.disk.close()

    def _keep(self, cache: PrefixCache) -> None:
        self._kept.append(cache)
        if self.disk is not None:
            self.disk.rests(cache)

    def _forget_oldest(self) -> None:
        cache = self._kept.pop(0)
        if self.disk is not None:
            self.disk.leaves(cache)

    @property
    def nbytes(self) -> int:
        """Bytes held by the kept caches."""
        return sum(cache.kv.nbytes for cache in tuple(self._kept))

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def memory(self) -> int:
        """Bytes that all caches may hold together."""
        return self.bytes_of(self.model.context) if self._memory is None else self._memory

    def bytes_of(self, tokens: int) -> int:
        """What the cache of so many tokens takes, its room to grow included."""
        trunk = self.model.model
        step = STEP if trunk.norm.weight.device.type == "cpu" else GPU_STEP
        return trunk.cache_bytes * min(with_room(tokens, step), self.model.context)
