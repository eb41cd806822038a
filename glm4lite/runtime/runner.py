"""How a loaded model's layers are computed: natively on a CPU, as a recorded graph on a GPU, else by torch's code."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from glm4lite.model.attention import Visibility
from glm4lite.model.cache import Caches, HomeCache
from glm4lite.model.layers import DecoderLayer
from glm4lite.model.trunk import Trunk
from glm4lite.runtime.cuda_graph import StepGraphs
from glm4lite.runtime.fused import FusedLayers

STEP_TOKENS = 8


class FastRunner:
    """One model's: what its layers share. A copy of the model makes its own, for what is kept here holds addresses."""

    few = STEP_TOKENS

    def __init__(self) -> None:
        self.layers, self.graphs = FusedLayers(), StepGraphs()

    def run(
        self,
        layers: Sequence[DecoderLayer],
        x: Tensor,
        dtype: torch.dtype,
        rotary: tuple[Tensor, Tensor],
        visible: Visibility,
        caches: Sequence[Caches | None],
    ) -> Tensor | None:
        if x.device.type == "cpu":
            return self.layers.run(layers, x, dtype, rotary, visible, caches)
        at_home = [cache for cache in caches if isinstance(cache, HomeCache)]  # a graph writes into no other
        if len(layers) == 1 or len(at_home) != len(layers):
            return None
        return self.graphs.run(layers, x, dtype, rotary, visible, at_home)

    def fuses(self, layer: DecoderLayer) -> bool:
        return self.layers.kernel(layer) is not None

    def clear(self) -> None:
        self.graphs.clear()

    def __deepcopy__(self, memo: object) -> FastRunner:
        return FastRunner()

    def __reduce__(self) -> tuple[type[FastRunner], tuple[()]]:
        return FastRunner, ()


def attach(model: nn.Module) -> None:
    """Gives a model, whose weights may come later, what computes its layers faster than torch's code."""
    runner = FastRunner()
    for module in model.modules():
        if isinstance(module, Trunk | DecoderLayer):
            module.runner = runner


def graphs_of(trunk: Trunk) -> StepGraphs | None:
    """The recordings of a model on GPUs; None where torch's code computes everything."""
    return trunk.runner.graphs if isinstance(trunk.runner, FastRunner) else None
