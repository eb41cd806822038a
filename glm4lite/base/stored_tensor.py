"""Where a tensor lies in a file, as the headers of safetensors and GGUF say it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from glm4lite.base.errors import CheckpointError

ITEM_BYTES: Mapping[str, int] = {
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("BF16", "F16", "I16", "U16"), 2),
    **dict.fromkeys(("U8", "I8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
}
"""Bytes of an element, by the type's safetensors name."""


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor's bytes lie: `nbytes` row-major bytes of `dtype` (safetensors name) from `offset` of `path`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]

    def at(self, path: Path) -> StoredTensor:
        """The same tensor in a file of another name."""
        return replace(self, path=path)

    def rows(self, start: int, stop: int) -> StoredTensor:
        """Rows start..stop-1 of the first dimension, as a tensor of their own.

        Raises:
            CheckpointError: the rows are not within the tensor.
        """
        if not self.shape or not 0 <= start <= stop <= self.shape[0]:
            raise CheckpointError(f"{self.name} in {self.path} has shape {list(self.shape)}: no rows {start} to {stop}")
        row_bytes = math.prod(self.shape[1:]) * ITEM_BYTES[self.dtype]
        return replace(self, shape=(stop - start, *self.shape[1:]), offset=self.offset + start * row_bytes)
