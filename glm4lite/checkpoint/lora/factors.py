"""Factors: what an adapter's file holds for one module, and what it does to that module's weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from glm4lite.base.errors import CheckpointError
from glm4lite.base.files import some
from glm4lite.base.stored_tensor import StoredTensor
from glm4lite.checkpoint.shard import read

FLOATS = ("F32", "BF16", "F16")


@dataclass(frozen=True)
class Factors:
    """One module's, by the name it has in the file: W' = W + scale * B A, and with `magnitude` each row of that norm.

    `a` holds A [r, K], `b` B [N, r]; `transposed` says of either that the file has it the other way round. bias [N] is
    added to the output, times scale. An embedding's W is [vocabulary, hidden] here.
    """

    name: str
    a: StoredTensor
    b: StoredTensor
    scale: float
    transposed: bool = False
    magnitude: StoredTensor | None = None
    bias: StoredTensor | None = None
    embedding: bool = False

    @property
    def rank(self) -> int:
        return self.a.shape[1] if self.transposed else self.a.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """[N, K] of the weight."""
        return (self.b.shape[1], self.a.shape[0]) if self.transposed else (self.b.shape[0], self.a.shape[1])

    def check(self) -> None:
        """Raises CheckpointError where the tensors are none of a low-rank change."""
        for tensor in (self.a, self.b):
            if len(tensor.shape) != 2 or 0 in tensor.shape:
                raise wrong(tensor, f"has shape {list(tensor.shape)}, not that of a matrix")
        of_b = self.b.shape[0] if self.transposed else self.b.shape[1]
        if of_b != self.rank:
            raise wrong(self.b, f"has rank {of_b}, {self.a.name} {self.rank}")
        for vector in (self.magnitude, self.bias):
            if vector is not None and vector.shape not in ((self.shape[0],), (1, self.shape[0]), (self.shape[0], 1)):
                raise wrong(vector, f"has shape {list(vector.shape)}; expected [{self.shape[0]}]")


@dataclass(frozen=True)
class AdapterFile:
    """An adapter as a folder holds it. `saved`: whole tensors that replace those of the model, by their names there."""

    folder: Path
    base: str
    factors: tuple[Factors, ...]
    saved: Mapping[str, StoredTensor] = field(default_factory=dict)


def wrong(tensor: StoredTensor, what: str) -> CheckpointError:
    return CheckpointError(f"{some([tensor.name])} in {tensor.path} {what}; get the adapter again")


def values(tensor: StoredTensor) -> Tensor:
    """A tensor as float32. CheckpointError where it is of another kind, or holds NaN or infinity."""
    if tensor.dtype not in FLOATS:
        raise wrong(tensor, f"has the type {tensor.dtype}; an adapter is F32, BF16 or F16")
    found = read(tensor).to(torch.float32)
    if not bool(found.isfinite().all()):
        raise wrong(tensor, "holds NaN or infinity")
    return found
