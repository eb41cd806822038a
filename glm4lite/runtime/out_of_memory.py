"""Errors that mean memory ran out: torch has a type of its own for a GPU's memory only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from glm4lite.base.errors import CheckpointError


def ran_out(error: BaseException) -> str | None:
    """Which memory an allocation did not get; None where the error is another one. torch names its own for a GPU only.

    https://github.com/pytorch/pytorch/blob/main/c10/core/impl/alloc_cpu.cpp
    """
    if isinstance(error, torch.OutOfMemoryError):
        return "the GPU's memory"
    is_torch = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    return "memory" if is_torch or isinstance(error, MemoryError) else None


@contextmanager
def enough_for(folder: Path) -> Iterator[None]:
    """Loading in there, running out of memory is a CheckpointError."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        where = ran_out(error)
        if where is None:
            raise
        advice = "give less of it with gpu_memory" if isinstance(error, torch.OutOfMemoryError) else "free some"
        raise CheckpointError(
            f"{where} ran out while {folder} was loaded; {advice}, or quantize (a smaller type of weights)"
        ) from error
