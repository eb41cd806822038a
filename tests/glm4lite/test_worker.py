"""The engine's thread: order, a bounded queue, cancelling, errors."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import glm4lite
from glm4lite.base.errors import ContextLengthError, QueueFull, WorkerClosed
from glm4lite.base.events import Done, Event, TextDelta
from glm4lite.chat.session import ChatSession
from glm4lite.engine.engine import Engine
from glm4lite.engine.worker import EngineWorker
from glm4lite.text.template import ChatTemplate
from glm4lite.text.tokenizer import Tokenizer
from tests.glm4lite.scripted import scripted_engine

NANO = Path(glm4lite.__file__).parent / "nano"


def scripted(parallel: int = 1) -> Engine:
    tokenizer, template = Tokenizer.from_folder(NANO), ChatTemplate.from_folder(NANO)
    assert template is not None
    return scripted_engine(tokenizer, template, ["\nHello.<|user|>", "\nFine.<|user|>"], parallel=parallel)


@pytest.fixture
def worker() -> Iterator[EngineWorker]:
    made = EngineWorker(scripted(), queue_size=2)
    yield made
    made.close()


class Gate:
    """A job that says "a", waits until it is opened or cancelled, and says "b"."""

    def __init__(self) -> None:
        self.opened, self.cancel, self.closed, self.thread = threading.Event(), threading.Event(), False, ""

    def __call__(self, engine: Engine) -> Iterator[str]:
        self.thread = threading.current_thread().name
        try:
            yield "a"
            while not self.opened.wait(0.01) and not self.cancel.is_set():
                pass
            yield "b"
        finally:
            self.closed = True


def test_a_session_answers_through_the_worker_as_without_it(worker: EngineWorker) -> None:
    session = ChatSession(worker.engine)
    events: list[Event] = list(worker.run(lambda engine: session.send("Hi")))
    assert events[0] == TextDelta("Hello")
    assert isinstance(events[-1], Done)
    state = worker.state()
    assert (state.finished, state.waiting, state.running) == (1, 0, 0)
    assert state.new_tokens == events[-1].new_tokens
    assert state.prompt_tokens == state.prefilled_tokens == events[-1].prompt_tokens


def test_tokens_are_counted_also_of_a_job_without_a_last_event(worker: EngineWorker) -> None:
    def half(engine: Engine) -> Iterator[str | None]:
        generation = engine.generate(engine.tokenizer.ids("Hi"), engine.params(max_new_tokens=2))
        yield from engine.pieces(generation)

    list(worker.run(half))
    state = worker.state()
    assert (state.prompt_tokens, state.new_tokens) == (len(worker.engine.tokenizer.ids("Hi")), 2)


def test_an_engine_that_computes_one_answer_at_once_runs_jobs_one_after_another(worker: EngineWorker) -> None:
    first, second = Gate(), Gate()
    one, two = worker.run(first, first.cancel), worker.run(second, second.cancel)
    assert next(one) == "a"
    time.sleep(0.05)
    assert second.thread == ""
    assert (worker.state().running, worker.state().waiting) == (1, 1)
    first.opened.set()
    second.opened.set()
    assert (list(one), list(two)) == (["b"], ["a", "b"])
    assert first.thread == second.thread


def test_as_many_jobs_run_side_by_side_as_the_engine_computes_at_once() -> None:
    worker = EngineWorker(scripted(parallel=2))
    gates = [Gate() for _ in range(3)]
    jobs = [worker.run(gate, gate.cancel) for gate in gates]
    assert [next(job) for job in jobs[:2]] == ["a", "a"]
    assert gates[0].thread != gates[1].thread
    time.sleep(0.05)
    assert (worker.state().running, worker.state().waiting, gates[2].thread) == (2, 1, "")
    gates[1].opened.set()
    assert list(jobs[1]) == ["b"]
    assert next(jobs[2]) == "a"
    worker.close()


def test_nothing_runs_beside_a_job_that_is_alone() -> None:
    worker = EngineWorker(scripted(parallel=2))
    gates = [Gate() for _ in range(3)]
    jobs = [worker.run(gate, gate.cancel, alone=gate is gates[1]) for gate in gates]
    assert next(jobs[0]) == "a"
    time.sleep(0.05)
    assert (gates[1].thread, gates[2].thread) == ("", "")
    gates[0].opened.set()
    assert next(jobs[1]) == "a"
    time.sleep(0.05)
    assert (worker.state().running, gates[2].thread) == (1, "")
    gates[1].opened.set()
    assert next(jobs[2]) == "a"
    worker.close()


def test_a_full_queue_refuses_at_once_and_says_when_to_come_back(worker: EngineWorker) -> None:
    gates = [Gate() for _ in range(3)]
    running = worker.run(gates[0])
    assert next(running) == "a"
    waiting = [worker.run(gate) for gate in gates[1:]]
    with pytest.raises(QueueFull, match="2 requests wait") as refused:
        worker.run(Gate())
    assert refused.value.retry_after >= 1
    assert worker.state().refused == 1
    for gate in gates:
        gate.opened.set()
    assert [list(events) for events in waiting] == [["a", "b"]] * 2


def test_a_waiting_job_that_is_cancelled_leaves_the_queue(worker: EngineWorker) -> None:
    first, second = Gate(), Gate()
    running, waiting = worker.run(first), worker.run(second, second.cancel)
    next(running)
    threading.Timer(0.05, second.cancel.set).start()
    assert list(waiting) == []  # and the first has not ended, which waits for its gate
    assert (worker.state().waiting, worker.state().cancelled) == (0, 1)
    first.opened.set()
    assert list(running) == ["b"]
    assert second.thread == ""


def test_cancelled_waiters_make_room_also_if_nobody_reads_them(worker: EngineWorker) -> None:
    gates = [Gate() for _ in range(4)]
    running = worker.run(gates[0])
    next(running)
    kept = [worker.run(gate, gate.cancel) for gate in gates[1:3]]
    gates[1].cancel.set()
    last = worker.run(gates[3])
    for gate in gates:
        gate.opened.set()
    assert [list(events) for events in (*kept, last)] == [[], ["a", "b"], ["a", "b"]]


def test_closing_the_events_cancels_the_job(worker: EngineWorker) -> None:
    gate = Gate()
    events: Any = worker.run(gate, gate.cancel)
    next(events)
    events.close()
    assert gate.cancel.is_set()
    assert list(worker.run(lambda engine: iter(["next"]))) == ["next"]
    assert gate.closed
    assert worker.state().cancelled == 1


def test_a_job_that_ignores_its_cancelling_is_closed(worker: EngineWorker) -> None:
    cancel = threading.Event()

    def deaf(engine: Engine) -> Iterator[int]:
        count = 0
        while True:
            time.sleep(0.01)
            yield (count := count + 1)

    events = worker.run(deaf, cancel)
    next(events)
    cancel.set()
    started = time.monotonic()
    list(events)
    assert time.monotonic() - started > 0.4  # its end is the job's, which would go on for ever


@pytest.mark.parametrize("error", [ContextLengthError("too long"), SystemExit(3), ZeroDivisionError()], ids=repr)
def test_an_error_is_raised_at_the_reader_and_the_worker_goes_on(worker: EngineWorker, error: BaseException) -> None:
    def failing(engine: Engine) -> Iterator[str]:
        yield "a"
        raise error

    events = worker.run(failing)
    assert next(events) == "a"
    with pytest.raises(type(error)):
        next(events)
    assert list(worker.run(lambda engine: iter(["on"]))) == ["on"]
    assert worker.state().failed == 1


def test_closing_the_worker_ends_what_runs_and_what_waits(worker: EngineWorker) -> None:
    first, second = Gate(), Gate()
    running, waiting = worker.run(first, first.cancel), worker.run(second, second.cancel)
    next(running)
    worker.close()
    assert list(waiting) == []
    with pytest.raises(WorkerClosed, match="closed"):
        worker.run(Gate())
