"""Change: what adapters make of one weight of the model, row by row or as a low-rank path beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from glm4lite.checkpoint.lora.factors import Factors, values
from glm4lite.model.lora import LowRank

_BLOCK_ROWS = 1024  # of a weight that is decoded to find its rows' norms


@dataclass(frozen=True)
class Piece:
    """`count` rows of an adapter's module from `first` on, which are the weight's from `at` on; `strength` times."""

    factors: Factors
    first: int
    count: int
    at: int
    strength: float


class _Values(NamedTuple):
    """A piece's, in memory: a [r, K], b [count, r] times the adapter's own scale."""

    piece: Piece
    a: Tensor
    b: Tensor
    magnitude: Tensor | None
    bias: Tensor | None


class Change:
    """The pieces of all adapters that change one weight [n, K] together: the sum of what each would change alone."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        """Reads them. CheckpointError where values are none."""
        self._pieces = [_read(piece) for piece in pieces]

    def applied(self, rows: Tensor, start: int) -> Tensor:
        """Rows of the weight from `start` on, float32 [m, K] -> float32."""
        out = rows.clone()
        for piece, a, b, magnitude, _ in self._pieces:
            begin, end = max(start, piece.at), min(start + len(rows), piece.at + piece.count)
            if begin >= end:
                continue
            own, here = slice(begin - piece.at, end - piece.at), slice(begin - start, end - start)
            change = b[own] @ a
            if magnitude is not None:
                changed = rows[here] + change
                change = changed * (magnitude[own] / _norms(changed))[:, None] - rows[here]
            out[here] += piece.strength * change
        return out

    def biased(self, bias: Tensor) -> Tensor:
        """The linear's own bias [n], float32 -> with what the adapters add."""
        out = bias.clone()
        for piece, _, _, _, own in self._pieces:
            if own is not None:
                out[piece.at : piece.at + piece.count] += piece.strength * own
        return out

    def beside(self, rows: Callable[[int, int], Tensor], n: int, columns: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """a [r, K], b [n, r] and gain [n] of the path beside a weight [n, K].

        rows: begin..end-1 of that, float32; read where an adapter is DoRA, for its norms.
        """
        a = torch.cat([one.a for one in self._pieces] or [torch.zeros(0, columns)])
        b, gain, at = torch.zeros(n, len(a)), None, 0
        for piece, low, high, magnitude, _ in self._pieces:
            here, factor = slice(piece.at, piece.at + piece.count), torch.full((piece.count,), piece.strength)
            if magnitude is not None:
                of_rows = magnitude / _changed_norms(rows, low, high, piece)
                gain = torch.ones(n) if gain is None else gain
                gain[here] += piece.strength * (of_rows - 1)
                factor = factor * of_rows
            b[here, at : at + len(low)] = high * factor[:, None]
            at += len(low)
        return a, b, gain


@dataclass(frozen=True)
class Branch:
    """A low-rank path beside a weight: its change by some pieces, and the biases of some, which may be others."""

    weights: tuple[Piece, ...]
    biases: tuple[Piece, ...]

    def nbytes(self, n: int) -> int:
        vectors = bool(self.biases) or any(piece.factors.magnitude is not None for piece in self.weights)
        return sum(4 * piece.factors.rank * (piece.factors.shape[1] + n) for piece in self.weights) + 8 * n * vectors

    def made(self, rows: Callable[[int, int], Tensor], n: int, columns: int, bias: Tensor | None) -> LowRank | None:
        """Beside a weight [n, K] whose linear has the bias [n], or none. CheckpointError where values are none."""
        if not self.weights and not self.biases:
            return None
        a, b, gain = Change(self.weights).beside(rows, n, columns)
        added = Change(self.biases).biased(torch.zeros(n)) if self.biases else None
        if gain is not None and bias is not None:  # what the linear gives has its bias, which a gain leaves alone
            added = (torch.zeros(n) if added is None else added) + (1 - gain) * bias
        return LowRank(a, b, gain, added)


def _read(piece: Piece) -> _Values:
    factors, rows = piece.factors, slice(piece.first, piece.first + piece.count)
    a, b = values(factors.a), values(factors.b)
    if factors.transposed:
        a, b = a.T, b.T
    vectors = [None if one is None else values(one).flatten()[rows] for one in (factors.magnitude, factors.bias)]
    bias = None if vectors[1] is None else vectors[1] * factors.scale
    return _Values(piece, a.contiguous(), b[rows] * factors.scale, vectors[0], bias)


def _norms(rows: Tensor) -> Tensor:
    """Of a row of zeros 1: nothing can be scaled there."""
    norms = rows.norm(dim=1)
    return torch.where(norms == 0, 1.0, norms)


def _changed_norms(weight: Callable[[int, int], Tensor], a: Tensor, b: Tensor, piece: Piece) -> Tensor:
    found = []
    for begin in range(0, piece.count, _BLOCK_ROWS):
        end = min(begin + _BLOCK_ROWS, piece.count)
        found.append(_norms(weight(piece.at + begin, piece.at + end) + b[begin:end] @ a))
    return torch.cat(found)
