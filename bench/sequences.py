"""Several sequences of one model at once: each has a prompt of its own, then all of them go on, one token each a step.

As llama.cpp's llama-batched-bench does it with unshared prompts. Only the steps behind the prompts are timed.
"""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any, Protocol

import numpy as np

Array = np.ndarray[Any, Any]


class Sequences(Protocol):
    """A model with a place for the keys and values of each of its sequences, which are numbered."""

    def begin(self, tokens: int, sequences: int = 1) -> None:
        """Room for so many tokens of each of so many new sequences."""
        ...

    def step(self, spans: list[tuple[int, list[int], int]]) -> list[Array]:
        """Adds ids in one pass: (sequence, ids, place of the first). The logits behind the last id of each."""
        ...


class Glm4liteSequences:
    """glm4lite's model, loaded as it is stored; `backend` is what multiplies. Layers that `ram` has no room for are
    read from disk."""

    def __init__(self, path: Path, threads: int, ram: str | None = None) -> None:
        from glm4lite import load
        from glm4lite_quant.kernels import native

        native.set_threads(threads)
        self._model = load(path, device="cpu", ram=ram)
        self._caches = [self._model.new_cache()]
        native_kernels = native.backend()
        self.backend = "torch" if native_kernels is None else native_kernels.name

    def begin(self, tokens: int, sequences: int = 1) -> None:
        self._caches = [self._model.new_cache() for _ in range(sequences)]

    def step(self, spans: list[tuple[int, list[int], int]]) -> list[Array]:
        from glm4lite.model.step import Span

        logits = self._model.step([Span(ids, self._caches[sequence]) for sequence, ids, _ in spans])
        return [rows[-1].numpy() for rows in logits]


def tokens_per_s(
    model: Sequences, counts: list[int], prompt_tokens: int, new_tokens: int, vocabulary: int
) -> dict[int, float]:
    """Greedy tokens a second of all sequences together, for each number of them, in that order."""
    chance = random.Random(0)
    found = {}
    for count in counts:
        prompts = [chance.choices(range(vocabulary), k=prompt_tokens) for _ in range(count)]
        model.begin(prompt_tokens + new_tokens + 1, count)
        ids = [_best(model.step([(number, prompt, 0)])[0]) for number, prompt in enumerate(prompts)]
        place = prompt_tokens
        ids = _next(model, ids, place)  # what the first step of its size costs is not counted
        started = time.perf_counter()
        for place in range(prompt_tokens + 1, prompt_tokens + 1 + new_tokens):
            ids = _next(model, ids, place)
        found[count] = count * new_tokens / (time.perf_counter() - started)
    return found


def _next(model: Sequences, ids: list[int], place: int) -> list[int]:
    return [_best(row) for row in model.step([(number, [token], place) for number, token in enumerate(ids)])]


def _best(logits: Array) -> int:
    return int(logits.argmax())
