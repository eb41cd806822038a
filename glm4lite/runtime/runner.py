"""How a loaded model's layers are computed: natively on a CPU, as a recorded graph on a GPU, else by torch's code."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from glm4lite.model.attention import Visibility
from glm4lite.model.cache import Caches, HomeCache, HomeCaches, SpanCaches
from glm4lite.model.layers import DecoderLayer
from glm4lite.model.lora import chosen
from glm4lite.model.step import Span
from glm4lite.model.trunk import Trunk
from glm4lite.runtime import cuda_graph
from glm4lite.runtime.cuda_graph import StepGraphs
from glm4lite.runtime.fused import FusedLayers

STEP_TOKENS = 8
"""That go through a CPU's layers in one call."""


class FastRunner:
    """One model's: what its layers share. A copy of the model makes its own, for what is kept here holds addresses."""

    def __init__(self) -> None:
        self.layers, self.graphs = FusedLayers(), StepGraphs()

    def few(self, device: torch.device) -> int:
        return cuda_graph.SIZES[-1] if cuda_graph.records(device) else STEP_TOKENS

    def run(
        self,
        layers: Sequence[DecoderLayer],
        x: Tensor,
        dtype: torch.dtype,
        rotary: tuple[Tensor, Tensor],
        visible: Visibility,
        caches: Sequence[Caches | None],
    ) -> Tensor | None:
        if not cuda_graph.records(x.device):
            return self.layers.run(layers, x, dtype, rotary, visible, caches)
        if chosen():  # a recording knows no rows of several adapters
            return None
        at_home = [home for cache in caches if (home := _at_home(cache)) is not None]
        if len(layers) == 1 or len(at_home) != len(layers):
            return None
        return self.graphs.run(layers, x, dtype, rotary, visible, at_home)

    def groups(self, layers: Sequence[DecoderLayer], spans: Sequence[Span]) -> list[list[int]]:
        """On a GPU a few rows each go as graphs, apart from a prompt's many: there reading the weights once more takes
        less time than launching torch's code for every sequence. Elsewhere a read serves all."""
        everything = list(range(len(spans)))
        if not all(cuda_graph.records(layer.device) for layer in layers):
            return [everything]
        most, few, rows = cuda_graph.SIZES[-1], list[list[int]](), 0
        many = []
        for at, span in enumerate(spans):
            if len(span.ids) > most or not all(part.in_blocks for part in span.cache.layers):
                many.append(at)
                continue
            rows += len(span.ids)
            if not few or rows > most:
                few.append([])
                rows = len(span.ids)
            few[-1].append(at)
        return [*few, many] if many else few

    def fuses(self, layer: DecoderLayer) -> bool:
        return self.layers.kernel(layer) is not None

    def clear(self) -> None:
        self.graphs.clear()

    def __deepcopy__(self, memo: object) -> FastRunner:
        return FastRunner()

    def __reduce__(self) -> tuple[type[FastRunner], tuple[()]]:
        return FastRunner, ()


def _at_home(caches: Caches | None) -> HomeCaches | None:
    """A layer's caches where all lie where they stay: a graph writes into no others."""
    if not isinstance(caches, SpanCaches):
        return caches if isinstance(caches, HomeCache) else None
    parts = [part for part in caches.parts if isinstance(part, HomeCache)]
    return SpanCaches(parts) if len(parts) == len(caches.parts) else None


def attach(model: nn.Module) -> None:
    """Gives a model, whose weights may come later, what computes its layers faster than torch's code."""
    runner = FastRunner()
    for module in model.modules():
        if isinstance(module, Trunk | DecoderLayer):
            module.runner = runner


def graphs_of(trunk: Trunk) -> StepGraphs | None:
    """The recordings of a model on GPUs; None where torch's code computes everything."""
    return trunk.runner.graphs if isinstance(trunk.runner, FastRunner) else None
