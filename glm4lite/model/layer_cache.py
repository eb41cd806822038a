"""One layer's keys and values as torch's code reads them, grown in steps. One row behind another, on any device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from glm4lite_quant.kernels.decoder import TOKENS, CacheView, Heads

STEP = 256  # positions added when a buffer is full: few copies, little slack
GPU_STEP = 1024  # there a buffer that moves has to be recorded anew (glm4lite.runtime.cuda_graph)


class LayerCache:
    """Keys and values [B, kv_heads, length, head_dim] of one layer in their own type; any device, differentiable.

    limit: tokens that memory is planned for; up to there the buffers never grow beyond it.
    """

    in_blocks = False  # whether `view` has a table, over a memory that many sequences share

    def __init__(self, limit: int | None = None) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.length, self.limit = 0, limit

    @property
    def buffer(self) -> Tensor | None:
        """One of the buffers: while it is the same tensor, views stay true."""
        return self.values

    def view(self, tokens: int, heads: Heads, device: torch.device, dtype: torch.dtype) -> CacheView:
        """The buffers of a batch of one, with room for `tokens` more, for a kernel that writes them and reads all."""
        like, end = torch.empty(1, heads.key_value, 0, heads.dim, device=device, dtype=dtype), self.length + tokens
        self.keys, self.values = self._reserved(self.keys, like, end), self._reserved(self.values, like, end)
        if self.keys.shape[0] != 1 or self.keys.dtype != dtype or self.keys.device != device:
            raise ValueError(
                f"the cache holds {self.keys.shape[0]} sequences in {self.keys.dtype} on {self.keys.device}"
            )
        return CacheView(self.keys[0], self.values[0], None, None, self.length)

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Adds [B, kv_heads, T, head_dim] and returns all positions so far (views, not copies)."""
        end = self.length + keys.shape[2]
        if keys.requires_grad:  # a buffer written in place would cut the graph
            keys, values = self._concatenated(keys, values)
            self.keys, self.values, self.length = keys, values, end
            return keys, values
        # Both grow or none does: memory may run out between them.
        self.keys, self.values = self._reserved(self.keys, keys, end), self._reserved(self.values, values, end)
        self.keys[:, :, self.length : end] = keys
        self.values[:, :, self.length : end] = values
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def past(self) -> tuple[Tensor, Tensor] | None:
        """All positions so far, None where there are none."""
        if self.keys is None or self.values is None or not self.length:
            return None
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def rounded(self, new: Tensor) -> Tensor:
        """Keys or values as they read back once they are stored."""
        return new

    def stored(self, begin: int, end: int) -> tuple[Tensor, ...]:
        """Positions begin..end-1 of one sequence as `stored_forms` says, copied to the CPU."""
        if self.keys is None or self.values is None:
            raise ValueError("the cache is empty")
        return (torch.stack((self.keys[0, :, begin:end], self.values[0, :, begin:end])).cpu(),)

    def restore(self, stored: tuple[Tensor, ...], room: int = 0) -> None:
        """Appends what a cache of this kind gave as `stored`, bit by bit, on the device where that lies now.

        `room`: positions that it and what follows soon will take.
        """
        keys, values = stored[0][:, None]
        end = self.length + max(room, keys.shape[2])
        self.keys, self.values = self._reserved(self.keys, keys, end), self._reserved(self.values, values, end)
        self.append(keys, values)

    def _concatenated(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        if self.keys is None or self.values is None:
            return keys, values
        past = slice(0, self.length)
        return torch.cat((self.keys[:, :, past], keys), 2), torch.cat((self.values[:, :, past], values), 2)

    def _reserved(self, buffer: Tensor | None, like: Tensor, end: int) -> Tensor:
        """The buffer, or a larger one with what it holds, where it has no room for `end` positions."""
        if buffer is not None and buffer.shape[2] >= end:
            return buffer
        batch, heads, _, head_dim = like.shape
        with torch.inference_mode(False):  # else a script could not go on under no_grad
            grown = like.new_empty(batch, heads, capacity_for(end, self.limit, like.device), head_dim)
        if buffer is not None:
            grown[:, :, : self.length] = buffer[:, :, : self.length]
        return grown

    def copy(self, length: int) -> LayerCache:
        """The first `length` positions, in buffers of their own without room to grow."""
        made = LayerCache(self.limit)
        made.length = min(length, self.length)
        if self.keys is not None and self.values is not None:
            made.keys, made.values = self.keys[:, :, : made.length].clone(), self.values[:, :, : made.length].clone()
        return made

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in (self.keys, self.values) if buffer is not None)


class DynamicLayerCache(LayerCache):
    """One layer of a DynamicCache of Transformers, which a script made and keeps."""

    def __init__(self, cache: Any, layer: int) -> None:
        self._cache, self._layer = cache, layer
        self.keys, self.values, self.limit = None, None, None

    @property
    def length(self) -> int:
        return int(self._cache.get_seq_length(self._layer))

    @length.setter
    def length(self, length: int) -> None:
        stored = self._cache.layers[self._layer] if self.length > length else None
        if stored is not None:
            stored.keys, stored.values = stored.keys[:, :, :length], stored.values[:, :, :length]

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        both: tuple[Tensor, Tensor] = self._cache.update(keys, values, self._layer)
        return both

    def past(self) -> tuple[Tensor, Tensor] | None:
        stored = self._cache.layers[self._layer] if self.length else None
        return None if stored is None else (stored.keys, stored.values)


def with_room(end: int, step: int = STEP) -> int:
    """Positions to make room for: a long cache grows in larger steps, so that it is copied a few times only."""
    return -(-(end + end // 8) // step) * step


def capacity_for(end: int, limit: int | None, device: torch.device) -> int:
    """Positions of a buffer that has to hold `end`: up to the limit never more than that, in whole blocks."""
    capacity = with_room(end, STEP if device.type == "cpu" else GPU_STEP)
    return capacity if limit is None or end > limit else min(capacity, -(-limit // TOKENS) * TOKENS)
