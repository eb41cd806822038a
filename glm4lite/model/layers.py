"""GLM-4's decoder layer in torch, and the two seams through which it is made faster and moved elsewhere.

One code path for `glm4` and `glm`, differences read from the config. Parameter names are Hugging Face's, so checkpoints
load with no table. Linears may be replaced by quantized ones (`glm4lite.loading.assembly`); nothing here knows of that.
The residual stream and the norms are float32 whatever the model's dtype: o_proj and down_proj outputs of GLM-4 pass
65 504, float16's largest number.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from glm4lite.model.activations import ACTIVATIONS
from glm4lite.model.attention import Visibility, attend, attend_with_weights
from glm4lite.model.cache import Cache, Caches, HomeCaches, SpanCaches
from glm4lite.model.config import Glm4Config
from glm4lite.model.rotary import apply_rotary
from glm4lite_quant.kernels.decoder import Heads

if TYPE_CHECKING:
    from glm4lite.model.step import Span

_LAYER = re.compile(r"(?:model\.)?layers\.([0-9]{1,9})(?:\.(.+))?")


def layer_of(name: str) -> tuple[int, str] | None:
    """The layer that a module or tensor belongs to, and its name there ("": the layer itself); None outside of layers.

    "model.layers.3.mlp.down_proj" -> (3, "mlp.down_proj"). A trunk alone has no "model." before.
    """
    found = _LAYER.fullmatch(name)
    return None if found is None else (int(found[1]), found[2] or "")


class WeightStore(Protocol):
    """Where a decoder layer's weights are when they are needed: the layer asks, and does not know."""

    @property
    def resident(self) -> bool:
        """Whether the layer's modules have their weights at all times."""

    def where(self, tokens: int) -> tuple[torch.device, torch.dtype] | None:
        """Where and in what so many tokens are computed; None: on the layer's own device, in its own type."""

    def acquire(
        self, layer: DecoderLayer, device: torch.device, cache: HomeCaches | None
    ) -> AbstractContextManager[tuple[DecoderLayer, Caches | None]]:
        """For an input on `device`: the layer that computes, which has its weights while this is open, and its cache.

        Raises CheckpointError where the disk fails.
        """

    def fused(self, layer: DecoderLayer) -> bool:
        """Whether the layer runs in the native library once its weights are there."""


class Resident:
    """The weights are in the layer's modules."""

    resident = True

    def where(self, tokens: int) -> None:
        return None

    def acquire(
        self, layer: DecoderLayer, device: torch.device, cache: HomeCaches | None
    ) -> AbstractContextManager[tuple[DecoderLayer, Caches | None]]:
        return nullcontext((layer, cache))

    def fused(self, layer: DecoderLayer) -> bool:
        return layer.runner.fuses(layer)


class LayerRunner(Protocol):
    """Computes layers faster than torch's code, where it can; `glm4lite.runtime.runner` gives a loaded model one."""

    def few(self, device: torch.device) -> int:
        """Tokens that go through all layers of a device in one call, which nothing can stop half-way."""

    def run(
        self,
        layers: Sequence[DecoderLayer],
        x: Tensor,
        dtype: torch.dtype,
        rotary: tuple[Tensor, Tensor],
        visible: Visibility,
        caches: Sequence[Caches | None],
    ) -> Tensor | None:
        """x after the layers, resident ones of one device; None, with nothing done, where torch's code has to run."""

    def groups(self, layers: Sequence[DecoderLayer], spans: Sequence[Span]) -> list[list[int]]:
        """Which sequences of a step go through the layers together, one group after the other, by their numbers."""

    def fuses(self, layer: DecoderLayer) -> bool:
        """Whether the native library has code for this layer as it is."""

    def clear(self) -> None:
        """The model's tensors have moved."""


class TorchRunner:
    """Leaves everything to torch's code, which is the specification."""

    def few(self, device: torch.device) -> int:
        return 0

    def run(self, *_: Any) -> None:
        return None

    def groups(self, layers: Sequence[DecoderLayer], spans: Sequence[Span]) -> list[list[int]]:
        return [list(range(len(spans)))]

    def fuses(self, layer: DecoderLayer) -> bool:
        return False

    def clear(self) -> None:
        pass


RESIDENT, TORCH = Resident(), TorchRunner()


class RMSNorm(nn.Module):
    """x * rsqrt(mean(x^2) + eps) in float32, cast to `dtype`, then times the weight (the reference's order)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        x = x.float()
        normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        return (self.weight * normed.to(dtype)).to(dtype)


class Attention(nn.Module):
    def __init__(self, config: Glm4Config) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.scale = config.head_dim**-0.5
        self.dropout = config.attention_dropout
        hidden, bias = config.hidden_size, config.attention_bias
        kv_size = config.num_key_value_heads * config.head_dim
        self.heads = Heads(config.num_attention_heads, config.num_key_value_heads, config.head_dim, config.rotary_dim)
        self.q_proj = nn.Linear(hidden, config.num_attention_heads * config.head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden, kv_size, bias=bias)
        self.v_proj = nn.Linear(hidden, kv_size, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * config.head_dim, hidden, bias=False)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        visible: Visibility,
        cache: Caches | None,
        want_weights: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """x [B, T, H] -> [B, T, H] and, where wanted, the attention weights [B, heads, T, S]."""
        q = apply_rotary(self._heads(self.q_proj(x)), *rotary)
        k = apply_rotary(self._heads(self.k_proj(x)), *rotary)
        v = self._heads(self.v_proj(x))
        if isinstance(cache, SpanCaches):
            rows = [part.length for part in visible.parts]
            qs, ks, vs = (new.split(rows, 2) for new in (q, k, v))
            spans = zip(qs, ks, vs, visible.parts, cache.parts, strict=True)
            out, weights = torch.cat([self._attended(*span, False)[0] for span in spans], 2), None
        else:
            out, weights = self._attended(q, k, v, visible, cache, want_weights)
        return self.o_proj(out.transpose(1, 2).flatten(-2)), weights

    def _attended(
        self, q: Tensor, k: Tensor, v: Tensor, visible: Visibility, cache: Cache | None, want_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        """q, k and v of new positions, which the cache takes in, [B, heads, T, head_dim] -> the same of q's shape."""
        if cache is not None:
            k, v = cache.append(k, v)
        dropout = self.dropout if self.training else 0.0
        if want_weights:
            return attend_with_weights(q, k, v, visible.mask, self.scale, dropout)
        return attend(q, k, v, visible.mask, self.scale, dropout), None


class MLP(nn.Module):
    """down(act(gate) * up), act: silu; rows 0..I-1 of gate_up_proj are the gate."""

    def __init__(self, config: Glm4Config) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.activation_fn = ACTIVATIONS[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        out: Tensor = self.down_proj(self.activation_fn(gate) * up)
        return out


class DecoderLayer(nn.Module):
    def __init__(self, config: Glm4Config) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.sandwich = config.sandwich_norms
        if self.sandwich:
            self.post_self_attn_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
            self.post_mlp_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.store: WeightStore = RESIDENT
        self.runner: LayerRunner = TORCH
        self.dtype: torch.dtype | None = None  # of its linears' inputs, where that is not the embedding's

    def forward(
        self,
        x: Tensor,
        dtype: torch.dtype,
        rotary: tuple[Tensor, Tensor],
        visible: Visibility,
        cache: HomeCaches | None,
        want_weights: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """x: the residual stream, float32 [B, T, H]; `dtype` is what the linears compute in."""
        if self.store is RESIDENT:  # no context: torch.compile does not follow one that gives a tuple
            return self._run(x, dtype, rotary, visible, cache, want_weights)
        with self.store.acquire(self, x.device, cache) as (layer, lent):
            return layer._run(x, dtype, rotary, visible, lent, want_weights)

    def _run(
        self,
        x: Tensor,
        dtype: torch.dtype,
        rotary: tuple[Tensor, Tensor],
        visible: Visibility,
        cache: Caches | None,
        want_weights: bool,
    ) -> tuple[Tensor, Tensor | None]:
        faster = None if want_weights else self.runner.run((self,), x, dtype, rotary, visible, (cache,))
        if faster is not None:
            return faster, None
        attended, weights = self.self_attn(self.input_layernorm(x, dtype), rotary, visible, cache, want_weights)
        if self.sandwich:
            attended = self.post_self_attn_layernorm(attended, dtype)
        x = x + attended
        out = self.mlp(self.post_attention_layernorm(x, dtype))
        if self.sandwich:
            out = self.post_mlp_layernorm(out, dtype)
        return x + out, weights

    @property
    def device(self) -> torch.device:
        """Where it is computed token by token."""
        return self.input_layernorm.weight.device

    def where(self, tokens: int, dtype: torch.dtype) -> tuple[torch.device, torch.dtype]:
        """Where and in what so many tokens are computed; `dtype` where the layer has no type of its own."""
        return self.store.where(tokens) or (self.device, self.dtype or dtype)
