"""What goes into each layer, found while the checkpoint streams by: a layer is read, run, quantized and dropped.

An error in a weight counts as much as what is multiplied with it, and where inputs go together one error can make up
for another: `glm4lite_quant.Inputs` says how, from what each linear was given. One decoder layer is in memory at a
time, as it is stored or, where that is float32, rounded to bfloat16, with these inputs; the calibration tokens'
activations go from layer to layer.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glm4lite.checkpoint.calibration_text import TOKENS, CalibrationIds
from glm4lite.checkpoint.checkpoint import BLOCK_BYTES, Checkpoint
from glm4lite.checkpoint.load_plan import Fill, LoadPlan
from glm4lite.checkpoint.shard import DTYPES
from glm4lite.model.attention import Visibility
from glm4lite.model.config import Glm4Config
from glm4lite.model.layers import DecoderLayer, layer_of
from glm4lite.model.rotary import RotaryEmbedding
from glm4lite_quant import Inputs, QuantConfig
from glm4lite_quant.inputs import mean_square

logger = logging.getLogger("glm4lite")

RECORDED = torch.bfloat16
"""The type in which inputs are kept: float32's range, and more digits than counts."""

_Layer: TypeAlias = list[tuple[str, Fill]]
"""The parameters of a decoder layer, each with the name that its module has there."""


class Calibrator:
    """Runs the layers of a checkpoint, in their order, as their weights are asked for.

    `poll` is called often enough that an exception it raises stops the work within half a second. state: what
    `Calibrator.state` was when an earlier process had come so far. outside: of tensors that are in no layer the mean
    squares [K] of what goes into them, where somebody knows them.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        plan: LoadPlan,
        config: Glm4Config,
        source: CalibrationIds,
        poll: Callable[[], None],
        state: tuple[int, Tensor] | None = None,
        outside: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.record = source.record
        self._outside = outside or {}
        self._checkpoint, self._config, self._poll = checkpoint, config, poll
        self._dtype = matmul_dtype()
        self._layers = _by_layer(plan)
        self._held: dict[str, _RecordingLinear] = {}
        if state is None:
            embedding = next(fill.source for fill in plan.fills if fill.module.endswith("embed_tokens"))
            state = 0, self._embedded(embedding, source.ids)
        self._next, self._stream = state  # the stream is the residual one, float32 [W, T, H]
        self._rotary = RotaryEmbedding(config)(torch.arange(source.ids.shape[1])[None], self._dtype)

    @property
    def state(self) -> tuple[int, Tensor]:
        """The number of the next layer, and what goes into it, float32 [W, T, H]: enough to go on with later."""
        return self._next, self._stream

    def take(self, fill: Fill) -> tuple[Tensor | None, Tensor | None]:
        """(the weight exactly as it is stored, its inputs bfloat16 [tokens, K]); each may be taken once.

        The first is None where it was held rounded, and is to be read again; the second of int8, and where the
        activations left float32; both of what is in no layer.
        """
        place = layer_of(fill.module)
        if place is None:
            return None, None
        self.run_to(place[0])
        linear = self._held.pop(fill.source)
        weight = linear.weight if linear.weight.dtype == self._stored_dtype(fill.source) else None
        if linear.inputs is not None and not bool(mean_square(linear.inputs).isfinite().all()):
            logger.warning("%s: its calibration inputs are not finite; quantized without them", fill.source)
            return weight, None
        return weight, linear.inputs

    def outside(self, fill: Fill) -> Inputs | None:
        """What is known of the inputs of a tensor in no layer."""
        known = self._outside.get(fill.source)
        return None if known is None else Inputs(known)

    def run_to(self, number: int) -> None:
        """Runs what comes before a layer, and itself."""
        while self._next <= number:
            self._run(self._layers[self._next])
            self._next += 1

    def layer(self, number: int) -> nn.Module:
        """A layer by itself, in place of the one that was held."""
        self._held.clear()
        return self._read(self._layers[number])

    def held(self, fill: Fill) -> Tensor:
        """The weight of the layer that is held, in bfloat16 where float32 is stored."""
        return self._held[fill.source].weight

    def _embedded(self, name: str, ids: Tensor) -> Tensor:
        distinct, places = ids.unique(return_inverse=True)
        rows = []
        for row in distinct.tolist():
            self._poll()
            rows.append(self._checkpoint.rows(name, row, row + 1).float())
        return torch.cat(rows)[places]

    @torch.inference_mode()
    def _run(self, fills: _Layer) -> None:
        """Reads a layer, and moves the residual stream of every window through it."""
        self._held.clear()
        layer = self._read(fills)
        visible = Visibility(None, 0, self._stream.shape[1], self._stream.device)
        for window in self._stream.split(1):
            window.copy_(layer(window, self._dtype, self._rotary, visible, None, False)[0])

    def _read(self, fills: _Layer) -> nn.Module:
        """The layer with recording linears; those that will be quantized are held."""
        with torch.device("meta"):
            layer = DecoderLayer(self._config)
        for name, fill in fills:
            self._poll()
            values, module = self._values(fill.source), layer.get_submodule(name)
            if isinstance(module, nn.Linear):
                module = _RecordingLinear(self._dtype, self._poll)
                _replace(layer, name, module)
            if isinstance(module, _RecordingLinear):
                setattr(module, fill.parameter, values)
                if fill.quant is not None:
                    self._held[fill.source] = module
                    if _records(fill):
                        module.inputs = values.new_empty(self._stream[..., 0].numel(), fill.shape[1], dtype=RECORDED)
            else:
                setattr(module, fill.parameter, nn.Parameter(values.float(), requires_grad=False))
        return layer

    def _values(self, name: str) -> Tensor:
        """A tensor of the layer. A matrix of float32 is rounded as it is read: what 8-bit codes and float16 scales make
        takes twice the memory so, and what it is multiplied with is rounded too.
        """
        if len(self._checkpoint.shape(name)) != 2 or self._stored_dtype(name) != torch.float32:
            values = self._checkpoint.tensor(name)
            self._checkpoint.check_finite(name, values)
            return values
        values = torch.empty(self._checkpoint.shape(name), dtype=torch.bfloat16)
        for start, rows in self._checkpoint.row_blocks(name, BLOCK_BYTES):
            self._poll()
            self._checkpoint.check_finite(name, rows, start)
            values[start : start + len(rows)] = rows
        return values

    def _stored_dtype(self, name: str) -> torch.dtype:
        return DTYPES[self._checkpoint.dtype(name)]


class _RecordingLinear(nn.Module):
    """A linear that multiplies in `dtype`, and keeps what it was given in `inputs` [tokens, K], where there are any."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, dtype: torch.dtype, poll: Callable[[], None]) -> None:
        super().__init__()
        self.dtype, self.poll = dtype, poll
        self.bias = None
        self.inputs: Tensor | None = None
        self.count = 0

    def forward(self, x: Tensor) -> Tensor:
        self.poll()
        rows = x.flatten(0, -2)
        if self.inputs is not None:
            self.inputs[self.count : self.count + len(rows)] = rows.detach()
            self.count += len(rows)
        bias = None if self.bias is None else self.bias.to(self.dtype)
        if self.weight.dtype == self.dtype:
            return F.linear(x, self.weight, bias)
        step = max(1, BLOCK_BYTES // (self.weight.shape[1] * self.dtype.itemsize))  # else all of it is there twice
        y = torch.cat([F.linear(x, rows.to(self.dtype)) for rows in self.weight.split(step)], -1)
        return y if bias is None else y.add_(bias)


def _replace(layer: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(layer.get_submodule(parent), leaf, module)


def _by_layer(plan: LoadPlan) -> list[_Layer]:
    layers: dict[int, _Layer] = {}
    for fill in plan.fills:
        place = layer_of(fill.module)
        if place is not None:
            layers.setdefault(place[0], []).append((place[1], fill))
    return [layers[index] for index in range(len(layers))]


def _records(fill: Fill) -> bool:
    return isinstance(fill.quant, QuantConfig) and fill.quant.bits < 8


def layer_bytes(checkpoint: Checkpoint, plan: LoadPlan) -> int:
    """Bytes of the largest layer and of its inputs: what a Calibrator holds beside the model."""

    def held(fill: Fill) -> int:
        inputs = TOKENS * fill.shape[1] * RECORDED.itemsize if _records(fill) else 0
        return checkpoint.nbytes(fill.source) // (2 if checkpoint.dtype(fill.source) == "F32" else 1) + inputs

    return max(sum(held(fill) for _, fill in layer) for layer in _by_layer(plan))


def matmul_dtype() -> torch.dtype:
    """bfloat16 where the processor multiplies it natively, else float32."""
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    native = any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)
    return torch.bfloat16 if native else torch.float32
