"""Several answers at once: each is what it would be alone, whoever joins and leaves, whatever fails, however little
memory there is."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from glm4lite.base.errors import ConfigError, ContextLengthError, DeviceError
from glm4lite.base.events import Done, TextDelta
from glm4lite.chat.session import ChatSession
from glm4lite.engine.decoding import Generation
from glm4lite.engine.engine import Engine
from glm4lite.engine.prefix_pool import PrefixPool
from glm4lite.engine.sampling import SamplingParams
from glm4lite.engine.scheduler import Scheduler
from glm4lite.engine.speculation import Speculation
from glm4lite.engine.worker import EngineWorker
from glm4lite.model.step import Span
from glm4lite.text.messages import Message
from glm4lite_quant.kernels import native
from tests.glm4lite.scripted import Failing

PARAMS = SamplingParams(temperature=0, max_new_tokens=24)

pytestmark = pytest.mark.skipif(native.backend() is None, reason=f"no native library: {native.status()}")


@pytest.fixture(scope="module", params=["float", "int8"])
def engine(request: pytest.FixtureRequest) -> Engine:
    return Engine.load("nano", quant="int4", device="cpu", kv=request.param)


class Eager(Speculation):
    """Guesses whatever it can."""

    def length(self, agreed: int, most: int, sequences: int = 1, rows: int = 1) -> int:
        return most


def scheduled(
    engine: Engine, scheduler: Scheduler | None, prompt: list[int], params: SamplingParams, **more: Any
) -> Generation:
    stops, size = engine.tokenizer.stop_ids, engine.tokenizer.size
    speculation = scheduler.speculation if scheduler is not None else None
    made = Generation(engine.model, prompt, params, stops, size, scheduler=scheduler, speculation=speculation, **more)
    made.top_logprobs = 2
    return made


def alone(engine: Engine, prompt: list[int], params: SamplingParams) -> Generation:
    made = scheduled(engine, None, prompt, params)
    list(made)
    return made


def prompts(engine: Engine, count: int, seed: int = 3) -> Iterator[tuple[list[int], SamplingParams]]:
    """Some repeat themselves, some share a beginning; greedy and sampled."""
    chance = random.Random(seed)
    words = ["the cat", " sat on", " the mat", ". What is", " 37 * 24", "? It is", " 888", ", 12 km", " in miles"]
    for number in range(count):
        part = "".join(chance.choices(words, k=chance.randint(2, 6)))
        begin = "You are a cat. " * chance.choice((0, 6))
        text = begin + part * chance.randint(1, 8) + "".join(chance.choices(words, k=3))
        params = replace(
            PARAMS, temperature=chance.choice((0.0, 0.8)), seed=number, max_new_tokens=chance.randint(1, 30)
        )
        yield engine.tokenizer.prefix_ids + engine.tokenizer.ids(text), params


@pytest.fixture
def steps(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Grows by the rows of each sequence of each step."""
    made, step = list[list[int]](), engine.model.step

    def counted(spans: Sequence[Span]) -> list[torch.Tensor]:
        made.append([len(span.ids) for span in spans])
        return step(spans)

    monkeypatch.setattr(engine.model, "step", counted)
    return made


@pytest.mark.parametrize("speculation", [None, Eager()], ids=["plain", "guessing"])
def test_each_answer_of_many_has_the_bits_it_has_alone(
    engine: Engine, speculation: Speculation | None, steps: list[list[int]]
) -> None:
    chance = random.Random(11)
    asked = list(prompts(engine, 40))
    wanted = [alone(engine, *one) for one in asked]
    steps.clear()
    scheduler = Scheduler(engine.model, PrefixPool(engine.model), parallel=5, speculation=speculation)
    pending = [(scheduled(engine, scheduler, *one), like) for one, like in zip(asked, wanted, strict=True)]
    reading: list[tuple[Generation, Generation, Iterator[int]]] = []
    while pending or reading:
        while pending and len(reading) < 7 and chance.random() < 0.7:
            made, like = pending.pop()
            made.begin()
            reading.append((made, like, iter(made)))
        if not reading:
            continue
        one = chance.choice(reading)
        made, like, ids = one
        if next(ids, None) is None:
            reading.remove(one)
            assert (made.ids, made.logprobs, made.finish_reason) == (like.ids, like.logprobs, like.finish_reason)
            assert made.stop_id == like.stop_id
        elif chance.random() < 0.02:  # its reader leaves
            ids.close()  # type: ignore[attr-defined]
            reading.remove(one)
            assert made.ids == like.ids[: len(made.ids)]
    assert not scheduler.busy
    assert max(map(len, steps)) == 5


def test_as_many_are_computed_at_once_as_may_be_and_the_first_come_first(
    engine: Engine, steps: list[list[int]]
) -> None:
    scheduler = Scheduler(engine.model, PrefixPool(engine.model), parallel=2)
    prompt = engine.tokenizer.ids("one two three")
    made = [scheduled(engine, scheduler, prompt, replace(PARAMS, max_new_tokens=4)) for _ in range(5)]
    for one in made:
        one.begin()
    list(made[4])
    assert [len(step) for step in steps] == [2] * 8 + [1] * 4
    assert [len(list(one)) for one in made[:4]] == [4] * 4


def test_an_answer_that_finds_no_room_is_computed_again_later_and_never_cut(engine: Engine) -> None:
    asked = [(prompt * 6, params) for prompt, params in prompts(engine, 12, seed=5)]
    wanted = [alone(engine, *one).ids for one in asked]
    usual = PrefixPool(engine.model)
    room = usual.bytes_of(max(len(prompt) for prompt, _ in asked) + 40) + usual.bytes_of(300)
    scheduler = Scheduler(engine.model, PrefixPool(engine.model, room), parallel=6)
    made = [scheduled(engine, scheduler, *one) for one in asked]
    for one in made:
        one.begin()
    held = list[int]()
    for one, ids in zip(made, wanted, strict=True):
        for _ in one:
            pool = scheduler.prefixes
            assert pool is not None
            held.append(pool.nbytes + sum(s.cache.kv.nbytes for s in scheduler.running if s.cache is not None))
        assert one.ids == ids
    assert max(held) <= room


def test_the_youngest_gives_its_room_to_those_who_came_before(engine: Engine) -> None:
    usual, prompt = PrefixPool(engine.model), engine.tokenizer.ids("again and again ")
    params = replace(PARAMS, max_new_tokens=260)
    stops = ()
    wanted = list(Generation(engine.model, prompt, params, stops, engine.tokenizer.size))
    scheduler = Scheduler(engine.model, PrefixPool(engine.model, 2 * usual.bytes_of(200)), parallel=2)
    made = [
        Generation(engine.model, prompt, params, stops, engine.tokenizer.size, scheduler=scheduler) for _ in range(2)
    ]
    for one in made:
        one.begin()
    assert [list(one) for one in made] == [wanted, wanted]
    assert scheduler.preempted == 1


def test_a_short_prompt_does_not_wait_for_a_long_one_and_answers_go_on_meanwhile(
    engine: Engine, steps: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(engine.model), "chunk", 64)
    scheduler = Scheduler(engine.model, PrefixPool(engine.model), parallel=4)
    answers = [scheduled(engine, scheduler, [30 + n, 31, 32], replace(PARAMS, max_new_tokens=200)) for n in range(2)]
    readers = [iter(one) for one in answers]
    for reader in readers:
        next(reader)
    long = scheduled(engine, scheduler, list(range(20, 420)) * 4, replace(PARAMS, max_new_tokens=1))
    long.begin()
    before = len(steps)
    for reader in readers:
        next(reader)
    short = scheduled(engine, scheduler, list(range(20, 70)), replace(PARAMS, max_new_tokens=1))
    next(iter(short))
    assert len(steps) - before <= 3
    list(long)
    assert sum(max(step) == 64 for step in steps[before:]) == 25
    assert all(len(step) >= 3 for step in steps[before : before + 20])  # each answer had an id of each step


def test_a_part_of_a_prompt_is_as_long_as_others_can_wait(
    engine: Engine, steps: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("glm4lite.engine.scheduler.PATIENCE_S", 0.1)
    step, clock = engine.model.step, SimpleNamespace(now=0.0)
    clock.perf_counter = lambda: clock.now
    monkeypatch.setattr("glm4lite.engine.scheduler.time", clock)

    def slow(spans: Sequence[Span]) -> list[torch.Tensor]:
        clock.now += sum(len(span.ids) for span in spans) / 500
        return step(spans)

    monkeypatch.setattr(engine.model, "step", slow)
    scheduler = Scheduler(engine.model, PrefixPool(engine.model), parallel=2)
    answer = scheduled(engine, scheduler, [30, 31, 32], replace(PARAMS, max_new_tokens=200))
    reader = iter(answer)
    next(reader)
    list(scheduled(engine, scheduler, list(range(20, 420)), replace(PARAMS, max_new_tokens=1)))
    parts = [rows[1] for rows in steps if len(rows) == 2]
    assert parts == [64, *[48] * 7]  # the first before it is known how long they take
    steps.clear()
    list(scheduled(engine, scheduler, list(range(420, 500)), replace(PARAMS, max_new_tokens=1)))
    list(scheduled(engine, scheduler, list(range(120, 50, -1)), replace(PARAMS, max_new_tokens=1)))
    parts = [rows[1] for rows in steps if len(rows) == 2]
    assert parts == [48, 32, 70]  # a rest that is short goes with what is before it


def test_a_long_prompt_gets_its_turn_beside_short_ones_without_end(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(engine.model), "chunk", 64)
    scheduler = Scheduler(engine.model, PrefixPool(engine.model), parallel=4)
    long = scheduled(engine, scheduler, list(range(20, 420)), replace(PARAMS, max_new_tokens=1))
    long.begin()
    for count in range(60):
        short = scheduled(engine, scheduler, [count + 20, *range(20, 90)], replace(PARAMS, max_new_tokens=1))
        list(short)
        if long._sequence.over:
            break
    assert long._sequence.over


def test_a_beginning_that_several_prompts_share_is_computed_once(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(engine.model), "chunk", 64)
    shared = engine.tokenizer.ids("You are a helpful cat that answers in one word. " * 12)
    asked = [([*shared, 30 + n, 31, 32, *range(20, 30)], PARAMS) for n in range(4)]
    wanted = [alone(engine, *one).ids for one in asked]
    scheduler = Scheduler(engine.model, PrefixPool(engine.model), parallel=4)
    made = [scheduled(engine, scheduler, *one) for one in asked]
    for one in made:
        one.begin()
    assert [list(one) for one in made] == wanted
    assert sum(one.prefilled_tokens for one in made) <= len(shared) + 4 * 14
    assert sum(sorted(one.prefilled_tokens for one in made)[:3]) <= 3 * 14


def test_what_fails_in_one_answer_is_told_to_its_reader_and_the_others_go_on(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = Scheduler(engine.model, PrefixPool(engine.model), parallel=4)
    asked = list(prompts(engine, 4))
    wanted = [alone(engine, *one).ids for one in asked]
    made = [scheduled(engine, scheduler, *one) for one in asked]
    huge = scheduled(engine, scheduler, [77] * 50, PARAMS)
    wrong = scheduled(engine, scheduler, [78] * 50, PARAMS)
    wrong.constraint = Failing(ZeroDivisionError(), at=1)
    step = engine.model.step

    def gives_out(spans: Sequence[Span]) -> list[torch.Tensor]:
        if any(77 in span.ids for span in spans):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(spans)

    monkeypatch.setattr(engine.model, "step", gives_out)
    for one in (*made, huge, wrong):
        one.begin()
    with pytest.raises(DeviceError, match="ran out at 50 tokens"):
        list(huge)
    with pytest.raises(ZeroDivisionError):
        list(wrong)
    assert [list(one) for one in made] == wanted


def test_a_step_is_given_up_only_where_most_of_it_is_for_those_who_left(engine: Engine) -> None:
    scheduler, entered = Scheduler(engine.model, PrefixPool(engine.model), parallel=2), list[int]()
    stays = scheduled(engine, scheduler, [30, 31, 32], replace(PARAMS, max_new_tokens=6))
    wanted, reader = alone(engine, [30, 31, 32], replace(PARAMS, max_new_tokens=6)).ids, iter(stays)
    next(reader)
    leaves = scheduled(engine, scheduler, list(range(20, 80)), PARAMS)
    leaves.begin()

    def enter(*_: object) -> None:
        entered.append(1)
        leaves.cancel.set()

    hook = engine.model.model.norm.register_forward_pre_hook(lambda *_: entered.append(2))
    before = scheduler.steps
    trunk = engine.model.model
    layers = list(trunk.layers)
    hooks = [layer.register_forward_pre_hook(enter) for layer in layers]
    list(reader)
    for one in (hook, *hooks):
        one.remove()
    assert entered.count(1) >= 1
    assert stays.ids == wanted
    assert list(leaves) == []
    assert leaves.finish_reason == "cancelled"
    assert scheduler.steps > before


def test_many_prompts_are_answered_in_their_order(engine: Engine) -> None:
    texts = ["One two three", "The cat sat", "What is 37 * 24?"] * 9
    conversation = [Message("user", "Hello")]
    wanted = list(map(plain_text(engine), texts))
    as_dicts = [message.to_dict() for message in conversation]
    *found, last = engine.generate_many([*texts, conversation, as_dicts], temperature=0, max_new_tokens=9)
    assert found[-1] == last
    assert [one.text for one in found[:-1]] == wanted
    session = ChatSession(engine, params=engine.params(temperature=0, max_new_tokens=9))
    said = "".join(event.text for event in session.send("Hello") if isinstance(event, TextDelta))
    assert found[-1].text == said
    assert {one.finish_reason for one in found[:-1]} <= {"length", "stop"}


def plain_text(engine: Engine) -> Callable[[str], str]:
    def answer(text: str) -> str:
        ids = engine.tokenizer.prefix_ids + engine.tokenizer.ids(text)
        made = scheduled(engine, None, ids, replace(PARAMS, max_new_tokens=9))
        return engine.tokenizer.text(list(made))

    return answer


def test_many_prompts_stop_with_their_reader_and_at_one_that_is_wrong(engine: Engine) -> None:
    answers = engine.generate_many(["One two"] * 50, temperature=0, max_new_tokens=100)
    next(answers)
    answers.close()  # type: ignore[attr-defined]
    assert not engine.scheduler.busy
    with pytest.raises(ContextLengthError):
        list(engine.generate_many(["fine", "long " * 5000], max_new_tokens=2))
    assert not engine.scheduler.busy


def test_conversations_in_threads_of_their_own_get_their_own_answers(engine: Engine) -> None:
    questions = [f"What is {n} * {n + 3}?" for n in range(12)]
    params = engine.params(temperature=0, max_new_tokens=40)
    wanted = [texts(ChatSession(engine, params=params).send(question)) for question in questions]
    worker, found = EngineWorker(engine), dict[int, list[str]]()

    def ask(number: int, question: str) -> None:
        found[number] = texts(ChatSession(engine, params=params, compute=worker.run).send(question))

    threads = [threading.Thread(target=ask, args=one) for one in enumerate(questions)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    worker.close()
    assert ["".join(found[n]) for n in range(12)] == ["".join(one) for one in wanted]


def texts(events: Iterator[Any]) -> list[str]:
    said = list(events)
    assert isinstance(said[-1], Done)
    return [event.text for event in said if isinstance(event, TextDelta)]


def test_a_number_of_answers_that_cannot_be_is_refused(engine: Engine) -> None:
    with pytest.raises(ConfigError, match="parallel is 0"):
        Engine(engine.model, engine.tokenizer, engine.template, {}, 0)
