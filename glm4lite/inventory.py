"""What a loaded model consists of: its kernels, the bytes it holds on each device, the bytes a token reads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from torch import nn

from glm4lite.cache import bytes_per_token
from glm4lite.model import DecoderLayer
from glm4lite.offload import OnDisk, streamed
from glm4lite_quant import BnbLinear, QuantEmbedding, QuantLinear

if TYPE_CHECKING:
    from glm4lite.model import Glm4ForCausalLM
    from glm4lite.weights.ring import WeightRing


_TABLES = (nn.Embedding, QuantEmbedding)  # of which a token reads one row


def kernel_names(model: nn.Module) -> dict[str, int]:
    """Backend and precision -> how many linear layers use it."""
    names: Counter[str] = Counter()
    with ExitStack() as stack:
        for layer, place in _streamed(model):
            stack.enter_context(place.shapes_at_hand(layer))
        for module in model.modules():
            if isinstance(module, QuantLinear):
                names[f"{module.kernel} int{module.weight_tensor.bits}"] += 1
            elif isinstance(module, BnbLinear):
                names[f"{module.kernel} {module.kind}"] += 1
            elif isinstance(module, nn.Linear):
                names[f"torch {str(module.weight.dtype).removeprefix('torch.')}"] += 1
    return dict(names)


def read_bytes(model: Glm4ForCausalLM, positions: int) -> int:
    """Bytes that decoding one token reads with `positions` tokens in the cache, wherever they lie."""
    total = sum(_weight_bytes(module) for module in model.modules() if not isinstance(module, _TABLES))
    return total + positions * bytes_per_token(model.config, model.model.kv, model.model.dtype.itemsize)


def rings(model: nn.Module) -> list[WeightRing]:
    """The rings that stream layers from disk."""
    return list({id(place.ring): place.ring for _, place in _streamed(model)}.values())


def devices(model: Glm4ForCausalLM) -> dict[str, dict[str, Any]]:
    """Device ("cuda:0", "cpu", "disk") -> layers there, and bytes of all weights, embedding and head included."""
    found: dict[str, dict[str, Any]] = {}

    def add(device: str, module: nn.Module, layers: int = 0) -> None:
        held = found.setdefault(device, {"layers": 0, "weights": 0})
        held["layers"] += layers
        held["weights"] += sum(_weight_bytes(part) for part in module.modules())

    for layer in model.model.layers:
        on_disk = isinstance(layer, DecoderLayer) and streamed(layer) is not None
        add("disk" if on_disk else str(next(layer.parameters()).device), layer, 1)
    for module in (model.model.embed_tokens, model.lm_head):
        tensors = (*module.parameters(), *module.buffers())
        add(str(tensors[0].device), module)
    return found


def _weight_bytes(module: nn.Module) -> int:
    """Of the module's own matrix; norms and biases do not count."""
    if isinstance(module, QuantLinear | QuantEmbedding | BnbLinear):
        return module.weight_tensor.nbytes
    return module.weight.nbytes if isinstance(module, nn.Linear | nn.Embedding) else 0


def _streamed(model: nn.Module) -> Iterator[tuple[DecoderLayer, OnDisk]]:
    for module in model.modules():
        if isinstance(module, DecoderLayer) and (place := streamed(module)) is not None:
            yield module, place
