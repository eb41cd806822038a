"""Requests on their way: read in a thread of their own, a bounded number under way, answers as they complete."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Protocol

from glm4lite.checkpoint.streaming import ProgressCallback
from glm4lite.server.batch.lines import LineError, Request, Result

UNKNOWN_CONTEXT = 1 << 20  # tokens; that of a model elsewhere, which itself refuses more than it has
POLL_S = 0.5  # on Windows no wait without an end hears Ctrl-C

Done = Callable[[Result | BaseException], None]
"""Gets a request's result, or what ends the whole run."""


class Answerer(Protocol):
    """Who answers requests; it may be asked from several threads."""

    @property
    def at_once(self) -> int:
        """How many requests it is to be given at a time."""
        ...

    @property
    def context(self) -> int:
        """Of its model, in tokens, which a prompt may be a list of."""
        ...

    def begin(self, request: Request, done: Done, cancel: threading.Event) -> None:
        """Has a request answered. `done` is called once, on any thread, unless it was cancelled."""
        ...

    def close(self) -> None:
        """Stops what is under way."""
        ...


class Source(Protocol):
    """What an Answerer is made of, here or on another machine: values alone, so that it can be sent there."""

    @property
    def at_once(self) -> int:
        """As the Answerer's, as far as that is known before there is one."""
        ...

    def open(self, progress: ProgressCallback | None = None) -> Answerer: ...


def results(answerer: Answerer, asked: Iterable[Request | LineError]) -> Generator[Result]:
    """The answers, as they complete. Closing the iterator stops what is under way.

    Raises what reading `asked` raises, which happens in a thread of its own, so that a slow writer of requests does not
    hold up the answers, and what the Answerer says ends the run.
    """
    run = _Run(answerer, asked)
    try:
        yield from run.results()
    finally:
        run.stop()


class _Run:
    def __init__(self, answerer: Answerer, asked: Iterable[Request | LineError]) -> None:
        self._answerer, self._asked = answerer, asked
        self._room = threading.Semaphore(answerer.at_once)
        self._stopped = threading.Event()
        self._ended: queue.SimpleQueue[Result | BaseException | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, name="requests", daemon=True).start()

    def results(self) -> Iterator[Result]:
        while (ended := self._next()) is not None:
            if isinstance(ended, BaseException):
                raise ended
            yield ended
            self._room.release()

    def stop(self) -> None:
        self._stopped.set()
        self._room.release(self._answerer.at_once + 1)  # a reader that waits for room looks, and ends

    def _next(self) -> Result | BaseException | None:
        while True:
            try:
                return self._ended.get(timeout=POLL_S)
            except queue.Empty:
                continue

    def _read(self) -> None:
        try:
            for request in self._asked:
                self._room.acquire()
                if self._stopped.is_set():
                    return
                if isinstance(request, LineError):
                    self._ended.put(Result.unread(request))
                else:
                    self._answerer.begin(request, self._ended.put, self._stopped)
            for _ in range(self._answerer.at_once):
                self._room.acquire()  # all are written
            self._ended.put(None)
        except BaseException as error:
            self._ended.put(error)
