"""What is kept of the last conversations: whose, how much of it, and that using it changes nothing."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch

from glm4lite.base.errors import DeviceError
from glm4lite.engine.decoding import Generation
from glm4lite.engine.engine import Engine
from glm4lite.engine.prefix_pool import MOST, PrefixCache, PrefixPool
from glm4lite.engine.sampling import SamplingParams

GREEDY = SamplingParams(temperature=0, max_new_tokens=12)


@pytest.fixture(scope="module", params=["float", "int8"])
def engine(request: pytest.FixtureRequest) -> Engine:
    return Engine.load("nano", quant="int8", device="cpu", kv=request.param)


@pytest.fixture
def pool(engine: Engine) -> PrefixPool:
    engine.prefixes = PrefixPool(engine.model)
    return engine.prefixes


def answer(engine: Engine, prompt: list[int]) -> tuple[list[int], int]:
    """New ids, and how many of the prompt's had to be computed."""
    generation = engine.generate(prompt, GREEDY)
    for _ in engine.pieces(generation):
        pass
    return generation.ids, generation.prefilled_tokens


def fresh(engine: Engine, prompt: list[int]) -> list[int]:
    return list(Generation(engine.model, prompt, GREEDY, engine.tokenizer.stop_ids, engine.tokenizer.size))


def ids(engine: Engine, text: str) -> list[int]:
    return engine.tokenizer.prefix_ids + engine.tokenizer.ids(text)


def test_conversations_that_take_turns_each_find_their_own_prefix(engine: Engine, pool: PrefixPool) -> None:
    shared = "You are nano. " * 10
    one, two = ids(engine, shared + "One apple" * 20), ids(engine, shared + "Two pears" * 20)
    answer(engine, one)
    _, computed = answer(engine, two)
    assert computed < len(two) - 30  # the shared beginning was copied
    assert len(pool) == 2
    for prompt in (one, two, one):
        longer = [*prompt, *ids(engine, " and then?")]
        said, computed = answer(engine, longer)
        assert computed <= len(longer) - len(prompt) + 1
        assert said == fresh(engine, longer)


def test_a_copy_leaves_the_original_as_it_was(engine: Engine, pool: PrefixPool) -> None:
    one = ids(engine, "One two three four five six seven eight nine ten " * 6)
    first, _ = answer(engine, one)
    answer(engine, [*one[: len(one) // 3], *ids(engine, "something else")])
    again, computed = answer(engine, one)
    assert (again, computed) == (first, 1)


def test_a_conversation_that_goes_on_is_not_kept_twice(engine: Engine, pool: PrefixPool) -> None:
    prompt = ids(engine, "How are you?")
    for _ in range(3):
        said, _ = answer(engine, prompt)
        prompt = [*prompt, *said, *ids(engine, "Go on")]
    assert len(pool) == 1


def test_no_more_memory_is_kept_than_one_context_takes(engine: Engine) -> None:
    engine.prefixes = pool = PrefixPool(engine.model, memory=5 * PrefixPool(engine.model).bytes_of(1))
    for count in range(8):
        answer(engine, [count + 20] * 40)
        assert pool.nbytes <= pool.memory
    assert 1 < len(pool) <= 5
    _, computed = answer(engine, [20] * 40)
    assert computed == 40  # the oldest went first
    assert PrefixPool(engine.model).memory > engine.model.new_cache().nbytes


def test_copying_a_beginning_takes_no_more_than_one_context_either(engine: Engine, pool: PrefixPool) -> None:
    long = [*range(20, 90)] * 7
    asked = [*long[:100], *[97] * 60]
    engine.prefixes = full = PrefixPool(engine.model, memory=pool.bytes_of(len(long) + 28) + 3 * pool.bytes_of(68))
    for prompt in (long, [99] * 40, [98] * 40):
        answer(engine, prompt)
    said, computed = answer(engine, asked)
    assert (said, computed) == (fresh(engine, asked), 60)
    assert full.nbytes <= full.memory
    assert len(full) >= 2
    assert answer(engine, long)[1] == 1  # the conversation it was copied from is whole


def test_few_are_kept_however_short(engine: Engine, pool: PrefixPool) -> None:
    for count in range(MOST + 4):
        cache = PrefixCache(engine.model.new_cache())
        cache.ids = [count]
        pool.give(cache)
    assert len(pool) == MOST


def test_what_is_in_use_is_nobody_elses(engine: Engine, pool: PrefixPool) -> None:
    prompt = ids(engine, "Hello there, how are you?")
    expected = fresh(engine, prompt)
    answer(engine, prompt)
    slow = engine.generate(prompt, replace(GREEDY, max_new_tokens=8))
    pieces = engine.pieces(slow)
    next(pieces)
    assert answer(engine, prompt)[0] == expected
    list(pieces)
    assert slow.ids == expected[:8]


@pytest.mark.parametrize("ends", ["the device gives out", "nobody waits any more"])
def test_what_was_computed_of_a_prompt_is_kept_where_its_reading_ends_early(
    engine: Engine, pool: PrefixPool, monkeypatch: pytest.MonkeyPatch, ends: str
) -> None:
    monkeypatch.setattr(type(engine.model), "chunk", 32)
    prompt = ids(engine, "One two three four five six seven eight nine ten " * 20)
    generation, before = engine.generate(prompt, GREEDY), fresh(engine, prompt)
    reading = engine.prefill(generation)
    for _ in range(3):
        next(reading)
    if ends == "nobody waits any more":
        reading.close()
    else:
        monkeypatch.setattr(engine.model.model.norm, "forward", gives_out)
        with pytest.raises(DeviceError, match="ran out at 128 tokens"):
            next(reading)
        monkeypatch.undo()
    assert answer(engine, prompt) == (before, len(prompt) - 96)


def gives_out(*_: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_a_prompt_whose_reading_is_cancelled_stops_between_two_layers(engine: Engine, pool: PrefixPool) -> None:
    prompt, cancel, entered = ids(engine, "One two three " * 20), threading.Event(), []

    def enter(number: int) -> None:
        entered.append(number)
        cancel.set()

    hooks = [
        layer.register_forward_pre_hook(lambda *_, number=number: enter(number))
        for number, layer in enumerate(engine.model.model.layers)
    ]
    generation = engine.generate(prompt, GREEDY, cancel)
    assert list(engine.pieces(generation)) == [""]
    for hook in hooks:
        hook.remove()
    assert (entered, generation.finish_reason, len(pool)) == ([0], "cancelled", 0)
    assert answer(engine, prompt)[0] == fresh(engine, prompt)
