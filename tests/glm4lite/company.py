"""Sequences that go through a model in one another's company, for tests of what each gets.

for number, rows, logits in company(model, prompts, seed=1):
    assert torch.equal(logits, alone[number][rows])
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from glm4lite import Glm4ForCausalLM, KVCache
from glm4lite.model.step import Span

PIECES = (1, 1, 1, 4, 8, 30, 200)
"""Single new ids, rows to verify, chunks of a prompt."""


def random_prompts(model: Glm4ForCausalLM, count: int, longest: int, seed: int) -> list[list[int]]:
    chance, vocab = random.Random(seed), model.config.vocab_size
    return [[chance.randrange(vocab) for _ in range(chance.randint(1, longest))] for _ in range(count)]


@torch.inference_mode()
def alone(model: Glm4ForCausalLM, prompts: list[list[int]]) -> list[Tensor]:
    """The logits of all ids of each, in one pass of its own."""
    return [model(torch.tensor([ids])).logits[0].float() for ids in prompts]


def company(
    model: Glm4ForCausalLM, prompts: list[list[int]], seed: int, new_cache: Callable[[], KVCache] | None = None
) -> Iterator[tuple[int, slice, Tensor]]:
    """All ids in random pieces and random company; gives a sequence's number, rows of it and their logits.

    The last row of each is among them.
    """
    chance, done = random.Random(seed), [0] * len(prompts)
    caches = [(new_cache or model.new_cache)() for _ in prompts]
    while waiting := [number for number, ids in enumerate(prompts) if done[number] < len(ids)]:
        spans, rows = [], []
        for number in chance.sample(waiting, chance.randint(1, len(waiting))):
            piece = prompts[number][done[number] :][: chance.choice(PIECES)]
            done[number] += len(piece)
            kept = chance.choice((1, len(piece), int(done[number] == len(prompts[number]))))
            spans.append(Span(piece, caches[number], kept))
            rows.append((number, slice(done[number] - kept, done[number])))
        for (number, of_span), span, logits in zip(rows, spans, model.step(spans), strict=True):
            assert logits.shape == (span.kept, model.config.vocab_size)
            assert logits.dtype == torch.float32
            assert [layer.length for layer in span.cache.layers] == [done[number]] * len(span.cache)
            yield number, of_span, logits
