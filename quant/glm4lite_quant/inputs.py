"""What calibration tells of the inputs of a weight: how much a column counts, and which columns go together.

    inputs = Inputs.of(rows)                      # rows [T, K]: what a text's T tokens gave a linear
    weight.quantize_rows(0, values, inputs)

An error in a column can be made up for in those behind it, as far as their inputs are alike (GPTQ, arXiv 2210.17323):
the output's error is `e^T H e` of a row's errors e, with H the covariance of the inputs. All of H would be K x K
(750 MB of a 9B's down_proj), so it is taken as what blocks of columns have among themselves, and the RANK directions
that most of the rest lies in: `H = diag(B_1, B_2, ...) + V V^T`. What earlier blocks' errors cost then acts on later
ones by way of RANK sums alone, and each step of the recursion below is a matter of small matrices.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from glm4lite_quant.config import QuantError

BLOCK = 128  # columns; a multiple of every group size
WHOLE = 512  # up to so many columns are one block: all of their covariance is as cheap
RANK = 64  # a multiple of 16
PASSES = 2  # over the rows, to turn RANK random directions to those that most lies in
SHRINK = 0.3  # of what columns have in common: a few thousand tokens show some of it by chance
DAMPING = 0.01  # of the mean square of all columns: one that was never seen is not free
FLOOR = 1e-6  # of a group's largest importance, for the same reason
_AT_ONCE = 16  # blocks in float32 at a time


@dataclass(frozen=True)
class Feedback:
    """How the columns behind make up for a column's error; float32, K columns in blocks of B (the last may be smaller).

    Behind column j its block's column i loses `within[j, i]` of j's error. Of each column's whole change, less what it
    was, `into` adds to R sums; a block's columns begin less `onto^T sums`.
    """

    within: Tensor  # [K, B], upper triangles; what is not above their diagonals is not read
    onto: Tensor  # [K * R]: a matrix [R, columns] for each block
    into: Tensor  # [K, R]

    @property
    def block(self) -> int:
        """Columns of a block, at most."""
        return self.within.shape[1]

    @property
    def rank(self) -> int:
        """How many sums go from block to block; 0 where there is one block."""
        return self.into.shape[1]


@dataclass(frozen=True)
class Inputs:
    """mean_square: of each column, float32 [K]. feedback None: each column is rounded for itself."""

    mean_square: Tensor
    feedback: Feedback | None = None

    @classmethod
    def of(cls, rows: Tensor) -> Inputs:
        """From what a text gave, [T, K] in any float type, K a multiple of 32; QuantError where it is not finite."""
        squares = mean_square(rows)
        if not bool(squares.isfinite().all()):
            raise QuantError("the inputs of a weight are not finite")
        return cls(squares, _feedback(rows, float(squares.double().mean())))

    def to(self, device: torch.device) -> Inputs:
        """The same there."""
        feedback = self.feedback
        if feedback is not None:
            feedback = Feedback(feedback.within.to(device), feedback.onto.to(device), feedback.into.to(device))
        return Inputs(self.mean_square.to(device), feedback)

    def normalized(self, columns: int, group: int) -> Inputs:
        """As the search takes them: the largest mean square of each group is 1; a group of zeros counts evenly.

        Raises QuantError for another shape, NaN, infinities and negative numbers.
        """
        given, feedback = self.mean_square, self.feedback
        if given.dim() != 1 or given.shape[0] != columns:
            raise QuantError(f"mean squares have shape {list(given.shape)}; expected one number for each of {columns}")
        values = given.detach().to(torch.float32).cpu().view(-1, group)
        if not bool(((values >= 0) & values.isfinite()).all()):
            raise QuantError("the mean squares hold a number that is negative or not finite")
        if feedback is not None and not _fits(feedback, columns, group):
            shapes = ", ".join(str(list(part.shape)) for part in (feedback.within, feedback.onto, feedback.into))
            raise QuantError(f"feedback of {shapes} does not fit {columns} columns in groups of {group}")
        top = values.amax(1, keepdim=True)
        shares = torch.where(top > 0, values / torch.where(top > 0, top, 1.0), 1.0)
        return Inputs(shares.clamp(min=FLOOR).flatten(), feedback)


def mean_square(rows: Tensor) -> Tensor:
    """Of each column of [T, K]: float32 [K]."""
    return torch.cat([part.square().sum(0) for part in _parts(rows)]).div(max(1, len(rows))).float()


def _fits(feedback: Feedback, columns: int, group: int) -> bool:
    within, onto, into = feedback.within, feedback.onto, feedback.into
    block, rank = feedback.block, feedback.rank
    shapes = (tuple(within.shape), tuple(onto.shape), tuple(into.shape))
    fits = shapes == ((columns, block), (columns * rank,), (columns, rank))
    plain = all(part.dtype == torch.float32 and part.is_contiguous() for part in (within, onto, into))
    return fits and plain and block > 0 and block % group == 0 and rank % 16 == 0


def _parts(rows: Tensor) -> Iterator[Tensor]:
    """float32 [T, some columns], from the first to the last."""
    for part in rows.split(_AT_ONCE * BLOCK, 1):
        yield part.float()


def _feedback(rows: Tensor, unit: float) -> Feedback | None:
    """None where all inputs are zero. unit: the mean of their squares."""
    tokens, columns = rows.shape
    if unit == 0:
        return None
    block = columns if columns <= WHOLE else BLOCK
    rank = RANK if columns > block else 0
    scale = 1 / math.sqrt(unit * tokens)  # so that covariances are about 1
    directions = _directions(rows, scale, rank)
    blocks: list[tuple[Tensor, Tensor]] = []  # the covariance of each with itself, and with the directions
    for part in _parts(rows):
        x = part * scale
        own = (x.T @ directions).split(block)
        blocks += zip((few.T @ few for few in x.split(block, 1)), own, strict=True)
    within, into = torch.zeros(columns, block), torch.zeros(columns, rank)
    onto, last = torch.zeros(columns * rank), columns
    middle = torch.eye(rank, dtype=torch.float64)  # what the directions still count, with all later columns free
    for covariance, along in reversed(blocks):
        first, v, covariance = last - len(along), along.double(), covariance.double()
        rest = (1 - SHRINK) * (covariance - v @ v.T)
        v = v * math.sqrt(1 - SHRINK)
        rest.diagonal().copy_(covariance.diagonal() + DAMPING - v.square().sum(1))
        shared = v @ middle
        # The inverse is factor^T factor: from the last column on, Cholesky's root is upper.
        root = torch.linalg.cholesky((rest + shared @ v.T).flip(0, 1)).flip(0, 1)
        factor = torch.linalg.solve_triangular(root, torch.eye(len(v), dtype=torch.float64), upper=True)
        back = factor.T @ (factor @ shared)
        within[first:last, : last - first] = factor / factor.diagonal()[:, None]
        into[first:last] = v
        onto[first * rank : last * rank] = back.T.flatten()
        middle = middle - shared.T @ back
        middle, last = (middle + middle.T) / 2, first
    return Feedback(within, onto, into)


def _directions(rows: Tensor, scale: float, rank: int) -> Tensor:
    """Orthonormal [T, rank] that spans most of the rows' columns: as in a randomized singular value decomposition."""
    directions = torch.zeros(len(rows), 0)
    if rank == 0:
        return directions
    random = torch.Generator().manual_seed(0)
    for number in range(PASSES):
        turned = torch.zeros(len(rows), rank)
        for part in _parts(rows):
            x = part * scale
            turned += x @ (x.T @ directions if number else torch.randn(x.shape[1], rank, generator=random))
        directions = torch.linalg.qr(turned).Q
    return torch.nn.functional.pad(directions, (0, rank - directions.shape[1]))
