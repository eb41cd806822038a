"""Decoder layers in one native call, where all of their linears are quantized on the CPU."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glm4lite.model.attention import Visibility
from glm4lite.model.cache import Caches, parts_of
from glm4lite.model.layers import DecoderLayer
from glm4lite.model.lora import BASE, adapters_in, chosen
from glm4lite.model.packed_cache import PackedLayerCache
from glm4lite_quant import QuantLinear
from glm4lite_quant.kernels import decoder
from glm4lite_quant.kernels.decoder import DecoderKernel, LayerAdapter, SpanRows


class FusedLayers:
    """Runs layers in the native library, whose form of each it makes anew when the layer's tensors have moved."""

    def __init__(self) -> None:
        self._made: weakref.WeakKeyDictionary[DecoderLayer, tuple[tuple[int, ...], DecoderKernel | None]]
        self._made = weakref.WeakKeyDictionary()
        self._adapters: weakref.WeakKeyDictionary[DecoderLayer, dict[int, LayerAdapter]]
        self._adapters = weakref.WeakKeyDictionary()

    def adapter(self, layer: DecoderLayer, kernel: DecoderKernel, number: int) -> LayerAdapter | None:
        """An adapter's part of a layer for the native library, made anew when its tensors have moved."""
        made = self._adapters.setdefault(layer, {})
        known = made.get(number)
        if known is None or known.moved:
            held = {name: adapters_in(linear) for name, linear in _linears_of(layer).items()}
            paths = {name: path for name, lora in held.items() if lora is not None and (path := lora.of(number))}
            known = made[number] = LayerAdapter(kernel, paths)
        return known if known.paths else None

    def kernel(self, layer: DecoderLayer) -> DecoderKernel | None:
        """None where the layer must run as torch code: not quantized, on another device, or no native library."""
        linears = _linears(layer)
        if linears is None:
            return None
        norms = _norms(layer)
        held = (*(linear.qweight for linear in linears.values()), *norms.values())
        source = tuple(tensor.data_ptr() for tensor in held if tensor is not None)
        known = self._made.get(layer)
        if known is None or known[0] != source:
            known = self._made[layer] = source, _make(layer, linears, norms)
        return known[1]

    def run(
        self,
        layers: Iterable[DecoderLayer],
        x: Tensor,
        dtype: torch.dtype,
        rotary: tuple[Tensor, Tensor],
        visible: Visibility,
        caches: Sequence[Caches | None],
    ) -> Tensor | None:
        """x [1, T, H] after the layers; None, with nothing done, where they must run as torch code."""
        fits = dtype == torch.float32 and x.shape[0] == 1 and x.shape[1] > 0
        if not fits or not visible.causal_only or (torch.is_grad_enabled() and x.requires_grad):
            return None
        rows = [part.length for part in visible.parts]
        packed = [[own for own in parts_of(cache) if isinstance(own, PackedLayerCache)] for cache in caches]
        layers = list(layers)
        kernels = [kernel for layer in layers if (kernel := self.kernel(layer)) is not None]
        if len(kernels) != len(caches) or any(len(of_layer) != len(rows) for of_layer in packed):
            return None
        heads = kernels[0].heads
        out = x.detach().clone(memory_format=torch.contiguous_format)
        cos, sin = (part.expand(1, 1, x.shape[1], -1)[0, 0].contiguous() for part in rotary)
        numbers = [number for _, number in chosen()] or [BASE] * len(rows)
        adapters = {
            number: [self.adapter(layer, kernel, number) for layer, kernel in zip(layers, kernels, strict=True)]
            for number in set(numbers)
        }
        spans = [
            SpanRows(count, [own.view(count, heads, x.device, dtype) for own in of_sequence], adapters[number])
            for count, of_sequence, number in zip(rows, zip(*packed, strict=True), numbers, strict=True)
        ]
        decoder.run(kernels, spans, out[0], cos, sin)
        for of_layer in packed:
            for own, count in zip(of_layer, rows, strict=True):
                own.length += count
        return out


def _linears_of(layer: DecoderLayer) -> dict[str, nn.Module]:
    attention, mlp = layer.self_attn, layer.mlp
    return {
        "q": attention.q_proj,
        "k": attention.k_proj,
        "v": attention.v_proj,
        "o": attention.o_proj,
        "gate_up": mlp.gate_up_proj,
        "down": mlp.down_proj,
    }


def _linears(layer: DecoderLayer) -> dict[str, QuantLinear] | None:
    found = _linears_of(layer)
    quantized = {name: module for name, module in found.items() if isinstance(module, QuantLinear)}
    return quantized if len(quantized) == len(found) else None


def _norms(layer: DecoderLayer) -> dict[str, Tensor | None]:
    return {
        "input": layer.input_layernorm.weight,
        "post_self_attn": layer.post_self_attn_layernorm.weight if layer.sandwich else None,
        "post_attention": layer.post_attention_layernorm.weight,
        "post_mlp": layer.post_mlp_layernorm.weight if layer.sandwich else None,
    }


def _make(
    layer: DecoderLayer, linears: dict[str, QuantLinear], norms: dict[str, Tensor | None]
) -> DecoderKernel | None:
    if layer.mlp.activation_fn is not F.silu or any(
        linears[name].bias is not None for name in ("o", "gate_up", "down")
    ):
        return None
    splits = {name: linear.activation_splits for name, linear in linears.items()}
    if (
        splits["q"] != splits["k"]
        or splits["q"] != splits["v"]
        or any(splits[name] != 1 for name in ("o", "gate_up", "down"))
    ):
        return None
    weights = {name: linear.weight_tensor for name, linear in linears.items()}
    biases = {name: linears[name].bias for name in ("q", "k", "v")}
    return DecoderKernel.of(weights, biases, norms, layer.input_layernorm.eps, layer.self_attn.heads, splits["q"])
