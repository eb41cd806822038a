"""EngineWorker: one thread owns the model; callers submit work and read its events from their own threads.

    worker = EngineWorker(Engine.load("nano"))
    session, cancel = ChatSession(worker.engine), threading.Event()
    for event in worker.run(lambda engine: session.send("Hi", cancel), cancel):
        ...

What is submitted is a function from the Engine to an iterator of events. As many jobs as the engine computes at once
run side by side, each in a thread of its own that turns ids into events; one thread makes the steps for all of them.
An error that a job raises is raised where its events are read. A bounded number of jobs waits.
"""

from __future__ import annotations

import math
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

from glm4lite.base.errors import NoModel, QueueFull, WorkerClosed
from glm4lite.engine.engine import Engine
from glm4lite.engine.scheduler import Scheduler

T = TypeVar("T")

WAITING = 512  # jobs that may wait by default
POLL_S = 0.1  # how often a reader looks whether its job was cancelled while it waits
LAST_WORDS_S = 0.5  # what a cancelled job gets to end by itself, with its Done
LONGEST_RETRY_S = 120


@dataclass(frozen=True)
class WorkerState:
    """What the worker and its engine did so far, for a status line or metrics.

    `prefilled_tokens` are the prompt tokens that were computed, the rest was found in a kept prefix; `drafted_tokens`
    were guessed, and `accepted_tokens` of them rightly. `preempted` counts answers that gave their memory to others and
    were computed again. `busy_s` is the time spent on steps, `decode_s` all answers' time from the end of the prompt.
    """

    waiting: int = 0
    running: int = 0
    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    refused: int = 0
    prompt_tokens: int = 0
    prefilled_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    new_tokens: int = 0
    preempted: int = 0
    steps: int = 0
    busy_s: float = 0.0
    decode_s: float = 0.0


@dataclass(frozen=True)
class Ended:
    """The last thing a job delivers; `error` is what it raised."""

    error: BaseException | None = None


@dataclass(eq=False)
class Job(Generic[T]):
    """One piece of work. `deliver` is called on the job's thread for each event and, last, with Ended.

    A job that is cancelled while it waits delivers Ended alone, on the thread that finds it so. `alone`: nothing else
    runs beside it, for it takes the model away.
    """

    make_events: Callable[[Engine], Iterator[T]]
    cancel: threading.Event
    deliver: Callable[[T | Ended], None]
    alone: bool = False


class EngineWorker:
    """The thread that owns an Engine's model, the threads of the jobs, and the queue in front of them.

    `engine` may be read by anyone (its tokenizer, its template, its settings), but is computed with by jobs only.
    """

    def __init__(self, engine: Engine, queue_size: int = WAITING) -> None:
        """As many jobs as `engine.parallel` run at once; `queue_size` more may wait."""
        self.queue_size = queue_size
        self._waiting: deque[Job[Any]] = deque()
        self._changed = threading.Condition()
        self._state = WorkerState()
        self._closed = False
        self._running: list[Job[Any]] = []
        self._recent: deque[float] = deque(maxlen=16)  # seconds of the last jobs
        self._engine = engine
        self._threads = [threading.Thread(target=self._make_steps, name="engine", daemon=True)]
        self._take(engine)
        self._threads[0].start()

    @property
    def engine(self) -> Engine:
        return self._engine

    @engine.setter
    def engine(self, engine: Engine) -> None:
        """Another model's, from the next job on; for a job that is alone."""
        with self._changed:
            self._take(engine)

    def _take(self, engine: Engine) -> None:
        self._leave()
        self._engine = engine
        for number in range(len(self._threads) - 1, engine.parallel):  # one for each answer that is computed at once
            thread = threading.Thread(target=self._work, name=f"answer-{number}", daemon=True)
            self._threads.append(thread)
            thread.start()
        if (scheduler := self._scheduler) is not None:
            scheduler.wake = self._wake

    def _leave(self) -> None:
        """Who uses the model from now on makes the steps himself."""
        if (scheduler := self._scheduler) is not None and scheduler.wake == self._wake:
            scheduler.wake = None

    @property
    def _scheduler(self) -> Scheduler | None:
        """None where no model is in memory. Asked for at once, for another thread may unload it at any time."""
        try:
            return self._engine.scheduler
        except NoModel:
            return None

    def run(
        self, make_events: Callable[[Engine], Iterator[T]], cancel: threading.Event | None = None, alone: bool = False
    ) -> Iterator[T]:
        """Submits a job at once and returns its events. Closing the iterator cancels the job.

        Once `cancel` is set, a waiting job ends without events within 0.1 s; a running one ends by itself (it should
        watch the same event) or is closed 0.5 s later, behind its next event.

        Raises:
            QueueFull: too many jobs wait; nothing was submitted.
            WorkerClosed: close() was called.
        """
        events: queue.SimpleQueue[T | Ended] = queue.SimpleQueue()
        job = self.submit(make_events, events.put, cancel, alone)
        return _Events(self, job, events)

    def submit(
        self,
        make_events: Callable[[Engine], Iterator[T]],
        deliver: Callable[[T | Ended], None],
        cancel: threading.Event | None = None,
        alone: bool = False,
    ) -> Job[T]:
        """As `run`, for callers that cannot block: `deliver` is called with each event and, last, Ended."""
        job = Job(make_events, cancel or threading.Event(), deliver, alone)
        with self._changed:
            if self._closed:
                raise WorkerClosed("the model was closed")
            abandoned = self._take_cancelled()
            full = len(self._waiting) >= self.queue_size
            if full:
                self._count(refused=1)
                refusal = QueueFull(len(self._waiting), self._retry_after())
            else:
                self._waiting.append(job)
                self._changed.notify_all()
        for old in abandoned:
            _deliver(old, Ended())
        if full:
            raise refusal
        return job

    def cancel(self, job: Job[Any]) -> None:
        """Sets the job's cancel event; one that waits leaves the queue now."""
        job.cancel.set()
        with self._changed:
            abandoned = self._take_cancelled()
        for old in abandoned:
            _deliver(old, Ended())

    def state(self) -> WorkerState:
        """A snapshot of the counters."""
        totals, scheduler = self.engine.totals, self._scheduler
        with self._changed:
            return replace(
                self._state,
                waiting=len(self._waiting),
                running=len(self._running),
                prompt_tokens=totals.prompt_tokens,
                prefilled_tokens=totals.prefilled_tokens,
                drafted_tokens=totals.drafted_tokens,
                accepted_tokens=totals.accepted_tokens,
                new_tokens=totals.new_tokens,
                decode_s=totals.seconds,
                preempted=scheduler.preempted if scheduler else 0,
                steps=scheduler.steps if scheduler else 0,
                busy_s=scheduler.busy_s if scheduler else 0.0,
            )

    def close(self, timeout_s: float = 5.0) -> None:
        """Cancels everything and ends the thread; jobs that waited end without events."""
        with self._changed:
            self._closed = True
            for job in (*self._waiting, *self._running):
                job.cancel.set()
            self._changed.notify_all()
        end = time.monotonic() + timeout_s
        self._leave()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(max(0.0, end - time.monotonic()))

    def _take_cancelled(self) -> list[Job[Any]]:
        """Removes cancelled jobs from the queue; the caller, who holds the lock, tells them later."""
        gone = [job for job in self._waiting if job.cancel.is_set()]
        for job in gone:
            self._waiting.remove(job)
        self._count(cancelled=len(gone))
        return gone

    def _retry_after(self) -> int:
        """Seconds until the queue has moved on by one, as the last jobs went."""
        usual = sum(self._recent) / len(self._recent) if self._recent else 1.0
        return min(max(1, math.ceil(usual / self._engine.parallel)), LONGEST_RETRY_S)

    def _count(self, **more: float) -> None:
        self._state = replace(self._state, **{name: getattr(self._state, name) + n for name, n in more.items()})

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _make_steps(self) -> None:
        """The engine's thread."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._to_step() or (self._closed and not self._running))
                scheduler = self._to_step()  # a reader who left may have ended it since
                if scheduler is None and self._closed and not self._running:
                    return
            if scheduler is not None:
                scheduler.step()
            del scheduler

    def _to_step(self) -> Scheduler | None:
        """Where there is something to compute."""
        scheduler = self._scheduler
        return scheduler if scheduler is not None and scheduler.busy else None

    def _may_begin(self) -> bool:
        """Whether the first job that waits can run beside those that run."""
        if not self._waiting:
            return False
        return not self._running or not (self._waiting[0].alone or any(job.alone for job in self._running))

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._may_begin() or (self._closed and not self._waiting))
                if not self._waiting:
                    return
                job = self._waiting.popleft()
                self._running.append(job)
            started = time.monotonic()
            ended = Ended() if job.cancel.is_set() else self._perform(job)
            with self._changed:
                self._running.remove(job)
                self._recent.append(time.monotonic() - started)
                kind = "failed" if ended.error else "cancelled" if job.cancel.is_set() else "finished"
                self._count(**{kind: 1})
                self._changed.notify_all()
            _deliver(job, ended)
            del job, ended  # nothing of a job outlives it here, tensors of a traceback least of all

    def _perform(self, job: Job[Any]) -> Ended:
        """Runs one job to its end; whatever it raises goes to its caller, and the thread goes on."""
        try:
            events = job.make_events(self.engine)
            try:
                self._pump(job, events)
            finally:
                close = getattr(events, "close", None)
                if close is not None:
                    close()
        except BaseException as error:
            return Ended(error)
        return Ended()

    def _pump(self, job: Job[Any], events: Iterator[Any]) -> None:
        asked: float | None = None  # when it was first seen to be cancelled
        for event in events:
            if not _deliver(job, event):
                job.cancel.set()
            if job.cancel.is_set():
                asked = asked or time.monotonic()
                if time.monotonic() - asked > LAST_WORDS_S:
                    return


def _deliver(job: Job[Any], event: Any) -> bool:
    """False when nobody can be told any more (an event loop that was closed, say)."""
    try:
        job.deliver(event)
    except Exception:
        return False
    return True


class _Events(Iterator[T]):
    """The reader's side of a job."""

    def __init__(self, worker: EngineWorker, job: Job[T], events: queue.SimpleQueue[T | Ended]) -> None:
        self._worker, self._job, self._events = worker, job, events
        self._over = False

    def __next__(self) -> T:
        while not self._over:
            try:
                event = self._events.get(timeout=POLL_S)
            except queue.Empty:
                if self._job.cancel.is_set():
                    self._worker.cancel(self._job)
                continue
            if not isinstance(event, Ended):
                return event
            self._over = True
            if event.error is not None:
                raise event.error
        raise StopIteration

    def close(self) -> None:
        """Cancels the job, as a generator's close() would; reading on gives nothing."""
        if not self._over:
            self._over = True
            self._worker.cancel(self._job)

    def __del__(self) -> None:
        self.close()
