"""Several sequences in one pass: each has the logits that it has alone."""

from __future__ import annotations

import random

import pytest
import torch

from glm4lite import Glm4ForCausalLM, load
from glm4lite.model.step import Span


@pytest.fixture(scope="module")
def nano() -> Glm4ForCausalLM:
    return load("nano", quant="int4", device="cpu")


def test_each_sequence_has_the_logits_it_has_alone(nano: Glm4ForCausalLM) -> None:
    chance = random.Random(3)
    prompts = [[chance.randrange(1280) for _ in range(count)] for count in (9, 1, 30)]
    caches = [nano.new_cache() for _ in prompts]
    together = nano.step([Span(ids, cache, 1) for ids, cache in zip(prompts, caches, strict=True)])
    for ids, cache, logits in zip(prompts, caches, together, strict=True):
        with torch.inference_mode():
            alone = nano(torch.tensor([ids]), logits_to_keep=1).logits[0]
        assert torch.equal(logits, alone)
        assert cache.get_seq_length() == len(ids)


def test_a_chunk_that_is_not_the_last_has_no_logits(nano: Glm4ForCausalLM) -> None:
    cache = nano.new_cache()
    first, second = nano.step([Span([1, 2, 3], cache, 0), Span([4], nano.new_cache(), 1)])
    assert first.shape == (0, nano.config.vocab_size)
    assert second.shape == (1, nano.config.vocab_size)
    assert cache.get_seq_length() == 3
