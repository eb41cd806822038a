"""SamplingParams and the choice of the next token. Names and order of the filters are Transformers' and vLLM's."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from glm4lite.errors import SamplingError

if TYPE_CHECKING:
    from torch import Generator, Tensor

# (name, type, smallest, largest) of every number; None: no bound
_RANGES: tuple[tuple[str, type, float, float | None], ...] = (
    ("temperature", float, 0, None),
    ("top_k", int, 0, None),
    ("top_p", float, 0, 1),
    ("min_p", float, 0, 1),
    ("repetition_penalty", float, 1e-3, None),
    ("seed", int, 0, 2**63 - 1),
    ("max_new_tokens", int, 1, None),
)


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen. temperature 0 is greedy; top_k 0, top_p 1, min_p 0, repetition_penalty 1 switch off.

    `stop` are texts that end the answer (and are not part of it). The same seed gives the same text; without one
    each answer differs. Raises SamplingError for a value out of range.
    """

    temperature: float = 0.6
    top_k: int = 0
    top_p: float = 0.8
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    max_new_tokens: int = 1024

    def __post_init__(self) -> None:
        for name, kind, smallest, largest in _RANGES:
            value = getattr(self, name)
            if name == "seed" and value is None:
                continue
            upper = math.inf if largest is None else largest
            if not _is_number(value, kind) or not smallest <= value <= upper:
                what = "a whole number" if kind is int else "a number"
                bounds = f"at least {smallest}" if largest is None else f"between {smallest} and {largest}"
                raise SamplingError(f"{name} must be {what} {bounds}, found {str(value)[:40]}")
        if isinstance(self.stop, str):
            raise SamplingError(f"stop must be a list of texts, found {self.stop!r}")
        if not all(self.stop):
            raise SamplingError("stop: an empty text would end every answer before its first character")

    @classmethod
    def check(cls, **values: Any) -> None:
        """Raises SamplingError for a value out of range; None says nothing. For checks before a long load."""
        cls(**{name: value for name, value in values.items() if value is not None})

    @classmethod
    def from_generation_config(cls, values: dict[str, Any], **changes: Any) -> SamplingParams:
        """A checkpoint's own defaults; do_sample false means greedy. `changes` that are not None win over them."""
        if values.get("do_sample") not in (None, True, False):
            raise SamplingError(
                f"generation_config.json: do_sample must be true or false, found {values['do_sample']!r}"
            )
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        chosen = {name: values[name] for name in names if values.get(name) is not None}
        if values.get("do_sample") is False:
            chosen["temperature"] = 0.0
        try:
            cls(**chosen)
        except SamplingError as error:
            raise SamplingError(f"generation_config.json: {error}; correct the file") from None
        return cls(**chosen | {name: value for name, value in changes.items() if value is not None})


def _is_number(value: object, kind: type) -> bool:
    if isinstance(value, float):
        return kind is float and math.isfinite(value)
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


class Sampler:
    """Draws token ids from logits under SamplingParams; one Sampler per answer, since the seed starts anew."""

    def __init__(self, params: SamplingParams) -> None:
        import torch

        self.params = params
        self.generator: Generator = torch.Generator()
        if params.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(params.seed)

    def __call__(self, logits: Tensor, seen: list[int]) -> int:
        """logits [V] float32 -> one id; `seen` are the ids that repetition_penalty makes less likely."""
        params = self.params
        if params.repetition_penalty != 1.0:
            logits = _penalized(logits, seen, params.repetition_penalty)
        if params.temperature == 0:
            return int(logits.argmax())
        logits = logits.cpu()
        # The largest is brought to 0 first, so that a tiny temperature makes others impossible and nothing NaN.
        probs = _filtered((logits - logits.max()) / params.temperature, params).softmax(-1)
        return int(probs.multinomial(1, generator=self.generator))


def _penalized(logits: Tensor, seen: list[int], penalty: float) -> Tensor:
    """CTRL's penalty (arXiv 1909.05858): positive logits of seen ids are divided by it, negative ones multiplied."""
    import torch

    ids = torch.tensor(sorted(set(seen)), device=logits.device)
    chosen = logits[ids]
    logits = logits.clone()
    logits[ids] = torch.where(chosen > 0, chosen / penalty, chosen * penalty)
    return logits


def _filtered(logits: Tensor, params: SamplingParams) -> Tensor:
    """Ids outside top_k, top_p and min_p become impossible; the likeliest one always stays."""
    impossible = float("-inf")
    if 0 < params.top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(params.top_k).values[-1], impossible)
    if params.top_p < 1:
        logits = _nucleus(logits, params.top_p)
    if params.min_p > 0:
        probs = logits.softmax(-1)
        logits = logits.masked_fill(probs < params.min_p * probs.max(), impossible)
    return logits


def _nucleus(logits: Tensor, top_p: float) -> Tensor:
    """The fewest likeliest ids that together have the probability top_p; at least one.

    They are looked for among the likeliest 1024 first: sorting a vocabulary of 151 552 takes as long as a layer.
    """
    probs = logits.softmax(-1)
    for count in (1024, len(probs)):
        ordered, order = probs.topk(min(count, len(probs)))
        sums = ordered.cumsum(-1)
        if sums[-1] > top_p or count >= len(probs):
            break
    kept = order[sums - ordered <= top_p]
    chosen = order[:1] if kept.numel() == 0 else kept
    return logits.new_full(logits.shape, float("-inf")).index_copy(0, chosen, logits[chosen])
