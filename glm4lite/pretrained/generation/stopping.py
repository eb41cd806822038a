"""When a sequence of a batch ends: stopping criteria, (ids [B, T], scores) -> bool [B], or one bool for all."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from glm4lite.base.errors import shown
from glm4lite.pretrained.generation.config import GenerationConfig

StoppingCriterion = Callable[[Tensor, Any], "Tensor | bool"]


class Decoder(Protocol):
    """A tokenizer, ours or Transformers'."""

    def decode(self, token_ids: list[int], /) -> str: ...


def criteria(
    config: GenerationConfig, tokenizer: Decoder | None, given: Sequence[StoppingCriterion]
) -> list[StoppingCriterion]:
    """What `config` asks for, lengths left out, then the caller's own; ValueError for texts without a tokenizer."""
    found: list[StoppingCriterion] = []
    if config.max_time is not None:
        end = time.monotonic() + config.max_time
        found.append(lambda ids, scores: time.monotonic() >= end)
    if config.stop_strings:
        if tokenizer is None:
            raise ValueError("stop_strings needs the model's tokenizer: generate(..., stop_strings=…, tokenizer=…)")
        if not hasattr(tokenizer, "decode"):
            raise ValueError(f"tokenizer must have decode, as the model's Tokenizer, found {shown(tokenizer)}")
        found.append(StopTexts(config.stop_strings, tokenizer))
    if config.eos_token_id:
        ends = torch.tensor(config.eos_token_id)
        found.append(lambda ids, scores: torch.isin(ids[:, -1], ends.to(ids.device)))
    return found + list(given)


def stopped(found: Sequence[StoppingCriterion], ids: Tensor, scores: Any) -> Tensor:
    """bool [B]: which sequences end here."""
    done = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    for criterion in found:
        found_here = criterion(ids, scores)
        if not isinstance(found_here, bool | Tensor) or (
            isinstance(found_here, Tensor) and found_here.dim() and found_here.shape != done.shape
        ):
            given = list(found_here.shape) if isinstance(found_here, Tensor) else shown(found_here)
            raise ValueError(f"a stopping criterion must return a bool, or a tensor of {len(ids)} bools, found {given}")
        done = done | torch.as_tensor(found_here, device=ids.device).to(torch.bool)
    return done


class StopTexts:
    """Whether the last token completed one of the texts, which may begin anywhere before it, in the prompt too."""

    def __init__(self, texts: Sequence[str], tokenizer: Decoder) -> None:
        self._texts, self._tokenizer = tuple(texts), tokenizer
        # A token is a byte of the text at least, and some more keep decoders from seeing a text's first token.
        self._window = max(len(text.encode()) for text in texts) + 8

    def __call__(self, ids: Tensor, scores: Any) -> Tensor:
        return torch.tensor([self._completed(row.tolist()) for row in ids[:, -self._window :]], device=ids.device)

    def _completed(self, ids: list[int]) -> bool:
        text, before = self._tokenizer.decode(ids), self._tokenizer.decode(ids[:-1])
        return any(text.count(stop) > before.count(stop) for stop in self._texts)
