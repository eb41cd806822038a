"""A decoder layer's way into one native call, where all of its linears are quantized on the CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from glm4lite_quant import QuantLinear
from glm4lite_quant.kernels.decoder import DecoderKernel, Heads
from glm4lite_quant.tensor import NAMES

if TYPE_CHECKING:
    from glm4lite.model import DecoderLayer


class FusedLayer:
    """Holds the native form of one layer, and makes it anew when the layer's tensors have moved."""

    def __init__(self) -> None:
        self._kernel: DecoderKernel | None = None
        self._source: tuple[int, ...] | None = None

    def kernel(self, layer: DecoderLayer) -> DecoderKernel | None:
        """None where the layer must run as torch code: not quantized, on another device, or no native library."""
        linears = _linears(layer)
        if linears is None:
            return None
        norms = _norms(layer)
        source = tuple(tensor.data_ptr() for tensor in _tensors(linears, norms))
        if source != self._source:
            self._kernel, self._source = _make(layer, linears, norms), source
        return self._kernel

    def __getstate__(self) -> dict[str, None]:
        return {"_kernel": None, "_source": None}  # addresses: a copy makes its own


def _linears(layer: DecoderLayer) -> dict[str, QuantLinear] | None:
    attention, mlp = layer.self_attn, layer.mlp
    found = {
        "q": attention.q_proj,
        "k": attention.k_proj,
        "v": attention.v_proj,
        "o": attention.o_proj,
        "gate_up": mlp.gate_up_proj,
        "down": mlp.down_proj,
    }
    quantized = {name: module for name, module in found.items() if isinstance(module, QuantLinear)}
    return quantized if len(quantized) == len(found) else None


def _norms(layer: DecoderLayer) -> dict[str, Tensor | None]:
    return {
        "input": layer.input_layernorm.weight,
        "post_self_attn": layer.post_self_attn_layernorm.weight if layer.sandwich else None,
        "post_attention": layer.post_attention_layernorm.weight,
        "post_mlp": layer.post_mlp_layernorm.weight if layer.sandwich else None,
    }


def _tensors(linears: dict[str, QuantLinear], norms: dict[str, Tensor | None]) -> list[Tensor]:
    held = [linear._buffers[name] for linear in linears.values() for name in (*NAMES, "bias")]
    return [tensor for tensor in (*held, *norms.values()) if tensor is not None]


def _make(
    layer: DecoderLayer, linears: dict[str, QuantLinear], norms: dict[str, Tensor | None]
) -> DecoderKernel | None:
    if linears["o"].bias is not None or linears["gate_up"].bias is not None or linears["down"].bias is not None:
        return None
    weights = {name: linear.weight_tensor for name, linear in linears.items()}
    biases = {name: linears[name].bias for name in ("q", "k", "v")}
    return DecoderKernel.of(weights, biases, norms, layer.input_layernorm.eps, layer.self_attn.heads)
