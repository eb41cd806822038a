"""Logits processors: scores [B, V] of the next id, changed by what was asked for. (ids [B, T], scores) -> scores.

Order and arithmetic are Transformers', so that the same seed draws the same ids there and here. (`engine.sampling`
draws for chats, with a seed that means the same on every device.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from glm4lite.base.errors import ConfigError
from glm4lite.pretrained.generation.config import GenerationConfig

LogitsProcessor = Callable[[Tensor, Tensor], Tensor]
NEVER = float("-inf")


def processors(
    config: GenerationConfig, begun: int, prompt: int, new: int, mask: Tensor, given: Sequence[LogitsProcessor]
) -> list[LogitsProcessor]:
    """What `config` asks for; `given` are the caller's own, which come before those of sampling.

    begun: ids before the first new one (0 where the prompt came as vectors); prompt: its positions; new: ids that may
    come at most; mask [B, prompt]: 0 where the prompt is padding.
    """
    eos = config.eos_token_id or []
    found: list[LogitsProcessor] = []
    if config.sequence_bias:
        found.append(_sequence_bias(config.sequence_bias))
    if config.repetition_penalty not in (None, 1.0):
        found.append(_repetition(config.repetition_penalty, mask))
    if config.no_repeat_ngram_size:
        found.append(_no_repeated_ngrams(config.no_repeat_ngram_size))
    fewest = config.min_new_tokens if config.min_new_tokens is not None else (config.min_length or 0) - prompt
    if eos and fewest > 0:
        found.append(_only_while(lambda length: length < begun + fewest, _without(eos)))
    if config.forced_eos_token_id:
        found.append(_only_while(lambda length: length == begun + new - 1, _nothing_but(config.forced_eos_token_id)))
    if config.suppress_tokens:
        found.append(_without(config.suppress_tokens))
    if config.begin_suppress_tokens:
        found.append(_only_while(lambda length: length == begun, _without(config.begin_suppress_tokens)))
    found += given
    if config.do_sample:
        found += _warpers(config)
    if config.renormalize_logits:
        found.append(lambda ids, scores: scores.log_softmax(-1))
    return found


def _warpers(config: GenerationConfig) -> list[LogitsProcessor]:
    """What changes a distribution that is drawn from."""
    found: list[LogitsProcessor] = []
    temperature, top_k = config.temperature, config.top_k
    if temperature is not None and temperature != 1.0:
        found.append(lambda ids, scores: scores / temperature)
    if top_k:
        found.append(lambda ids, scores: _top_k(scores, top_k))
    if (top_p := config.top_p) is not None and top_p < 1.0:
        found.append(lambda ids, scores: _top_p(scores, top_p))
    if (min_p := config.min_p) is not None:
        found.append(lambda ids, scores: _min_p(scores, min_p))
    if (typical_p := config.typical_p) is not None and typical_p < 1.0:
        found.append(lambda ids, scores: _typical(scores, typical_p))
    return found


def _sequence_bias(biases: Sequence[tuple[list[int], float]]) -> LogitsProcessor:
    """What is added to the score of a sequence's last id wherever its other ids stand at the end."""

    def apply(ids: Tensor, scores: Tensor) -> Tensor:
        size = scores.shape[1]
        if outside := [token for sequence, _ in biases for token in sequence if token >= size]:
            raise ConfigError(f"sequence_bias: {outside[0]} is no id of this model, whose ids are 0 to {size - 1}")
        bias = torch.zeros_like(scores)
        for (*before, last), value in biases:
            if len(before) <= ids.shape[1]:
                ending = ids[:, ids.shape[1] - len(before) :]
                bias[:, last] += value * (ending == ids.new_tensor(before)).all(-1)
        return scores + bias

    return apply


def _repetition(penalty: float, mask: Tensor) -> LogitsProcessor:
    """CTRL's penalty (arXiv 1909.05858) on every id so far; padding before the prompt does not count."""
    first = (mask != 0).int().argmax(1)

    def apply(ids: Tensor, scores: Tensor) -> Tensor:
        size = scores.shape[1]
        padding = torch.arange(ids.shape[1], device=ids.device)[None] < first.to(ids.device)[:, None]
        seen = ids.masked_fill(padding, size).clamp(max=size)
        wide = torch.nn.functional.pad(scores, (0, 1))  # a last column that takes what does not count
        score = wide.gather(1, seen)
        score = torch.where(score < 0, score * penalty, score / penalty)
        return wide.scatter(1, seen, score)[:, :size]

    return apply


def _no_repeated_ngrams(size: int) -> LogitsProcessor:
    """An id that would end an n-gram that stands in the text already is left out."""

    def apply(ids: Tensor, scores: Tensor) -> Tensor:
        if ids.shape[1] < size:
            return scores
        grams = ids.unfold(1, size, 1)  # [B, T - size + 1, size]
        ending = ids[:, ids.shape[1] - size + 1 :]
        repeats = (grams[:, :, :-1] == ending[:, None]).all(-1)
        scores = scores.clone()
        for row, last in zip(*torch.nonzero(repeats, as_tuple=True), strict=True):
            scores[row, grams[row, last, -1]] = NEVER
        return scores

    return apply


def _only_while(holds: Callable[[int], bool], then: LogitsProcessor) -> LogitsProcessor:
    return lambda ids, scores: then(ids, scores) if holds(ids.shape[1]) else scores


def _without(tokens: Sequence[int]) -> LogitsProcessor:
    return lambda ids, scores: scores.index_fill(1, _inside(tokens, scores), NEVER)


def _nothing_but(tokens: Sequence[int]) -> LogitsProcessor:
    return lambda ids, scores: torch.full_like(scores, NEVER).index_fill(1, _inside(tokens, scores), 0.0)


def _inside(tokens: Sequence[int], scores: Tensor) -> Tensor:
    return torch.tensor([token for token in tokens if token < scores.shape[1]], dtype=torch.long, device=scores.device)


def _top_k(scores: Tensor, top_k: int) -> Tensor:
    smallest = scores.topk(min(top_k, scores.shape[1]))[0][:, -1:]
    return scores.masked_fill(scores < smallest, NEVER)


def _top_p(scores: Tensor, top_p: float) -> Tensor:
    """The likeliest ids that together reach top_p."""
    ordered, places = scores.sort(descending=False)
    left_out = ordered.softmax(-1).cumsum(-1) <= 1 - top_p
    left_out[:, -1] = False
    return scores.masked_fill(left_out.scatter(1, places, left_out), NEVER)


def _min_p(scores: Tensor, min_p: float) -> Tensor:
    """Ids that are at least min_p times as likely as the likeliest."""
    probs = scores.softmax(-1)
    left_out = probs < min_p * probs.amax(-1, keepdim=True)
    left_out.scatter_(1, probs.argmax(-1, keepdim=True), False)
    return scores.masked_fill(left_out, NEVER)


def _typical(scores: Tensor, mass: float) -> Tensor:
    """Ids whose surprise is nearest to the expected one (arXiv 2202.00666), until they reach `mass`."""
    logs = scores.log_softmax(-1)
    entropy = -(logs * logs.exp()).nansum(-1, keepdim=True)
    distance, places = (-logs - entropy).abs().sort(descending=False)
    sums = scores.gather(1, places).softmax(-1).cumsum(-1)
    last = (sums < mass).sum(1).clamp(max=scores.shape[1] - 1)
    left_out = distance > distance.gather(1, last[:, None])
    left_out[:, 0] = False
    return scores.masked_fill(left_out.scatter(1, places, left_out), NEVER)
