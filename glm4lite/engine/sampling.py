"""SamplingParams and the choice of the next token. Names and order of the filters are Transformers' and vLLM's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from glm4lite.base.errors import ModelError, SamplingError, shown
from glm4lite.base.sentences import Sentence

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from torch import Generator, Tensor

FEW = 1024  # ids among which a CPU looks first
_NEVER = float("-inf")
NOT_FINITE = "the model's output is not finite: its weights are damaged, or do not fit its config.json"

_OPTIONAL = ("seed", "max_new_tokens", "thinking_budget")
# (name, type, smallest, largest) of every number; None: no bound
_RANGES: tuple[tuple[str, type, float, float | None], ...] = (
    ("temperature", float, 0, None),
    ("top_k", int, 0, None),
    ("top_p", float, 0, 1),
    ("min_p", float, 0, 1),
    ("repetition_penalty", float, 1e-3, None),
    ("frequency_penalty", float, -2, 2),
    ("presence_penalty", float, -2, 2),
    ("min_new_tokens", int, 0, None),
    ("seed", int, 0, 2**63 - 1),
    ("max_new_tokens", int, 1, None),
    ("thinking_budget", int, 0, None),
)


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen. temperature 0 is greedy; top_k 0, top_p 1, min_p 0, repetition_penalty 1 and the other
    penalties 0 switch off.

    `stop` are texts that end the answer (and are not part of it). The same seed gives the same text; without one
    each answer differs. max_new_tokens counts the answer with its thought; None is what the context leaves.
    thinking_budget counts the thought alone, which is then ended, and the answer begins: 0 is no thought, None no
    limit.

    repetition_penalty divides the logits of ids that stand in the prompt or the answer (multiplies negative ones);
    frequency_penalty is subtracted as often as an id came in the answer, presence_penalty once; logit_bias maps ids to
    what is added to their logits. stop_token_ids end the answer beside the model's own stop ids, which ignore_eos takes
    away; before min_new_tokens none of them, and no stop text, ends it. adapter names one of those that the model was
    loaded with to choose from. Raises SamplingError for a value out of range.
    """

    temperature: float = 0.6
    top_k: int = 0
    top_p: float = 0.8
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    max_new_tokens: int | None = None
    thinking_budget: int | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    min_new_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    adapter: str | None = None

    def __post_init__(self) -> None:
        for name, kind, smallest, largest in _RANGES:
            value = getattr(self, name)
            if value is None and name in _OPTIONAL:
                continue
            upper = math.inf if largest is None else largest
            if not _is_number(value, kind) or not smallest <= value <= upper:
                what = Sentence("a whole number") if kind is int else Sentence("a number")
                bounds = Sentence("at least {least}", least=str(smallest))
                if largest is not None:
                    bounds = Sentence("between {least} and {most}", least=str(smallest), most=str(largest))
                found = str(value)[:40]
                raise SamplingError(
                    "{name} must be {what} {bounds}, found {found}", name=name, what=what, bounds=bounds, found=found
                )
        if isinstance(self.stop, str):
            raise SamplingError(f"stop must be a list of texts, found {self.stop!r}")
        if not all(self.stop):
            raise SamplingError("stop: an empty text would end every answer before its first character")
        self._check_ids()
        if self.max_new_tokens is not None and self.min_new_tokens > self.max_new_tokens:
            raise SamplingError(
                f"min_new_tokens is {self.min_new_tokens}, more than max_new_tokens, which is {self.max_new_tokens}"
            )

    def _check_ids(self) -> None:
        if not isinstance(self.logit_bias, Mapping):
            raise SamplingError(f"logit_bias must map token ids to numbers, found {shown(self.logit_bias)}")
        for token, bias in self.logit_bias.items():
            if not _is_id(token) or not _is_number(bias, float):
                raise SamplingError(f"logit_bias must map token ids to numbers, found {shown(token)}: {shown(bias)}")
        if not isinstance(self.stop_token_ids, list | tuple) or not all(map(_is_id, self.stop_token_ids)):
            raise SamplingError(f"stop_token_ids must be a list of token ids, found {shown(self.stop_token_ids)}")
        if not isinstance(self.ignore_eos, bool):
            raise SamplingError(f"ignore_eos must be true or false, found {shown(self.ignore_eos)}")
        if not isinstance(self.adapter, str | None):
            raise SamplingError(f"adapter must be a name, found {shown(self.adapter)}")
        object.__setattr__(self, "logit_bias", dict(self.logit_bias))  # whoever gave it may change his own
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))

    def nth(self, number: int) -> SamplingParams:
        """Those of the answer with this number, of several to one prompt: each with a seed of its own."""
        return self if self.seed is None or not number else replace(self, seed=(self.seed + number) % 2**63)

    def uncut(self) -> SamplingParams:
        """Those of an answer that follows a schema as a whole: the user's stop texts and ids cut none."""
        return replace(self, stop=(), stop_token_ids=())

    def check_vocabulary(self, size: int) -> None:
        """Raises SamplingError for an id that a tokenizer of `size` ids does not know."""
        for name, ids in (("logit_bias", self.logit_bias), ("stop_token_ids", self.stop_token_ids)):
            wrong = next((token for token in ids if token >= size), None)
            if wrong is not None:
                raise SamplingError(f"{name}: {wrong} is no token of this model, whose ids are 0 to {size - 1}")

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
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "min_new_tokens")
        chosen = {name: values[name] for name in names if values.get(name) is not None}
        if values.get("do_sample") is False:
            chosen["temperature"] = 0.0
        try:
            cls(**chosen)
        except SamplingError as error:
            raise SamplingError(f"generation_config.json: {error}; correct the file") from None
        return cls(**chosen | {name: value for name, value in changes.items() if value is not None})


def _is_id(value: object) -> bool:
    return _is_number(value, int) and value >= 0  # type: ignore[operator]


def _is_number(value: object, kind: type) -> bool:
    if isinstance(value, float):
        return kind is float and math.isfinite(value)
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


class Adjustments:
    """What the parameters change of the logits before an id is drawn: the bias, penalties, the least length.

    Each follows from the ids so far alone, so guessed ids and answers beside this one change nothing. Order and
    arithmetic are those of Transformers' SequenceBias, RepetitionPenalty and MinNewTokensLength processors. It has no
    frequency and presence penalty: those are OpenAI's (API reference, "frequency_penalty"), over new ids, as in vLLM.

    One for each answer: its ids only grow, and what was counted is not counted again.
    """

    def __init__(self, params: SamplingParams, prompt: int = 0, stop_ids: Collection[int] = ()) -> None:
        """`prompt`: how many ids are no new ones; `stop_ids`: those that may not come before the least length."""
        self._params, self._prompt, self._stop_ids = params, prompt, sorted(stop_ids)
        self._repeated = params.repetition_penalty != 1
        self._counted = bool(params.frequency_penalty or params.presence_penalty)
        self._seen: Tensor | None = None  # [V]: which ids stand in the prompt or the answer
        self._counts: Tensor | None = None  # [V] float32: how often each new id came
        self._bias: Tensor | None = None  # [V] float32
        self._read = 0  # ids that are counted

    def __call__(self, logits: Tensor, ids: Sequence[int]) -> Tensor:
        """logits [V] float32 -> [V], the same tensor where nothing is asked; `ids`: the prompt's and the new ones."""
        import torch

        params = self._params
        if params.logit_bias:
            logits = logits + self._biases(logits)
        if self._repeated or self._counted:
            self._count(ids, logits)
        if self._seen is not None:  # CTRL's (arXiv 1909.05858)
            penalized = torch.where(logits > 0, logits / params.repetition_penalty, logits * params.repetition_penalty)
            logits = torch.where(self._seen, penalized, logits)
        if self._counts is not None:
            counts = self._counts
            logits = logits - params.frequency_penalty * counts - params.presence_penalty * (counts > 0)
        if len(ids) - self._prompt < params.min_new_tokens:
            logits = self._going_on(logits)
        return logits

    def _biases(self, logits: Tensor) -> Tensor:
        if self._bias is None:
            known = {token: bias for token, bias in self._params.logit_bias.items() if token < len(logits)}
            self._bias = logits.new_zeros(len(logits))
            self._bias[list(known)] = logits.new_tensor(list(known.values()))
        return self._bias

    def _count(self, ids: Sequence[int], logits: Tensor) -> None:
        """Takes the ids that came since the last time."""
        import torch

        size = len(logits)
        if self._repeated and self._seen is None:
            self._seen = torch.zeros(size, dtype=torch.bool, device=logits.device)
        if self._counted and self._counts is None:
            self._counts = logits.new_zeros(size)
        fresh = torch.tensor(ids[self._read :], dtype=torch.long, device=logits.device)
        new = fresh[max(0, self._prompt - self._read) :]
        self._read = len(ids)
        if self._seen is not None:
            self._seen[fresh[fresh < size]] = True
        if self._counts is not None:
            new = new[new < size]
            self._counts.index_add_(0, new, torch.ones_like(new, dtype=self._counts.dtype))

    def _going_on(self, logits: Tensor) -> Tensor:
        """Without the ids that end the answer, where others are possible (a constraint may leave none)."""
        import torch

        ending = torch.tensor([token for token in self._stop_ids if token < len(logits)], dtype=torch.long)
        without = logits.index_fill(0, ending.to(logits.device), _NEVER)
        return without if bool((without > _NEVER).any()) else logits


class Sampler:
    """Draws token ids from logits under SamplingParams; one Sampler per answer, since the seed starts anew.

    A drawn number picks its place in the cumulative distribution, so that a seed means the same wherever the logits
    lie; they stay on their device, and one integer comes back.
    """

    def __init__(self, params: SamplingParams, prompt: int = 0, stop_ids: Collection[int] = ()) -> None:
        """`prompt`: how many of the ids are no new ones; `stop_ids`: those that end the answer."""
        import torch

        self.params = params
        self._adjusted = Adjustments(params, prompt, stop_ids)
        self.generator: Generator = torch.Generator()
        if params.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(params.seed)

    def __call__(self, logits: Tensor, ids: Sequence[int]) -> int:
        """logits [V] float32 -> one id; `ids` are the prompt's and all new ones, those of the last call first.

        Raises ModelError where the logits are not finite.
        """
        import torch

        params = self.params
        logits = self._adjusted(logits, ids)
        top = logits.max()
        if params.temperature == 0:
            chosen = logits.argmax()
        else:
            # The largest is brought to 0 first, so that a tiny temperature makes others impossible and nothing NaN.
            drawn = torch.rand((), generator=self.generator, dtype=torch.float64).item()
            chosen = _pick((logits - top) / params.temperature, params, drawn)
        token = int(chosen.where(top.isfinite(), -1))  # all that comes back from a GPU
        if token < 0:
            raise ModelError(NOT_FINITE)
        return token


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
