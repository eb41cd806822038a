"""Rotary position embeddings as GLM-4 uses them: adjacent pairs (2i, 2i+1) of the first `rotary_dim` dims of a head.

Sources: RoFormer (arXiv 2104.09864), YaRN (arXiv 2309.00071), Transformers' modeling_rope_utils.py.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from glm4lite.model.config import Glm4Config


class RotaryEmbedding:
    """cos and sin for positions. Not a Module: the frequencies are no weights and follow the positions' device."""

    def __init__(self, config: Glm4Config) -> None:
        self.inv_freq, self.attention_scaling = inverse_frequencies(config)
        self._copies: dict[torch.device, Tensor] = {self.inv_freq.device: self.inv_freq}  # layers may lie on several

    def __call__(self, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """position_ids [B, T] -> cos, sin [B, 1, T, rotary_dim / 2]; angles in float32, the result in `dtype`."""
        device = position_ids.device
        if device not in self._copies:
            self._copies[device] = self.inv_freq.to(device)
        angles = position_ids[:, None, :, None].float() * self._copies[device]
        return (angles.cos() * self.attention_scaling).to(dtype), (angles.sin() * self.attention_scaling).to(dtype)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates adjacent pairs of the first 2 * cos.shape[-1] dims of x [B, heads, T, head_dim]; the rest passes."""
    rotary_dim = 2 * cos.shape[-1]
    even, odd = x[..., 0:rotary_dim:2], x[..., 1:rotary_dim:2]
    rotated = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)
    return torch.cat((rotated, x[..., rotary_dim:]), dim=-1)


def inverse_frequencies(config: Glm4Config) -> tuple[Tensor, float]:
    """Frequencies [rotary_dim / 2] in float32 on the CPU, and the factor on cos and sin (1.0 unless YaRN)."""
    dim = config.rotary_dim
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim
    inv_freq = 1.0 / config.rope_theta**exponents
    if config.rope_parameters["rope_type"] == "yarn":
        return _yarn(config, inv_freq)
    return inv_freq, 1.0


def _yarn(config: Glm4Config, inv_freq: Tensor) -> tuple[Tensor, float]:
    """Low frequencies are interpolated by `factor`, high ones kept, those between blended by a linear ramp."""
    rope = config.rope_parameters
    factor = float(rope["factor"])
    low, high = (_correction_dim(config, rope.get(key) or rotations) for key, rotations in _YARN_ROTATIONS)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.rotary_dim - 1)
    if low == high:
        high += 0.001  # the ramp must not divide by zero
    steps = torch.arange(config.rotary_dim // 2, dtype=torch.float32, device="cpu")
    interpolated = ((steps - low) / (high - low)).clamp(0, 1)
    blended = inv_freq / factor * interpolated + inv_freq * (1 - interpolated)
    return blended, _yarn_attention_factor(rope, factor)


_YARN_ROTATIONS = (("beta_fast", 32), ("beta_slow", 1))


def _correction_dim(config: Glm4Config, rotations: float) -> float:
    """The (fractional) frequency index that turns `rotations` times within the original context."""
    context = config.rope_parameters["original_max_position_embeddings"]
    return config.rotary_dim * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(config.rope_theta))


def _yarn_attention_factor(rope: dict[str, float], factor: float) -> float:
    def mscale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    given = rope.get("attention_factor")
    if given is not None:
        return float(given)
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return mscale(rope["mscale"]) / mscale(rope["mscale_all_dim"])
    return mscale(1.0)
