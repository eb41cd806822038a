"""StepRows: which rows a recorded step has, in memory that its kernels read, so that one recording serves all steps.

A graph's launches are frozen; what changes from step to step (who is in it, how long each sequence is, where its blocks
lie) is one array of int32 on the GPU. vLLM and SGLang keep an array a purpose and a table with a row for each request,
which are brought up to date; here all of it is written anew and sent in one copy, as long as the tables in use are
(1 KB for 16 sequences of 1,000 tokens, 130 KB for 16 of 128,000), so that nothing in it can be stale.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from glm4lite_quant.kernels.decoder import BLOCK, Heads

PLANES = 4
TILE_QUERIES = 64  # of one product: rows of one sequence share what they read up to here


def tile_rows(heads: Heads) -> int:
    """Rows of one sequence that read its keys and values together, where it has several."""
    return max(1, TILE_QUERIES // (heads.query // heads.key_value))


class SequenceRows(NamedTuple):
    """One sequence's `rows`, new ones behind `length` tokens, in the blocks of `table` (int32, on the CPU)."""

    length: int
    rows: int
    table: Tensor


class StepRows:
    """Up to `size` rows, of which any number may be padding.

    `memory` is int32: [size] positions, -1 for padding; [size] where in `memory` each row's block table begins; [size]
    first rows of tiles and [size] numbers of rows in them, 0 where there is none; then the tables. A tile is up to
    `tile` rows of one sequence, which read its keys and values together.
    """

    def __init__(self, size: int, blocks: int, tile: int, device: torch.device) -> None:
        """`blocks`: most that a sequence may have."""
        self.size, self.blocks, self.tile = size, blocks, tile
        self.memory = torch.full((size * (PLANES + blocks),), -1, dtype=torch.int32, device=device)
        self.set(())

    def set(self, sequences: Sequence[SequenceRows]) -> int:
        """The rows of the next step, one sequence behind the other; how many they are.

        Raises ValueError where there are more than `size`, or a table is shorter than its sequence, or too long.
        """
        positions, places, firsts, counts = list[int](), list[int](), list[int](), list[int]()
        tables, place = list[Tensor](), PLANES * self.size
        for length, count, table in sequences:
            needed = -(-(length + count) // BLOCK)
            if not count > 0 or not needed <= min(len(table), self.blocks):
                raise ValueError(f"{count} rows behind {length} tokens do not fit {len(table)} blocks")
            begin = len(positions)
            positions += range(length, length + count)
            places += [place] * count
            firsts += range(begin, begin + count, self.tile)
            counts += [min(self.tile, begin + count - first) for first in range(begin, begin + count, self.tile)]
            tables.append(table[:needed])
            place += needed
        if len(positions) > self.size:
            raise ValueError(f"{len(positions)} rows do not fit a step of {self.size}")
        planes = ((positions, -1), (places, 0), (firsts, 0), (counts, 0))
        padded = chain.from_iterable([*plane, *[none] * (self.size - len(plane))] for plane, none in planes)
        whole = torch.cat((torch.tensor(list(padded), dtype=torch.int32), *tables))
        self.memory[: len(whole)].copy_(whole)
        return len(positions)
