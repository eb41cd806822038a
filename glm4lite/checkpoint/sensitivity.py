"""What a model's answers lose where a weight has fewer bits: measured on the calibration text, layer by layer.

To second order the KL divergence between a model and itself with weights changed by D is, summed over all positions,
half of E[<G, D>^2]: G is the gradient, by the weight, of the log likelihood of tokens that the model itself draws (the
Fisher information). The errors of rounding have no sign that anything depends on, so that of <G, D>^2 the squares are
left:

    loss(codec) = 1/2 * sum over rows i, columns k of  E[G_ik^2] * D_ik^2,    G_ik = sum over a text's tokens of g_i x_k

with g the gradient by the layer's output and x its input. A token's huge activations on which nothing depends count for
nothing so, and errors that add up over the tokens (in values, say) count. G and D are of a sample of rows, quantized
with each codec as all will be.

The layers are run forward, as calibration does; then the head, and the layers in their reverse order for the gradients
of a part of the tokens. In memory are one layer and the stream of these tokens before each layer. Codes are tried
without feedback between columns, which makes all of them better alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from glm4lite.checkpoint.calibration import Calibrator, matmul_dtype
from glm4lite.checkpoint.calibration_text import CalibrationIds
from glm4lite.checkpoint.checkpoint import BLOCK_BYTES, Checkpoint
from glm4lite.checkpoint.load_plan import Fill, LoadPlan
from glm4lite.checkpoint.streaming import Meter
from glm4lite.model.attention import Visibility
from glm4lite.model.config import Glm4Config
from glm4lite.model.layers import RMSNorm, layer_of
from glm4lite.model.rotary import RotaryEmbedding
from glm4lite_quant import Codec, Inputs, QuantConfig, QuantTensor
from glm4lite_quant.inputs import mean_square

WINDOWS, TOKENS = 4, 96  # the first of each of the first windows have gradients: at a 32B 300 MB of bfloat16 streams
ROWS = 128  # of a weight that are quantized with each codec
_TINY = 1e-30

Losses = Mapping[str, Mapping[Codec, float]]
"""Module -> codec -> nats by which a token's KL divergence grows."""


@dataclass(frozen=True)
class Sensitivity:
    """`losses` of the modules add up to what the model loses.

    outside: of tensors in no layer the mean squares [K] of what goes into them, as a Calibrator takes them.
    """

    losses: Losses
    outside: Mapping[str, Tensor]


@torch.inference_mode(False)
def measured(
    checkpoint: Checkpoint,
    plan: LoadPlan,
    config: Glm4Config,
    source: CalibrationIds,
    candidates: Mapping[str, Sequence[Codec]],
    meter: Meter,
) -> Sensitivity:
    """What each module loses with each of its candidates.

    plan: of a causal language model, in which all that have candidates are to be calibrated. The meter's total is twice
    the checkpoint's bytes.
    """
    found = _Measurement(checkpoint, plan, config, source, candidates, meter)
    found.forward()
    found.head()
    for number in reversed(range(config.num_hidden_layers)):
        found.layer(number)
    found.embedding()
    outside = {fill.source for fill in plan.fills if layer_of(fill.module) is None}
    return Sensitivity(found.losses, {name: known for name, known in found.importance.items() if name in outside})


class _Measurement:
    """The passes, in the order of `measured`."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        plan: LoadPlan,
        config: Glm4Config,
        source: CalibrationIds,
        candidates: Mapping[str, Sequence[Codec]],
        meter: Meter,
    ) -> None:
        self._checkpoint, self._plan, self._config, self._meter = checkpoint, plan, config, meter
        self._candidates, self._dtype = candidates, matmul_dtype()
        self._calibrator = Calibrator(checkpoint, plan, config, source, meter.add)
        self._ids = source.ids[:WINDOWS, :TOKENS]
        self._streams: list[Tensor] = []  # bfloat16 [W, T, H], before each layer and behind the last
        self._gradient = torch.zeros(0)  # float32 [W, T, H], by the stream before the last layer that was seen
        self.importance: dict[str, Tensor] = {}
        self.losses: dict[str, dict[Codec, float]] = {}

    def forward(self) -> None:
        """All layers; keeps what went into each."""
        for number in range(self._config.num_hidden_layers):
            self._streams.append(self._sampled())
            self._calibrator.run_to(number)
            for fill in self._fills(number):
                if fill.quant is not None:
                    _, inputs = self._calibrator.take(fill)
                    if inputs is not None:
                        self.importance[fill.source] = mean_square(inputs)
                self._meter.add(self._checkpoint.nbytes(fill.source))
        self._streams.append(self._sampled())

    @torch.no_grad()
    def head(self) -> None:
        """The answers: which tokens the model would draw, and the gradients of their likelihood."""
        fill = self._outside("lm_head", "embed_tokens")
        norm = RMSNorm(self._config.hidden_size, self._config.rms_norm_eps)
        stored = self._checkpoint.tensor(self._outside("norm").source)
        norm.weight = nn.Parameter(stored.float(), requires_grad=False)
        stream = self._streams.pop().float().requires_grad_()
        with torch.enable_grad():
            states = norm(stream, self._dtype)
        rows = states.detach().flatten(0, 1)
        likely, drawn = self._drawn(fill, rows)
        by_state, of_outputs, of_tokens = torch.zeros(rows.shape), [], torch.zeros(len(rows))
        for start, block, logits in self._logits(fill, rows):
            shares = (logits - likely[:, None]).exp()
            variance = shares * (1 - shares)
            of_outputs.append(variance.sum(0))
            of_tokens += variance.sum(1)
            here = (drawn >= start) & (drawn < start + len(block))
            shares[here, drawn[here] - start] -= 1
            by_state += (shares.to(self._dtype) @ block).float()
        self._gradient = torch.autograd.grad(states, stream, by_state.view_as(states).to(states.dtype))[0]
        squares = rows.float().square()
        self.importance[fill.source] = squares.mean(0)
        if fill.module in self._candidates:
            outputs = torch.cat(of_outputs)
            most = outputs.topk(min(ROWS, len(outputs))).indices.sort().values
            weight = torch.cat([self._checkpoint.rows(fill.source, row, row + 1) for row in most.tolist()])
            by_column = of_tokens @ squares / outputs.sum().clamp(min=_TINY)
            total = outputs.sum() / outputs[most].sum().clamp(min=_TINY)
            self._note(fill, weight, total * outputs[most, None] * by_column)

    def layer(self, number: int) -> None:
        """The next layer downwards."""
        fills = {fill.module: fill for fill in self._fills(number) if fill.quant is not None}
        layer, noted = self._calibrator.layer(number), dict[str, Tensor]()

        def note(name: str, inputs: Tensor, gradient: Tensor) -> None:
            by_row = gradient.detach().float()
            some = by_row[..., _some(by_row.shape[-1])]
            total = by_row.square().sum() / some.square().sum().clamp(min=_TINY)
            noted[name] = total * (some.mT @ inputs.detach().float()).square().sum(0)

        def watch(name: str, module: nn.Module) -> None:
            def hook(_: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> None:
                out.register_hook(lambda gradient: note(name, given[0], gradient))

            module.register_forward_hook(hook)

        for name in fills:
            place = layer_of(name)
            watch(name, layer.get_submodule(place[1] if place else name))
        stream = self._streams.pop().float().requires_grad_()
        length = stream.shape[1]
        rotary = RotaryEmbedding(self._config)(torch.arange(length)[None], self._dtype)
        with torch.enable_grad():
            out = layer(stream, self._dtype, rotary, Visibility(None, 0, length, stream.device), None, False)[0]
            self._gradient = torch.autograd.grad(out, stream, self._gradient)[0]
        for name, fill in fills.items():
            weight = self._calibrator.held(fill)
            self._note(fill, weight[_some(len(weight))], noted[name])
        self._meter.add(sum(self._checkpoint.nbytes(fill.source) for fill in self._fills(number)))

    def embedding(self) -> None:
        """The stream's first gradients are the embedding's: of each token's row."""
        fill = self._outside("embed_tokens")
        if fill.module not in self._candidates:
            return
        ids, places = self._ids.unique(return_inverse=True)
        weight = torch.cat([self._checkpoint.rows(fill.source, row, row + 1) for row in ids.tolist()])
        squares = torch.zeros(weight.shape)
        for where, gradient in zip(places, self._gradient, strict=True):
            squares += torch.zeros(weight.shape).index_add_(0, where, gradient).square()
        self.importance.setdefault(fill.source, squares.mean(0))  # a tied head has said already what counts
        self._note(fill, weight, squares)

    def _note(self, fill: Fill, weight: Tensor, squares: Tensor) -> None:
        """weight [R, K]: some rows; squares: of the gradients by it, as many times as they stand for other rows too."""
        importance, losses = self.importance.get(fill.source), self.losses.setdefault(fill.module, {})
        for codec in self._candidates[fill.module]:
            error = _error(weight, codec, importance)
            losses[codec] = losses.get(codec, 0.0) + 0.5 * float((squares * error).sum()) / self._ids.numel()

    def _drawn(self, fill: Fill, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Of each row the logarithm of the sum of all likelihoods, and a token drawn by them."""
        generator = torch.Generator().manual_seed(0)
        likely, best = torch.full((len(rows),), -torch.inf), torch.full((len(rows),), -torch.inf)
        drawn = torch.zeros(len(rows), dtype=torch.long)
        for start, _, logits in self._logits(fill, rows):
            likely = torch.logaddexp(likely, logits.logsumexp(1))
            noise = -torch.empty_like(logits).exponential_(generator=generator).log_()  # Gumbel's: the largest is drawn
            highest, at = (logits + noise).max(1)
            drawn = torch.where(highest > best, at + start, drawn)
            best = torch.maximum(best, highest)
        return likely, drawn

    def _logits(self, fill: Fill, rows: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        for start, block in self._checkpoint.row_blocks(fill.source, BLOCK_BYTES):
            self._meter.add()
            weight = block.to(self._dtype)
            yield start, weight, (rows @ weight.T).float()

    def _sampled(self) -> Tensor:
        return self._calibrator.state[1][:WINDOWS, :TOKENS].to(torch.bfloat16)

    def _fills(self, number: int) -> list[Fill]:
        return [fill for fill in self._plan.fills if (place := layer_of(fill.module)) and place[0] == number]

    def _outside(self, *names: str) -> Fill:
        """The weight of the first of these modules that there is; a language model has each but a tied head."""
        fills = (fill for fill in self._plan.fills if layer_of(fill.module) is None and fill.parameter == "weight")
        found = {fill.module.rpartition(".")[2]: fill for fill in fills}
        return next(found[name] for name in names if name in found)


def _some(rows: int) -> Tensor:
    """Numbers of rows that stand for all."""
    return torch.arange(0, rows, max(1, rows // ROWS))[:ROWS]


def _error(weight: Tensor, codec: Codec, importance: Tensor | None) -> Tensor:
    """The squares of what quantizing changes, float32."""
    made = QuantTensor.empty(weight.shape[0], weight.shape[1], QuantConfig(codec.bits, codec.group_size))
    rows = weight if weight.dtype in (torch.bfloat16, torch.float32) else weight.float()
    made.quantize_rows(0, rows, None if importance is None else Inputs(importance))
    return (made.dequantize() - rows.float()).square()
