"""Which blocks of a KV pool are whose: how many tables hold each, and the table of a sequence."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from glm4lite_quant.kernels.decoder import BLOCK


class BlockMemory(Protocol):
    """The blocks of one layer."""

    @property
    def block_bytes(self) -> int: ...

    def copy_block(self, source: int, target: int) -> None: ...


class PoolFull(Exception):
    """A sequence needs more blocks than are free: the others' have to be given back first. Nothing has changed."""

    def __init__(self, needed: int, free: int) -> None:
        super().__init__(f"{needed} more blocks of the KV pool are needed, {free} are free")
        self.needed, self.free = needed, free


class Blocks:
    """How many tables hold each block of a pool, and the memory in which they lie."""

    def __init__(self, count: int, memory: Sequence[BlockMemory]) -> None:
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
        return sum(memory.block_bytes for memory in self._memory)

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


class BlockTable:
    """The blocks of one sequence, in order, for all of its layers. They are given back when nobody holds it."""

    def __init__(self, blocks: Blocks) -> None:
        self.blocks, self._held = blocks, list[int]()
        self._copies: dict[torch.device, Tensor] = {}
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

    def on(self, device: torch.device) -> Tensor:
        """The numbers as int64 on a device. A copy is kept there: a GPU would be waited for at each."""
        if device.type == "cpu":
            return self.numbers.long()
        if device not in self._copies:
            self._copies[device] = self.numbers.to(device, torch.long)
        return self._copies[device]

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
            self._copies.clear()
            self._numbers[at] = own  # first, so that Ctrl-C leaves no number that is not ours to write to
            self._held[at] = own
            self.blocks.give_back([shared])
        self._add(taken)

    def cut(self, length: int) -> None:
        """Gives back what lies behind the first `length` positions."""
        kept = blocks_of(length)
        self._copies.clear()
        surplus, self._held = self._held[kept:], self._held[:kept]
        self.blocks.give_back(surplus)

    def copy(self, length: int) -> BlockTable:
        """Another one of the first `length` positions: whole blocks are shared, what is left is copied."""
        whole, made = length // BLOCK, BlockTable(self.blocks)
        rest = self.blocks.take(blocks_of(length) - whole)
        for number in rest:
            self.blocks.copy(self._held[whole], number)
        self.blocks.share(self._held[:whole])
        made._add([*self._held[:whole], *rest])
        return made

    def _add(self, numbers: list[int]) -> None:
        begin = len(self._held)
        self._copies.clear()
        self._numbers[begin : begin + len(numbers)] = torch.tensor(numbers, dtype=torch.int32)
        self._held += numbers  # last, for Ctrl-C may come between: no number that nobody wrote is read


def blocks_of(tokens: int) -> int:
    """Blocks that hold so many tokens."""
    return -(-tokens // BLOCK)
