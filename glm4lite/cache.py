"""KVCache: keys and values of every layer, grown in steps, cut back to keep a common prefix."""

from __future__ import annotations

import torch
from torch import Tensor

STEP = 256  # positions added when a buffer is full: few copies, little slack


class LayerCache:
    """Keys and values [B, kv_heads, length, head_dim] of one layer, in buffers with room to grow."""

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.length = 0

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Adds [B, kv_heads, T, head_dim] and returns all positions so far (views, not copies)."""
        end = self.length + keys.shape[2]
        if keys.requires_grad:  # a buffer written in place would cut the graph
            keys, values = self._concatenated(keys, values)
            self.keys, self.values, self.length = keys, values, end
            return keys, values
        self.keys = self._written(self.keys, keys, end)
        self.values = self._written(self.values, values, end)
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def _concatenated(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        if self.keys is None or self.values is None:
            return keys, values
        past = slice(0, self.length)
        return torch.cat((self.keys[:, :, past], keys), 2), torch.cat((self.values[:, :, past], values), 2)

    def _written(self, buffer: Tensor | None, new: Tensor, end: int) -> Tensor:
        if buffer is None or buffer.shape[2] < end:
            batch, heads, _, head_dim = new.shape
            grown = new.new_empty(batch, heads, -(-end // STEP) * STEP, head_dim)
            if buffer is not None:
                grown[:, :, : self.length] = buffer[:, :, : self.length]
            buffer = grown
        buffer[:, :, self.length : end] = new
        return buffer

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in (self.keys, self.values) if buffer is not None)


class KVCache:
    """The `past_key_values` of a model: comes back from forward, can be passed in again."""

    def __init__(self, num_layers: int) -> None:
        self.layers = [LayerCache() for _ in range(num_layers)]

    def get_seq_length(self) -> int:
        """Positions held by every layer (a forward stopped half-way leaves some layers longer)."""
        return min(layer.length for layer in self.layers)

    def truncate(self, length: int) -> None:
        """Forgets everything after the first `length` positions."""
        for layer in self.layers:
            layer.length = min(layer.length, length)

    @property
    def nbytes(self) -> int:
        """Bytes held, room to grow included."""
        return sum(layer.nbytes for layer in self.layers)
