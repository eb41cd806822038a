"""Grouped-query attention over the cache, with the masks it needs. Scores and softmax are float32 inside."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor


def packed_mask(positions: Tensor) -> Tensor | None:
    """Positions [B, T] that begin anew inside a row: sequences packed one behind the other, each of which sees itself
    alone, as bool [B, 1, T, T]. None where every row is one sequence. Source: Transformers' masking_utils.
    """
    sequence = (positions.diff(prepend=positions[:, :1] - 1) != 1).cumsum(-1)
    if not bool(sequence[:, -1].any()):
        return None
    return (sequence[:, None, :, None] == sequence[:, None, None, :]).tril()


class Visibility:
    """Which keys each query of a forward pass may see; the mask is made when a layer asks for it.

    `padding` is the caller's attention_mask: [B, past + T] with 0 at padding, or [B, 1 or heads, T, S] used as it is
    (bool, or a float that is added to the scores). A query that sees no key, padding at the left, sees itself, so that
    no softmax row is empty.
    """

    def __init__(self, padding: Tensor | None, past: int, length: int, device: torch.device) -> None:
        given = padding is not None and (padding.dim() == 4 or not bool(padding.all()))
        self._padding = padding if given else None
        self._past, self.length, self._device = past, length, device

    @property
    def parts(self) -> Sequence[Visibility]:
        """Of each sequence, where a pass is of several (`SpanVisibility`)."""
        return (self,)

    @property
    def causal_only(self) -> bool:
        """Each query sees every key up to its own position."""
        return self._padding is None

    @cached_property
    def mask(self) -> Tensor | None:
        """bool [B or 1, 1, T, past + T] (or the caller's own), None where torch's causal attention does the same."""
        padding, past, length = self._padding, self._past, self.length
        if padding is not None and padding.dim() == 4:
            return padding
        if padding is None and (length == 1 or past == 0):
            return None
        queries = torch.arange(past, past + length, device=self._device)[:, None]
        keys = torch.arange(past + length, device=self._device)[None, :]
        visible = (keys <= queries)[None, None]
        if padding is not None:
            visible = visible & padding[:, None, None, : past + length].bool()
            visible = visible | (~visible.any(-1, keepdim=True) & (keys == queries))
        return visible


class SpanVisibility(Visibility):
    """Of a pass of several sequences, one behind the other: each sees itself alone."""

    def __init__(self, parts: Sequence[Visibility], device: torch.device) -> None:
        super().__init__(None, 0, sum(part.length for part in parts), device)
        self._parts = parts

    @property
    def parts(self) -> Sequence[Visibility]:
        return self._parts


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, dropout: float = 0.0) -> Tensor:
    """q [B, heads, T, D], k and v [B, kv_heads, S, D] -> [B, heads, T, D]."""
    if mask is not None and mask.is_floating_point():
        mask = mask.to(q.dtype)
    batch, heads, length, head_dim = q.shape
    kv_heads = k.shape[1]
    if length == 1:  # the query heads of a kv head become its rows, so that K and V are read once
        grouped = q.view(batch, kv_heads, heads // kv_heads, head_dim)
        if mask is not None and mask.shape[1] > 1:  # one of its own for each head
            mask = mask.view(mask.shape[0], kv_heads, heads // kv_heads, -1)
        out = F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask, dropout_p=dropout, scale=scale)
        return out.view(batch, heads, 1, head_dim)
    if mask is not None and q.device.type == "cuda":
        # With a mask torch shares key/value heads in its slowest way only, which writes all scores in float32.
        k, v = (part.repeat_interleave(heads // kv_heads, 1) for part in (k, v))
        kv_heads = heads
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=heads != kv_heads,
    )


def attend_with_weights(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, dropout: float = 0.0
) -> tuple[Tensor, Tensor]:
    """As `attend`, spelled out, and the attention weights [B, heads, T, S] in q's dtype."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = (q.float() * scale) @ k.float().transpose(-1, -2)
    if mask is None:
        length, total = scores.shape[-2:]
        mask = torch.ones(length, total, dtype=torch.bool, device=q.device).tril(total - length)
    scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    weights = scores.softmax(-1).to(q.dtype)
    return F.dropout(weights, dropout) @ v, weights
