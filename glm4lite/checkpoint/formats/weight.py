"""One weight as another tool quantized it: what the headers say of it, and once it is opened, its rows and codes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from glm4lite.base.errors import CheckpointError
from glm4lite.checkpoint.checkpoint import Checkpoint
from glm4lite_quant.config import GROUP_SIZES
from glm4lite_quant.format import Codes

SCALES = ("F16", "BF16", "F32")
"""The safetensors types of scales."""

KEPT_BITS = 4
"""Codes of as many bits or fewer can be kept, if they are affine."""


class Opened(Protocol):
    """A weight whose values were checked; what stays in memory of it is its scales alone."""

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows start to stop-1, decoded: float [stop - start, K]."""


@dataclass(frozen=True)
class Affine:
    """The opened form of almost every format: `w = code * step - low`.

    unpack: (start, stop) -> codes uint8 [stop - start, K], each below `levels`. order: the group of each column, where
    these do not lie side by side (GPTQ's act-order).
    """

    step: Tensor  # float32 [N, G]
    low: Tensor  # float32 [N, G]
    levels: int
    unpack: Callable[[int, int], Tensor]
    order: Tensor | None = None  # int64 [K]

    def codes(self, start: int, stop: int) -> Codes:
        """Rows start to stop-1 as they are, where there is no `order`."""
        return Codes(self.unpack(start, stop), self.step[start:stop], self.low[start:stop], self.levels)

    def rows(self, start: int, stop: int) -> Tensor:
        codes = self.codes(start, stop)
        if self.order is None:
            return codes.decoded()
        step, low = codes.step[:, self.order], codes.low[:, self.order]
        return codes.values.float().mul_(step).sub_(low)


@dataclass(frozen=True)
class PackedWeight:
    """What the headers say of a weight [N, K]; `open` reads its scales. `parts`: its tensors' names.

    dtype: the safetensors type that holds its values. bits: how many a code has. group: how many columns side by side
    share a scale, where codes are affine, None where they are not. calibrate: whether it is exact enough for a search
    by calibration to pay where it is quantized again.
    """

    parts: tuple[str, ...]
    shape: tuple[int, int]
    dtype: str
    bits: float
    group: int | None
    open: Callable[[Checkpoint], Opened]
    calibrate: bool = False

    @property
    def kept_group(self) -> int | None:
        """The largest group of ours that its codes can be kept in, None where they cannot be."""
        if self.group is None or self.bits > KEPT_BITS:
            return None
        return next((size for size in reversed(GROUP_SIZES) if self.group % size == 0), None)


def wrong(checkpoint: Checkpoint, name: str, what: str) -> CheckpointError:
    """The error of a tensor that says what cannot be."""
    return CheckpointError(f"{name} in {checkpoint.file(name)} {what}; download it again or use the BF16 checkpoint")


def check(checkpoint: Checkpoint, name: str, dtypes: tuple[str, ...], *shapes: tuple[int, ...]) -> None:
    """Raises CheckpointError where a tensor is missing, or of none of the types and shapes."""
    if name not in checkpoint:
        owner = name.rpartition(".")[0]
        raise CheckpointError(f"{checkpoint.folder} lacks {name}, a part of the quantized {owner}; download it again")
    dtype, shape = checkpoint.dtype(name), checkpoint.shape(name)
    if dtype not in dtypes or (shapes and shape not in shapes):
        wanted = " or ".join(str(list(one)) for one in dict.fromkeys(shapes))
        raise wrong(checkpoint, name, f"is {dtype} {list(shape)}; expected {' or '.join(dtypes)} {wanted}".rstrip())


def finite(checkpoint: Checkpoint, name: str) -> Tensor:
    """A tensor of scales as float32; CheckpointError where one of them is not finite."""
    values = checkpoint.mapped(name).to(torch.float32, copy=True)
    checkpoint.check_finite(name, values)
    return values


def matrix(checkpoint: Checkpoint, name: str, dtypes: tuple[str, ...]) -> tuple[int, int]:
    """The shape of a tensor of two dimensions; CheckpointError where it is none, or of another type."""
    check(checkpoint, name, dtypes)
    shape = checkpoint.shape(name)
    if len(shape) != 2 or 0 in shape:
        raise wrong(checkpoint, name, f"has shape {list(shape)}, not that of a matrix")
    return shape[0], shape[1]


def held_as(checkpoint: Checkpoint, scales: str) -> str:
    """The safetensors type that holds what these scales make of codes: float16's range is too small for GLM-4."""
    return "BF16" if checkpoint.dtype(scales) == "BF16" else "F32"
