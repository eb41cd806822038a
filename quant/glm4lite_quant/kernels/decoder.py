"""A whole decoder layer in one native call: between its linears nothing returns to Python and nothing is allocated."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from glm4lite_quant.config import QuantError
from glm4lite_quant.kernels import native

if TYPE_CHECKING:
    from glm4lite_quant.tensor import QuantTensor

WEIGHTS = ("q", "k", "v", "o", "gate_up", "down")
BIASES = ("q", "k", "v")
NORMS = ("input", "post_self_attn", "post_attention", "post_mlp")
TOKENS = 16  # tokens of keys that lie together
MAX_HEAD_DIM = 256


class Heads(NamedTuple):
    """The shape of attention; `rotary_dim` dims of each head are rotated in adjacent pairs."""

    query: int
    key_value: int
    dim: int
    rotary_dim: int


@dataclass(frozen=True)
class CacheView:
    """One layer's keys and values: float32, or int8 with a scale per head and token. `capacity` is a multiple of 16.

    keys [kv_heads, capacity / 16, head_dim, 16], values [kv_heads, capacity, head_dim], scales [kv_heads, capacity].
    """

    keys: Tensor
    values: Tensor
    key_scale: Tensor | None
    value_scale: Tensor | None
    length: int


class _Cache(ctypes.Structure):
    """glm4_cache of csrc/qgemm.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("keys", "values", "key_scale", "value_scale")),
        ("capacity", ctypes.c_int64),
        ("length", ctypes.c_int64),
        ("type", ctypes.c_int32),
    ]


class _Layer(ctypes.Structure):
    """glm4_layer of csrc/qgemm.h."""

    _fields_ = [
        *((name, native.Weight) for name in WEIGHTS),
        *((f"{name}_bias", ctypes.c_void_p) for name in BIASES),
        *((f"{name}_norm", ctypes.c_void_p) for name in NORMS),
        ("eps", ctypes.c_float),
        *((name, ctypes.c_int32) for name in ("heads", "kv_heads", "head_dim", "rotary_dim")),
    ]


class DecoderKernel:
    """The native layer over weights read in place. Made by `DecoderKernel.of`, None where the layer does not fit."""

    def __init__(self, layer: _Layer, held: tuple[object, ...], backend: native.NativeBackend) -> None:
        self._layer, self._held, self._backend = layer, held, backend

    @classmethod
    def of(
        cls,
        weights: Mapping[str, QuantTensor],
        biases: Mapping[str, Tensor | None],
        norms: Mapping[str, Tensor | None],
        eps: float,
        heads: Heads,
    ) -> DecoderKernel | None:
        """`weights` by the names in WEIGHTS, `biases` in BIASES, `norms` in NORMS (None where there is none).

        None where there is no native library, a tensor is not a contiguous float32 one on the CPU, or the shape is not
        one the kernel has code for.
        """
        backend = native.backend()
        if backend is None or not all(backend.supports(weight) for weight in weights.values()):
            return None
        floats = [tensor for tensor in (*biases.values(), *norms.values()) if tensor is not None]
        plain = all(t.device.type == "cpu" and t.dtype == torch.float32 and t.is_contiguous() for t in floats)
        groups = {weight.group_size for weight in weights.values() if weight.bits == 4}
        odd = heads.dim % TOKENS or heads.dim > MAX_HEAD_DIM or heads.rotary_dim % 2 or heads.query % heads.key_value
        if not plain or len(groups) > 1 or odd or heads.query // heads.key_value > 128:
            return None
        pointers = {f"{name}_bias": _pointer(biases.get(name)) for name in BIASES}
        pointers |= {f"{name}_norm": _pointer(norms.get(name)) for name in NORMS}
        structs = {name: native.describe(weights[name]) for name in WEIGHTS}
        shape = dict(zip(("heads", "kv_heads", "head_dim", "rotary_dim"), heads, strict=True))
        layer = _Layer(**structs, **pointers, eps=eps, **shape)
        return cls(layer, (dict(weights), floats), backend)

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor, cache: CacheView) -> None:
        """x [T, hidden], the float32 residual stream, goes through in place; keys and values are added to the cache.

        cos and sin are float32 [T, rotary_dim / 2]. QuantError where the cache has no room for T tokens.
        """
        tokens, capacity = x.shape[0], cache.values.shape[1]
        if cache.length + tokens > capacity:
            raise QuantError(f"a cache of {capacity} tokens holds {cache.length}: {tokens} more do not fit")
        for name, tensor in (("x", x), ("cos", cos), ("sin", sin)):
            if tensor.dtype != torch.float32 or not tensor.is_contiguous() or tensor.device.type != "cpu":
                raise QuantError(f"{name} must be contiguous float32 on the CPU")
        kind = native.FLOAT32 if cache.keys.dtype == torch.float32 else native.INT8
        scales = (_pointer(cache.key_scale), _pointer(cache.value_scale))
        view = _Cache(cache.keys.data_ptr(), cache.values.data_ptr(), *scales, capacity, cache.length, kind)
        self._backend.decoder_layer(
            ctypes.byref(self._layer), x.data_ptr(), tokens, cos.data_ptr(), sin.data_ptr(), ctypes.byref(view)
        )


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
