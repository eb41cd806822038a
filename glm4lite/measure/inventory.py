"""What a loaded model consists of: its kernels, the bytes it holds on each device, the bytes a token reads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import nn

from glm4lite.model.layers import DecoderLayer
from glm4lite.runtime.disk_offload import DiskStore, streamed
from glm4lite.runtime.gpu_prefetch import PrefetchedStore
from glm4lite_quant import BnbLinear, QuantEmbedding, QuantLinear

if TYPE_CHECKING:
    from glm4lite.model.causal_lm import CausalLM
    from glm4lite.runtime.disk_ring import WeightRing
    from glm4lite.runtime.gpu_prefetch import Prefetcher


def kernel_names(model: nn.Module) -> dict[str, int]:
    """Backend and precision -> how many linear layers use it."""
    names: Counter[str] = Counter()
    for module in _with_shapes(model):
        if isinstance(module, QuantLinear):
            names[f"{module.kernel} int{module.weight_tensor.bits}"] += 1
        elif isinstance(module, BnbLinear):
            names[f"{module.kernel} {module.kind}"] += 1
        elif isinstance(module, nn.Linear):
            names[f"torch {str(module.weight.dtype).removeprefix('torch.')}"] += 1
    return dict(names)


def _with_shapes(model: nn.Module) -> Iterator[nn.Module]:
    """All modules; for a layer on disk those of a twin, since another thread may be computing with its own."""
    streaming = dict(_streamed(model))
    theirs = {module for layer in streaming for module in layer.modules()}
    yield from (module for module in model.modules() if module not in theirs)
    for layer, place in streaming.items():
        yield from place.shaped(layer).modules()


def read_bytes(model: CausalLM, positions: int) -> dict[str, int]:
    """Device that computes -> bytes that decoding one token reads there, with `positions` tokens in the cache."""
    found: Counter[str] = Counter()
    trunk = model.model
    for layer in trunk.layers:
        device = str(next(layer.parameters()).device)
        found[device] += _read(layer) + positions * trunk.cache_bytes // len(trunk.layers)
    found[str(trunk.norm.weight.device)] += _read(model.lm_head)
    return dict(found)


def _read(module: nn.Module) -> int:
    return sum(_weight_bytes(part) for part in module.modules())


def prefetcher_of(model: nn.Module) -> Prefetcher | None:
    """What carries layers to a GPU for long prompts; None where nothing has to."""
    stores = (module.store for module in model.modules() if isinstance(module, DecoderLayer))
    return next((store.bus for store in stores if isinstance(store, PrefetchedStore)), None)


def rings(model: nn.Module) -> list[WeightRing]:
    """The rings that stream layers from disk."""
    return list({id(place.ring): place.ring for _, place in _streamed(model)}.values())


def devices(model: CausalLM) -> dict[str, dict[str, Any]]:
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


def _streamed(model: nn.Module) -> Iterator[tuple[DecoderLayer, DiskStore]]:
    for module in model.modules():
        if isinstance(module, DecoderLayer) and (place := streamed(module)) is not None:
            yield module, place
