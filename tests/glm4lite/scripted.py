"""A model that says what it is told to, so that sessions are tested on exact outputs without trained weights."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from glm4lite.engine.constraint import Constraint
from glm4lite.engine.engine import Engine
from glm4lite.model.cache import KVCache
from glm4lite.model.config import Glm4Config
from glm4lite.model.step import Span
from glm4lite.text.grammar import AnswerForm
from glm4lite.text.template import ChatTemplate
from glm4lite.text.tokenizer import Tokenizer


class ScriptedModel(nn.Module):
    """Each answer is one of `replies` (text with special tokens), token by token; it fills the cache like a model."""

    def __init__(self, tokenizer: Tokenizer, replies: list[str], context: int = 4096) -> None:
        super().__init__()
        self.config = Glm4Config(num_hidden_layers=2, vocab_size=tokenizer.size, max_position_embeddings=context)
        self.device = torch.device("cpu")
        layers = [SimpleNamespace(device=self.device, dtype=torch.float32) for _ in range(2)]
        bytes_ = 2 * 2 * 4  # of what a step appends
        self.model = SimpleNamespace(
            layers=layers, cache_bytes=bytes_, norm=nn.RMSNorm(1), dtype=torch.float32, adapters=()
        )
        self.replies = [tokenizer.ids(reply, special=True) for reply in replies]
        self.left: list[int] = []
        self.chunk = 512
        self.context = context
        self.fed: list[list[int]] = []

    def new_cache(self) -> KVCache:
        return KVCache(2)

    def step(self, spans: Sequence[Span]) -> list[torch.Tensor]:
        return [self._answered(span) for span in spans]

    def _answered(self, span: Span) -> torch.Tensor:
        self.fed.append(list(span.ids))
        for layer in span.cache.layers:
            layer.append(torch.zeros(1, 1, len(span.ids), 1), torch.zeros(1, 1, len(span.ids), 1))
        logits = torch.zeros(span.kept, self.config.vocab_size)
        if span.kept:
            if not self.left:
                self.left = list(self.replies.pop(0))
            logits[0, self.left.pop(0)] = 100  # certain at any temperature
        return logits


class Asking(Constraint):
    """A constraint that asks the model for every id, also where it could be no other: a script has them all."""

    def copy(self, loosened: tuple[str, ...] | None = None) -> Asking:
        return Asking(self._matcher.deep_copy(), self._words, self.loosened if loosened is None else loosened)

    def forced(self) -> list[int]:
        return []

    @property
    def complete(self) -> bool:
        return False


class ScriptedEngine(Engine):
    """An Engine whose answers are asked for id by id."""

    def constraint(self, form: AnswerForm) -> Constraint | None:
        made = super().constraint(form)
        return None if made is None else Asking(made._matcher, made._words, made.loosened)


class Failing(Constraint):
    """A constraint that lets anything come, and leaves by `error` at its `at`-th id."""

    def __init__(self, error: BaseException, at: int = 3) -> None:
        self.error, self.left = error, at

    def masked(self, logits: torch.Tensor, ends: Collection[int] = ()) -> torch.Tensor:
        self.left -= 1
        if not self.left:
            raise self.error
        return logits

    def accept(self, ids: Sequence[int]) -> None:
        pass

    def forced(self) -> list[int]:
        return []

    @property
    def complete(self) -> bool:
        return False


def scripted_engine(
    tokenizer: Tokenizer, template: ChatTemplate, replies: list[str], context: int = 4096, parallel: int = 1
) -> Engine:
    """An Engine whose model gives `replies` in turn, greedily."""
    model: Any = ScriptedModel(tokenizer, replies, context)
    return ScriptedEngine(model, tokenizer, template, {"do_sample": False}, parallel)
