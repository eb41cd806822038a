"""Decoder layers in one native call, for the rows of several sequences: nothing returns to Python in between."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from glm4lite_quant.config import QuantError
from glm4lite_quant.format import ROWS, Planes
from glm4lite_quant.kernels import native

WEIGHTS = ("q", "k", "v", "o", "gate_up", "down")
BIASES = ("q", "k", "v")
NORMS = ("input", "post_self_attn", "post_attention", "post_mlp")
TOKENS, BLOCK = 16, 64  # tokens of keys that lie together; tokens of a block (GLM4_TOKENS, GLM4_BLOCK)
MAX_HEAD_DIM, MAX_GROUP = 256, 128  # GLM4_MAX_HEAD_DIM, GLM4_ATTENTION_ROWS


class Heads(NamedTuple):
    """The shape of attention; `rotary_dim` dims of each head are rotated in adjacent pairs."""

    query: int
    key_value: int
    dim: int
    rotary_dim: int


@dataclass(frozen=True)
class CacheView:
    """One sequence's keys and values in one layer: float32, or int8 with a scale per head and token.

    keys [kv_heads, capacity / 16, head_dim, 16], values [kv_heads, capacity, head_dim], scales [kv_heads, capacity];
    `capacity` is a multiple of 16. With a `table`, int32 [blocks of the sequence], the memory is shared by many and
    cut into blocks of 64 tokens: keys [blocks, kv_heads, 4, head_dim, 16], values [blocks, kv_heads, 64, head_dim],
    scales [blocks, kv_heads, 64].
    A float cache of a GPU has its keys as its values, in the activations' type. A table stays on the CPU.
    """

    keys: Tensor
    values: Tensor
    key_scale: Tensor | None
    value_scale: Tensor | None
    length: int
    table: Tensor | None = None

    @property
    def capacity(self) -> int:
        return self.values.shape[1] if self.table is None else BLOCK * len(self.table)

    @property
    def strides(self) -> tuple[int, int]:
        """Tokens from a block of 64 to the next, and from a head to the next."""
        return (BLOCK, self.capacity) if self.table is None else (self.values.shape[1] * BLOCK, BLOCK)

    @property
    def blocks(self) -> int:
        """Most blocks that a sequence may have in this memory."""
        return -(-self.capacity // BLOCK) if self.table is None else self.values.shape[0]


class LowRankPath(Protocol):
    """What an adapter adds to a linear [N, K]: y = gain * y + b (a x) + bias; contiguous float32 on the CPU."""

    @property
    def a(self) -> Tensor:
        """[r, K]."""

    @property
    def b(self) -> Tensor:
        """[N / 16, r, 16]: tiles of 16 rows, the last one padded."""

    @property
    def gain(self) -> Tensor | None:
        """[N]."""

    @property
    def bias(self) -> Tensor | None:
        """[N]."""


class LayerAdapter:
    """An adapter's part of a layer, by the names in WEIGHTS; a linear that it leaves alone is not there.

    Raises QuantError where a path does not fit the layer.
    """

    def __init__(self, kernel: DecoderKernel, paths: Mapping[str, LowRankPath]) -> None:
        self.structs, self.paths = (_LowRank * len(WEIGHTS))(), dict(paths)
        self._first = next(iter(paths.values()), None)
        self._address = None if self._first is None else self._first.a.data_ptr()
        for index, name in enumerate(WEIGHTS):
            path, weight = paths.get(name), getattr(kernel.layer, name)
            if path is None:
                continue
            a, b, vectors = path.a, path.b, [one for one in (path.gain, path.bias) if one is not None]
            plain = all(t.device.type == "cpu" and t.dtype == torch.float32 and t.is_contiguous() for t in (a, b))
            plain = plain and all(t.device.type == "cpu" and t.dtype == torch.float32 for t in vectors)
            whole = a.shape[1:] == (weight.k,) and b.shape == (-(-weight.n // ROWS), len(a), ROWS)
            if not plain or not whole or any(one.shape != (weight.n,) for one in vectors):
                raise QuantError(f"an adapter of {list(a.shape)} and {list(b.shape)} does not fit {name}")
            self.structs[index] = _LowRank(*map(_pointer, (a, b, path.gain, path.bias)), len(a))

    @property
    def moved(self) -> bool:
        """Whether the paths' tensors, which move all at once, lie elsewhere now."""
        return self._first is not None and self._first.a.data_ptr() != self._address


class SpanRows(NamedTuple):
    """One sequence's part of a call: so many rows, its cache in each layer, and its adapter's part of each, if any."""

    rows: int
    caches: Sequence[CacheView]
    adapters: Sequence[LayerAdapter | None] = ()


class _Cache(ctypes.Structure):
    """glm4_cache of csrc/qgemm.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("keys", "values", "key_scale", "value_scale", "table")),
        *((name, ctypes.c_int64) for name in ("block_stride", "head_stride", "length")),
        ("type", ctypes.c_int32),
    ]


class _LowRank(ctypes.Structure):
    """glm4_lora of csrc/qgemm.h."""

    _fields_ = [*((name, ctypes.c_void_p) for name in ("a", "b", "gain", "bias")), ("rank", ctypes.c_int64)]


class _Span(ctypes.Structure):
    """glm4_span of csrc/qgemm.h."""

    _fields_ = [
        ("rows", ctypes.c_int64),
        ("caches", ctypes.POINTER(_Cache)),
        ("lora", ctypes.POINTER(ctypes.c_void_p)),
    ]


class _Layer(ctypes.Structure):
    """glm4_layer of csrc/qgemm.h."""

    _fields_ = [
        *((name, native.Weight) for name in WEIGHTS),
        *((f"{name}_bias", ctypes.c_void_p) for name in BIASES),
        *((f"{name}_norm", ctypes.c_void_p) for name in NORMS),
        ("eps", ctypes.c_float),
        *((name, ctypes.c_int32) for name in ("heads", "kv_heads", "head_dim", "rotary_dim", "qkv_splits")),
    ]


class DecoderKernel:
    """One layer's weights as the library takes them, read in place. `of` gives None where the layer does not fit."""

    def __init__(self, layer: _Layer, heads: Heads, held: tuple[object, ...], backend: native.NativeBackend) -> None:
        self.layer, self.heads, self.backend = layer, heads, backend
        self._held = held  # keeps the memory alive

    @classmethod
    def of(
        cls,
        weights: Mapping[str, Planes],
        biases: Mapping[str, Tensor | None],
        norms: Mapping[str, Tensor | None],
        eps: float,
        heads: Heads,
        qkv_splits: int = 1,
    ) -> DecoderKernel | None:
        """`weights` by the names in WEIGHTS, `biases` in BIASES, `norms` in NORMS (None where there is none).
        q, k and v take their input in `qkv_splits` of int8, as QuantLinear's `activation_splits`.

        None where there is no native library, a tensor is not a contiguous float32 one on the CPU, or the shape is not
        one the kernel has code for.
        """
        backend = native.backend()
        if backend is None or not all(backend.supports(weight) for weight in weights.values()):
            return None
        floats = [tensor for tensor in (*biases.values(), *norms.values()) if tensor is not None]
        plain = all(t.device.type == "cpu" and t.dtype == torch.float32 and t.is_contiguous() for t in floats)
        shared = (weights[name] for name in BIASES)  # q, k and v have one input, with one sum for each group
        groups = {weight.group_size for weight in shared if weight.bits < 8}
        if not plain or len(groups) > 1 or not _heads_fit(heads) or not _shapes_fit(weights, biases, norms, heads):
            return None
        pointers = {f"{name}_bias": _pointer(biases.get(name)) for name in BIASES}
        pointers |= {f"{name}_norm": _pointer(norms.get(name)) for name in NORMS}
        structs = {name: native.describe(weights[name]) for name in WEIGHTS}
        shape = dict(zip(("heads", "kv_heads", "head_dim", "rotary_dim"), heads, strict=True))
        return cls(
            _Layer(**structs, **pointers, eps=eps, **shape, qkv_splits=qkv_splits),
            heads,
            (dict(weights), floats),
            backend,
        )


def run(kernels: Sequence[DecoderKernel], spans: Sequence[SpanRows], x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """x [rows, hidden], the float32 residual stream, goes through the layers in place: the rows of each span, one span
    behind the other. Their keys and values join the spans' caches. cos and sin are float32 [rows, rotary_dim / 2].

    A row's result depends on its own sequence alone, to the bit, however that is cut into calls.
    QuantError where a cache has no room for its rows, or shapes differ.
    """
    rows, turns = sum(span.rows for span in spans), (x.shape[0], kernels[0].heads.rotary_dim // 2)
    whole = rows == x.shape[0] and all(len(span.caches) == len(kernels) for span in spans)
    whole = whole and all(len(span.adapters) in (0, len(kernels)) for span in spans)
    if not whole or x.shape[1] != kernels[0].layer.q.k or cos.shape != turns or sin.shape != turns:
        found = f"{rows} rows of {[len(span.caches) for span in spans]} caches, {list(x.shape)}"
        raise QuantError(f"{len(kernels)} layers of {kernels[0].layer.q.k} do not fit {found}")
    for name, tensor in (("x", x), ("cos", cos), ("sin", sin)):
        if tensor.dtype != torch.float32 or not tensor.is_contiguous() or tensor.device.type != "cpu":
            raise QuantError(f"{name} must be contiguous float32 on the CPU")
    for span in spans:
        for cache in span.caches:
            if cache.length + span.rows > cache.capacity:
                found = f"a cache of {cache.capacity} tokens holds {cache.length}"
                raise QuantError(f"{found}: {span.rows} more do not fit")
    views = [(_Cache * len(kernels))(*(_cache(cache) for cache in span.caches)) for span in spans]
    described = (_Span * len(spans))(
        *(_Span(span.rows, caches, _lora(span.adapters)) for span, caches in zip(spans, views, strict=True))
    )
    kernels[0].backend.decoder_layers([ctypes.addressof(kernel.layer) for kernel in kernels], described, x, cos, sin)


def _cache(view: CacheView) -> _Cache:
    kind = native.FLOAT32 if view.keys.dtype == torch.float32 else native.INT8
    pointers = (view.keys, view.values, view.key_scale, view.value_scale, view.table)
    return _Cache(*(_pointer(tensor) for tensor in pointers), *view.strides, view.length, kind)


def _lora(adapters: Sequence[LayerAdapter | None]) -> ctypes.Array[ctypes.c_void_p] | None:
    if not any(adapters):
        return None
    addresses = (None if one is None else ctypes.addressof(one.structs) for one in adapters)
    return (ctypes.c_void_p * len(adapters))(*map(ctypes.c_void_p, addresses))


def _heads_fit(heads: Heads) -> bool:
    whole = heads.dim % TOKENS == 0 and heads.rotary_dim % 2 == 0 and heads.query % heads.key_value == 0
    whole = whole and heads.rotary_dim <= heads.dim
    return whole and heads.dim <= MAX_HEAD_DIM and heads.query // heads.key_value <= MAX_GROUP


def _shapes_fit(
    weights: Mapping[str, Planes],
    biases: Mapping[str, Tensor | None],
    norms: Mapping[str, Tensor | None],
    heads: Heads,
) -> bool:
    """The library believes every size it is told: here they are held to each other."""
    hidden, inner = weights["q"].shape[1], weights["down"].shape[1]
    rows = {"q": heads.query * heads.dim, "k": heads.key_value * heads.dim, "v": heads.key_value * heads.dim}
    wanted = {name: (rows[name], hidden) for name in BIASES}
    wanted |= {"o": (hidden, rows["q"]), "gate_up": (2 * inner, hidden), "down": (hidden, inner)}
    vectors = [(biases.get(name), rows[name]) for name in BIASES] + [(norms.get(name), hidden) for name in NORMS]
    whole = all(weights[name].shape == shape for name, shape in wanted.items())
    needed = norms.get("input") is not None and norms.get("post_attention") is not None
    return whole and needed and all(vector is None or vector.shape == (size,) for vector, size in vectors)


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
