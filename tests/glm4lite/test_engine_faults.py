"""What goes wrong in one place stays there: whoever is stopped, fails or leaves, the engine goes on for the others."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from itertools import cycle
from typing import TypeVar

import pytest
from torch import Tensor

from glm4lite.chat.session import ChatSession
from glm4lite.engine.decoding import Generation
from glm4lite.engine.draft_model import DraftModel
from glm4lite.engine.engine import Engine
from glm4lite.engine.prefix_pool import Disk, PrefixCache, PrefixPool
from glm4lite.engine.sampling import SamplingParams
from glm4lite.engine.scheduler import Scheduler
from glm4lite.engine.sequence import Sequence
from glm4lite.engine.speculation import Costs, Speculation
from glm4lite.engine.worker import EngineWorker
from glm4lite.model.step import Span
from glm4lite_quant.kernels import native
from tests.glm4lite.scripted import Failing

T = TypeVar("T")

PARAMS = SamplingParams(temperature=0, max_new_tokens=8)

pytestmark = pytest.mark.skipif(native.backend() is None, reason=f"no native library: {native.status()}")


@pytest.fixture
def engine() -> Engine:
    return Engine.load("nano", quant="int4", device="cpu", speculate="off")


def within(seconds: float, work: Callable[[], T]) -> T:
    """What `work` gives or raises, in a thread that may hang."""
    future = Future[T]()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future.result(seconds)


def test_an_answer_that_is_stopped_before_or_between_its_steps_ends(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    cancel = threading.Event()
    cancel.set()
    before = engine.generate([30, 31, 32], PARAMS, cancel)
    assert within(20, lambda: list(before.prefill())) == []
    assert (list(before), before.finish_reason) == ([], "cancelled")
    monkeypatch.setattr(type(engine.model), "chunk", 16)
    between = engine.generate([*range(20, 90)], PARAMS, threading.Event())

    def stopped_at_the_first_part() -> int:
        for _ in between.prefill():
            between.cancel.set()
        return len(list(between))

    assert within(20, stopped_at_the_first_part) == 0
    assert between.finish_reason == "cancelled"
    assert not engine.scheduler.busy


def several(engine: Engine, count: int = 3) -> list[Generation]:
    made = [engine.generate([30 + n, 31, 32], PARAMS) for n in range(count)]
    for one in made:
        one.begin()
    return made


def test_ctrl_c_while_an_answer_is_drawn_ends_that_one_and_the_others_are_whole(engine: Engine) -> None:
    wanted = [list(one) for one in several(engine)]
    made = several(engine)
    made[0].constraint = Failing(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        list(made[1])
    assert made[1].ids == wanted[1][:2]  # its reader made the step, and was interrupted
    assert list(made[2]) == wanted[2]
    with pytest.raises(KeyboardInterrupt):  # not an answer that lacks the id that was being drawn
        list(made[0])
    assert not engine.scheduler.busy


def test_ctrl_c_between_the_layers_costs_no_other_answer_anything(engine: Engine) -> None:
    wanted = [list(one) for one in several(engine)]
    made = several(engine)
    reader = iter(made[0])
    next(reader)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    hook = engine.model.model.layers[-1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        next(reader)
    hook.remove()
    assert [list(one) for one in made[1:]] == wanted[1:]


def test_an_answer_whose_step_ended_before_its_id_was_drawn_goes_on(engine: Engine) -> None:
    """As Ctrl-C leaves it between the two, or a stop that is taken back."""
    wanted, made = list(several(engine, 1)[0]), several(engine, 1)[0]
    reader = iter(made)
    next(reader)
    sequence = made._sequence
    made.cancel.set()
    span = sequence.span(1)
    sequence.computed(engine.model.step([span])[0])
    made.cancel.clear()
    assert [made.ids[0], *reader] == wanted


def test_whatever_a_constraint_raises_reaches_its_reader_and_the_engines_thread_goes_on(engine: Engine) -> None:
    worker = EngineWorker(engine)
    wanted = list(engine.generate([30, 31, 32], PARAMS))

    def constrained(engine: Engine) -> Iterator[int]:
        made = engine.generate([30, 31, 32], PARAMS)
        made.constraint = Failing(SystemExit(3))
        return iter(made)

    with pytest.raises(SystemExit):
        within(20, lambda: list(worker.run(constrained)))
    assert within(20, lambda: list(worker.run(lambda engine: iter(engine.generate([30, 31, 32], PARAMS))))) == wanted
    worker.close()


def test_an_error_before_a_step_is_told_to_all_who_wait_and_the_next_are_answered(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = EngineWorker(engine)

    def plain(engine: Engine) -> Iterator[int]:
        return iter(engine.generate([30, 31, 32], PARAMS))

    def fails(*_: object) -> None:
        raise MemoryError("no table")

    with monkeypatch.context() as patched:
        patched.setattr(engine.prefixes, "take", fails)
        with pytest.raises(MemoryError):
            within(20, lambda: list(worker.run(plain)))
    assert len(within(20, lambda: list(worker.run(plain)))) == PARAMS.max_new_tokens
    worker.close()


def test_a_model_that_is_unloaded_between_two_looks_ends_no_thread(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, other = EngineWorker(engine), Engine.load("nano", quant="int4", device="cpu")
    monkeypatch.setattr(Engine, "loaded", property(lambda _: True))  # as it was a moment ago
    del engine.model, engine.scheduler
    assert worker.state().steps == 0
    list(worker.run(lambda _: iter([1])))
    monkeypatch.undo()
    worker.engine = other
    ids = within(20, lambda: list(worker.run(lambda engine: iter(engine.generate([30, 31, 32], PARAMS)))))
    assert len(ids) == PARAMS.max_new_tokens
    worker.close()


def test_work_that_ends_between_two_looks_ends_no_thread(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = EngineWorker(engine)
    with monkeypatch.context() as patched:
        looks = cycle([True, False])
        patched.setattr(Scheduler, "busy", property(lambda _: next(looks)))
        for _ in range(20):
            list(worker.run(lambda _: iter([1])))
    ids = within(20, lambda: list(worker.run(lambda engine: iter(engine.generate([30, 31, 32], PARAMS)))))
    assert len(ids) == PARAMS.max_new_tokens
    worker.close()


@pytest.mark.parametrize("how", ["replaced", "unloaded"])
def test_who_still_reads_from_a_model_that_was_taken_away_gets_the_answer(engine: Engine, how: str) -> None:
    wanted, other = list(engine.generate([30, 31, 32], PARAMS)), Engine.load("nano", quant="int4", device="cpu")
    worker, made = EngineWorker(engine), engine.generate([30, 31, 32], PARAMS)
    if how == "unloaded":
        engine.unload()
    else:
        worker.engine = other
    assert within(20, lambda: list(made)) == wanted
    worker.close()


def test_nothing_is_computed_for_an_answer_that_nobody_holds(engine: Engine) -> None:
    begun, read = engine.generate([30, 31, 32], PARAMS), engine.generate([40, 31, 32], PARAMS)
    begun.begin()
    list(read.prefill())
    assert engine.scheduler.busy
    del begun, read
    assert not engine.scheduler.busy


def test_an_answer_that_is_gone_on_with_and_left_at_its_beginning_is_not_computed(engine: Engine) -> None:
    session = ChatSession(engine)
    list(session.send("Hello"))
    events = session.resume("I am a cat that", cancel=threading.Event())
    next(events)
    events.close()
    assert not engine.scheduler.busy


def test_an_error_that_is_kept_keeps_no_memory_of_the_pool(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    context, step = 512, engine.model.step
    monkeypatch.setattr(engine.model.model, "context", context)
    monkeypatch.setattr(type(engine.model), "chunk", 64)
    engine.prefixes = PrefixPool(engine.model)
    long = [20 + n % 100 for n in range(400)]

    def gives_out(spans: list[Span]) -> list[Tensor]:
        if spans[0].kept:
            raise RuntimeError("a fault")
        return step(spans)

    with monkeypatch.context() as patched:
        failed = engine.generate(long, PARAMS)
        patched.setattr(engine.model, "step", gives_out)
        with pytest.raises(RuntimeError, match="a fault") as kept:
            list(failed)
    other = engine.generate([150 + n % 100 for n in range(context - 20)], PARAMS)
    assert len(list(other)) == PARAMS.max_new_tokens
    assert kept.value is not None


def test_a_step_that_was_not_made_is_not_measured(engine: Engine) -> None:
    engine.speculate("auto")
    scheduler, speculation = engine.scheduler, engine.scheduler.speculation
    assert speculation is not None
    for prompt in ([30, 31, 32], list(range(20, 90))):
        made = engine.generate(prompt, PARAMS)
        hook = engine.model.model.layers[0].register_forward_pre_hook(lambda *_, made=made: made.cancel.set())
        list(made)
        hook.remove()
    assert (scheduler.steps, scheduler._rate, speculation.costs.seconds(3)) == (0, 0, None)


def test_a_thread_that_is_to_make_steps_sleeps_while_another_makes_one(engine: Engine) -> None:
    made, entered, go_on = engine.generate([30, 31, 32], PARAMS), threading.Event(), threading.Event()

    def slow(*_: object) -> None:
        entered.set()
        go_on.wait(10)

    hook = engine.model.model.layers[0].register_forward_pre_hook(slow)
    thread = threading.Thread(target=lambda: list(made))
    thread.start()
    entered.wait(10)
    began = time.monotonic()
    for _ in range(3):
        engine.scheduler.step()
    assert time.monotonic() - began > 0.2
    go_on.set()
    thread.join()
    hook.remove()


def test_between_steps_nothing_holds_what_was_computed(engine: Engine) -> None:
    list(engine.generate([30, 31, 32], PARAMS))
    blocks = engine.prefixes.blocks
    assert blocks is not None
    assert blocks.free == blocks.blocks - 1
    engine.prefixes = PrefixPool(engine.model)
    assert blocks.free == blocks.blocks


def test_a_draft_model_that_has_a_long_prompt_to_read_keeps_no_step_waiting(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(engine.model), "chunk", 16)
    draft, step, steps = DraftModel(engine.model), engine.model.step, list[int]()
    sequence = Sequence(list(range(20, 70)), PARAMS, engine.model.context, engine.tokenizer.size)

    def counted(spans: list[Span]) -> list[Tensor]:
        steps.append(len(spans[0].ids))
        return step(spans)

    monkeypatch.setattr(engine.model, "step", counted)
    for read in (1, 2, 3):
        assert draft.propose({sequence: 4}, Costs(), 1) == {sequence: []}
        assert steps == [16] * read
    draft.propose({sequence: 4}, Costs(), 1)
    assert steps[:5] == [16, 16, 16, 2, 1]  # the last is a guess


@pytest.mark.parametrize("waits_for", ["those who come", "those who leave"])
def test_nobody_waits_while_a_kept_prefix_is_read(engine: Engine, waits_for: str) -> None:
    begun, go_on = threading.Event(), threading.Event()

    class Slow(Disk):
        def extend(self, cache: PrefixCache, ids: list[int], reserve: Callable[[int], bool]) -> None:
            begun.set()
            assert go_on.wait(20)

        def rests(self, cache: PrefixCache) -> None:
            pass

        def close(self) -> None:
            pass

        leaves = rests

    scheduler = Scheduler(engine.model, PrefixPool(engine.model, disk=Slow()), parallel=4)
    made = [Generation(engine.model, [30, 31, 32 + n], PARAMS, scheduler=scheduler) for n in range(2)]
    thread = threading.Thread(target=lambda: list(made[0]))
    thread.start()
    assert begun.wait(20)
    try:
        within(5, made[1].begin if waits_for == "those who come" else made[0].close)
        assert thread.is_alive()
    finally:
        go_on.set()
        thread.join(20)


def test_a_turn_that_ctrl_c_kept_from_ending_is_not_waited_for(engine: Engine) -> None:
    scheduler = Scheduler(engine.model, PrefixPool(engine.model))
    made = Generation(engine.model, [30, 31, 32], PARAMS, scheduler=scheduler)

    def work() -> list[int]:
        assert scheduler._take_turn()  # and here it comes, before anything could give the turn back
        return list(made)

    assert len(within(20, work)) == PARAMS.max_new_tokens


def test_another_model_that_computes_more_answers_at_once_gets_as_many_threads(engine: Engine) -> None:
    with_one = Engine.load("nano", quant="int4", device="cpu", parallel=1)
    worker, all_run = EngineWorker(with_one), threading.Barrier(3)
    worker.engine = engine
    assert engine.parallel >= 3

    def job(engine: Engine) -> Iterator[int]:
        yield all_run.wait(20)

    events = [worker.run(job) for _ in range(3)]
    assert sorted(next(one) for one in events) == [0, 1, 2]
    worker.close()


def test_of_a_prompt_that_was_left_what_was_computed_is_counted(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(engine.model), "chunk", 16)
    engine.prefixes = PrefixPool(engine.model)
    before = engine.totals.prompt_tokens, engine.totals.prefilled_tokens
    generation = engine.generate(list(range(20, 120)), PARAMS)
    progress = engine.prefill(generation)
    assert next(progress).done == 16
    progress.close()
    counted = engine.totals.prompt_tokens - before[0], engine.totals.prefilled_tokens - before[1]
    assert counted == (16, 16)


def test_a_pool_of_one_context_is_enough_for_two_that_each_need_all_of_it(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine.model.model, "context", 256)
    params = replace(PARAMS, max_new_tokens=None)
    prompts = [[*range(20, 120)], [*range(20, 90), *range(150, 200)]]

    def answers(scheduler: Scheduler) -> list[Generation]:
        size = engine.tokenizer.size
        return [
            Generation(engine.model, one, params, (), size, speculation=scheduler.speculation, scheduler=scheduler)
            for one in prompts
        ]

    wanted = [list(one) for one in answers(Scheduler(engine.model, PrefixPool(engine.model), parallel=1))]
    scheduler = Scheduler(engine.model, PrefixPool(engine.model), parallel=2, speculation=Speculation())
    made = answers(scheduler)
    for one in made:
        one.begin()
    assert [list(one) for one in made] == wanted
    assert [len(one) + len(ids) for one, ids in zip(prompts, wanted, strict=True)] == [256, 256]
    assert scheduler.preempted
