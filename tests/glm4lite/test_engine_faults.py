"""What goes wrong in one place stays there: whoever is stopped, fails or leaves, the engine goes on for the others."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import TypeVar

import pytest

from glm4lite.engine.decoding import Generation
from glm4lite.engine.engine import Engine
from glm4lite.engine.sampling import SamplingParams
from glm4lite.engine.worker import EngineWorker
from glm4lite_quant.kernels import native

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


class Interrupts:
    """A constraint that leaves by `error` at its `at`-th id."""

    def __init__(self, error: BaseException, at: int = 3) -> None:
        self.error, self.left = error, at

    def __call__(self, token: int, logits: object) -> int:
        self.left -= 1
        if not self.left:
            raise self.error
        return token


def several(engine: Engine, count: int = 3) -> list[Generation]:
    made = [engine.generate([30 + n, 31, 32], PARAMS) for n in range(count)]
    for one in made:
        one.begin()
    return made


def test_ctrl_c_while_an_answer_is_drawn_ends_that_one_and_the_others_are_whole(engine: Engine) -> None:
    wanted = [list(one) for one in several(engine)]
    made = several(engine)
    made[0].constraint = Interrupts(KeyboardInterrupt())
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
        made.constraint = Interrupts(SystemExit(3))
        return iter(made)

    with pytest.raises(SystemExit):
        within(20, lambda: list(worker.run(constrained)))
    assert within(20, lambda: list(worker.run(lambda engine: iter(engine.generate([30, 31, 32], PARAMS))))) == wanted
    worker.close()
