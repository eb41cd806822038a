"""SamplingParams and the choice of the next token. Names and order of the filters are Transformers' and vLLM's."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from glm4lite.base.errors import ModelError, SamplingError

if TYPE_CHECKING:
    from torch import Generator, Tensor

FEW = 1024  # ids among which a CPU looks first

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

    `stop` are texts that end the answer (and are not part of it); `max_new_tokens` counts the answer alone. The same
    seed gives the same text; without one each answer differs. Raises SamplingError for a value out of range.
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
    """Draws token ids from logits under SamplingParams; one Sampler per answer, since the seed starts anew.

    A drawn number picks its place in the cumulative distribution, so that a seed means the same wherever the logits
    lie; they stay on their device, and one integer comes back.
    """

    def __init__(self, params: SamplingParams) -> None:
        import torch

        self.params = params
        self.generator: Generator = torch.Generator()
        if params.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(params.seed)

    def __call__(self, logits: Tensor, seen: list[int]) -> int:
        """logits [V] float32 -> one id; `seen` are the ids that repetition_penalty makes less likely.

        Raises ModelError where the logits are not finite.
        """
        import torch

        params = self.params
        if params.repetition_penalty != 1.0:
            logits = _penalized(logits, seen, params.repetition_penalty)
        top = logits.max()
        if params.temperature == 0:
            chosen = logits.argmax()
        else:
            # The largest is brought to 0 first, so that a tiny temperature makes others impossible and nothing NaN.
            drawn = torch.rand((), generator=self.generator, dtype=torch.float64).item()
            chosen = _pick((logits - top) / params.temperature, params, drawn)
        token = int(chosen.where(top.isfinite(), -1))  # all that comes back from a GPU
        if token < 0:
            raise ModelError("the model's output is not finite: its weights are damaged, or do not fit its config.json")
        return token


def _penalized(logits: Tensor, seen: list[int], penalty: float) -> Tensor:
    """CTRL's penalty (arXiv 1909.05858): positive logits of seen ids are divided by it, negative ones multiplied."""
    import torch

    ids = torch.tensor(sorted(set(seen)), device=logits.device)
    chosen = logits[ids]
    logits = logits.clone()
    logits[ids] = torch.where(chosen > 0, chosen / penalty, chosen * penalty)
    return logits


def _pick(logits: Tensor, params: SamplingParams, drawn: float) -> Tensor:
    """The id at `drawn` (0 to 1) of the cumulative distribution of what the filters leave, the likeliest ids first.

    On a CPU it is looked for among the likeliest 1024: sorting a vocabulary of 151 552 takes as long as a layer. A GPU
    sorts faster than it could be asked whether they were enough.
    """
    total = len(logits)
    few = min(max(FEW, params.top_k + 1), total)
    for count in (few, total) if logits.device.type == "cpu" else (total,):
        values, ids = logits.topk(count) if count < total else logits.sort(descending=True)
        probs = (values - _normalizer(logits, values, params)).exp()
        kept = _kept(probs, params)
        if count == total or _enough(probs, kept, params, drawn):
            break
    sums = (probs * kept).cumsum(-1)
    place = (sums <= drawn * _mass(sums, params, count == total)).sum()
    return ids.take(place.clamp(max=kept.sum() - 1))  # indexing would ask a GPU for the place


def _normalizer(logits: Tensor, values: Tensor, params: SamplingParams) -> Tensor:
    """log of the sum of what top_k leaves."""
    among = values[: params.top_k] if 0 < params.top_k <= len(values) else logits
    return among.logsumexp(-1)


def _kept(probs: Tensor, params: SamplingParams) -> Tensor:
    """Which of the sorted probabilities top_k, top_p and min_p leave: the first ones, and always the first of all."""
    import torch

    rank = torch.arange(len(probs), device=probs.device)
    kept = rank < params.top_k if params.top_k else torch.ones_like(rank, dtype=torch.bool)
    if params.top_p < 1:
        kept &= probs.cumsum(-1) - probs <= params.top_p
    if params.min_p > 0:
        kept &= probs >= params.min_p * probs[0]
    return (kept & (probs > 0)) | (rank == 0)


def _enough(probs: Tensor, kept: Tensor, params: SamplingParams, drawn: float) -> bool:
    """Whether no less likely id can matter: the filters end before the last of these, or the drawn place does."""
    return not bool(kept[-1]) or (_all(params) and bool(probs.sum() > drawn))


def _mass(sums: Tensor, params: SamplingParams, whole: bool) -> Tensor:
    """The probability of all that is kept; that of the whole vocabulary is 1, known or not."""
    return sums.new_ones(()) if _all(params) and not whole else sums[-1]


def _all(params: SamplingParams) -> bool:
    """Whether nothing is filtered."""
    return not params.top_k and params.top_p == 1 and not params.min_p
