"""One layer's keys and values as the native attention reads them: keys in tiles of 16 tokens, float32 or int8."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from glm4lite.model.layer_cache import capacity_for
from glm4lite_quant.kernels.decoder import TOKENS, CacheView, Heads

if TYPE_CHECKING:
    from glm4lite.model.config import Glm4Config

KVType = Literal["float", "int8"]


class PackedLayerCache:
    """As LayerCache, in the layout the native attention reads: float32, or int8 with a scale per head and token.

    keys [B, kv_heads, capacity / 16, head_dim, 16], values [B, kv_heads, capacity, head_dim]. `append` serves the code
    that knows no layout: it returns whole float copies and is slow. Not differentiable.

    limit: tokens that memory is planned for; up to there the buffers never grow beyond it.
    """

    in_blocks = False  # whether `view` has a table, over a memory that many sequences share

    def __init__(self, int8: bool, limit: int | None = None) -> None:
        self.int8, self.length, self.limit = int8, 0, limit
        self._keys: Tensor | None = None
        self._values: Tensor | None = None
        self._scales: Tensor | None = None  # [keys or values, B, kv_heads, capacity]

    @property
    def buffer(self) -> Tensor | None:
        """As LayerCache's."""
        return self._values

    def view(self, tokens: int, heads: Heads, device: torch.device, dtype: torch.dtype) -> CacheView:
        """As LayerCache's; `dtype` is that of the activations, not of the cache."""
        self._reserve(self.length + tokens, (1, heads.key_value), heads.dim, device)
        keys, values, scales = self._buffers()
        if keys.shape[0] != 1:
            raise ValueError(f"the cache holds a batch of {keys.shape[0]}, not of one")
        key_scale, value_scale = (None, None) if scales is None else (scales[0, 0], scales[1, 0])
        return CacheView(keys[0], values[0], key_scale, value_scale, self.length)

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Adds [B, kv_heads, T, head_dim] and returns all positions so far in that type."""
        batch, heads, tokens, head_dim = keys.shape
        end = self.length + tokens
        self._reserve(end, (batch, heads), head_dim, keys.device)
        for which, new in enumerate((keys, values)):
            self._write(which, *(_int8(new.float()) if self.int8 else (new, None)))
        self.length = end
        return self._read(0).to(keys.dtype), self._read(1).to(values.dtype)

    def past(self) -> tuple[Tensor, Tensor] | None:
        """All positions so far as float32, None where there are none."""
        return (self._read(0), self._read(1)) if self.length else None

    def rounded(self, new: Tensor) -> Tensor:
        """Keys or values as they read back once they are stored."""
        if not self.int8:
            return new
        codes, scale = _int8(new.float())
        return (codes * scale[..., None]).to(new.dtype)

    def stored(self, begin: int, end: int) -> tuple[Tensor, ...]:
        """As LayerCache's."""
        (keys, key_scales), (values, value_scales) = (self._codes(which, begin, end) for which in (0, 1))
        both = torch.stack((keys[0], values[0]))
        if key_scales is None or value_scales is None:
            return (both.cpu(),)
        return both.cpu(), torch.stack((key_scales[0], value_scales[0])).cpu()

    def restore(self, stored: tuple[Tensor, ...], room: int = 0) -> None:
        """As LayerCache's."""
        both, *scales = stored
        _, heads, tokens, head_dim = both.shape
        self._reserve(self.length + max(room, tokens), (1, heads), head_dim, both.device)
        for which in (0, 1):
            self._write(which, both[which][None], scales[0][which][None] if scales else None)
        self.length += tokens

    def _write(self, which: int, codes: Tensor, scales: Tensor | None) -> None:
        """Keys (0) or values (1) [B, kv_heads, T, head_dim] of the next positions, and the scales of int8 codes."""
        keys, values, all_scales = self._buffers()
        at = torch.arange(self.length, self.length + codes.shape[2], device=codes.device)
        if which == 0:
            keys[:, :, at // TOKENS, :, at % TOKENS] = codes.permute(2, 0, 1, 3).to(keys.dtype)
        else:
            values[:, :, at] = codes.to(values.dtype)
        if scales is not None and all_scales is not None:
            all_scales[which][:, :, at] = scales

    def _codes(self, which: int, begin: int, end: int) -> tuple[Tensor, Tensor | None]:
        """Keys or values [B, kv_heads, T, head_dim] of positions begin..end-1 as they lie there; of int8 codes the
        scales [B, kv_heads, T]."""
        keys, values, scales = self._buffers()
        if which == 0:
            first = begin // TOKENS
            codes = keys[:, :, first : -(-end // TOKENS)].transpose(3, 4).flatten(2, 3)
            codes = codes[:, :, begin - first * TOKENS : end - first * TOKENS]
        else:
            codes = values[:, :, begin:end]
        return codes, None if scales is None else scales[which, :, :, begin:end]

    def _read(self, which: int) -> Tensor:
        """All positions so far as float32, [B, kv_heads, length, head_dim]."""
        keys, values, scales = self._buffers()
        codes = keys.transpose(3, 4).flatten(2, 3) if which == 0 else values
        whole = codes[:, :, : self.length].float()
        return whole if scales is None else whole * scales[which, :, :, : self.length, None]

    def _buffers(self) -> tuple[Tensor, Tensor, Tensor | None]:
        if self._keys is None or self._values is None:
            raise ValueError("the cache is empty")
        return self._keys, self._values, self._scales

    def _reserve(self, end: int, outer: tuple[int, int], head_dim: int, device: torch.device) -> None:
        if self._values is not None and end <= self._values.shape[2]:
            return
        capacity = capacity_for(end, self.limit, device)
        dtype = torch.int8 if self.int8 else torch.float32
        with torch.inference_mode(False):
            keys = torch.empty(*outer, capacity // TOKENS, head_dim, TOKENS, dtype=dtype, device=device)
            values = torch.empty(*outer, capacity, head_dim, dtype=dtype, device=device)
            scales = torch.empty(2, *outer, capacity, device=device) if self.int8 else None
        if self._keys is not None and self._values is not None:
            keys[:, :, : self._keys.shape[2]] = self._keys
            values[:, :, : self._values.shape[2]] = self._values
            if scales is not None and self._scales is not None:
                scales[..., : self._scales.shape[3]] = self._scales
        self._keys, self._values, self._scales = keys, values, scales

    def copy(self, length: int) -> PackedLayerCache:
        """The first `length` positions, in buffers of their own with little room to grow."""
        made = PackedLayerCache(self.int8, self.limit)
        made.length = min(length, self.length)
        if self._keys is not None and self._values is not None:
            blocks = -(-made.length // TOKENS)
            made._keys, made._values = self._keys[:, :, :blocks].clone(), self._values[:, :, : blocks * TOKENS].clone()
            made._scales = None if self._scales is None else self._scales[..., : blocks * TOKENS].clone()
        return made

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in (self._keys, self._values, self._scales) if buffer is not None)


def _int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """[B, heads, T, head_dim] -> int8 codes and scales [B, heads, T], as csrc/layer.cpp makes them."""
    top = x.abs().amax(-1)
    inverse = torch.where(top < 1e-30, 0, 127 / top)  # the inverse of less may be infinite
    return (x * inverse[..., None]).round().nan_to_num(0).to(torch.int8), top / 127


def stored_forms(
    config: Glm4Config, kv: KVType, dtype: torch.dtype, tokens: int
) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and types of what `stored` gives of one layer, whatever the layout it has in memory.

    Keys and values [2, kv_heads, tokens, head_dim] in `dtype`, or as int8 codes with scales [2, kv_heads, tokens].
    """
    heads = (2, config.num_key_value_heads, tokens)
    if kv == "int8":
        return [((*heads, config.head_dim), torch.int8), (heads, torch.float32)]
    return [((*heads, config.head_dim), dtype)]


def bytes_per_token(config: Glm4Config, kv: KVType, float_bytes: int) -> int:
    """What one token adds to a model's cache; `float_bytes` is the size of the activations' type."""
    heads = 2 * config.num_hidden_layers * config.num_key_value_heads
    return heads * (config.head_dim + 4 if kv == "int8" else config.head_dim * float_bytes)
