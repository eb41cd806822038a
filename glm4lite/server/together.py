"""Several iterators read at once, each in a thread of its own, so that none waits for another's next item."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")
POLL_S = 0.1  # how often it looks whether nobody waits any more


@dataclass(frozen=True)
class _Ended:
    error: BaseException | None


def together(
    begin: Sequence[Callable[[], Iterator[T]]], at_once: int, cancel: threading.Event, stop: threading.Event
) -> Iterator[tuple[int, T]]:
    """(which of them, item) as the items come, of `at_once` iterators at a time.

    `stop` is what the iterators watch: it is set when `cancel` is, when the reader leaves, and when one of them fails.
    Its error is raised here when all have ended.
    """
    items: queue.SimpleQueue[tuple[int, T | _Ended]] = queue.SimpleQueue()

    def read(place: int) -> None:
        error = None
        try:
            if not stop.is_set():
                iterator: Any = begin[place]()
                with closing(iterator):
                    for item in iterator:
                        items.put((place, item))
        except BaseException as found:
            error = found
            stop.set()
        items.put((place, _Ended(error)))

    threads = ThreadPoolExecutor(min(at_once, len(begin)), "together")
    failed, left = None, len(begin)
    try:
        for place in range(len(begin)):
            threads.submit(read, place)
        while left:
            try:
                place, item = items.get(timeout=POLL_S)
            except queue.Empty:
                if cancel.is_set():
                    stop.set()
                continue
            if not isinstance(item, _Ended):
                yield place, item
                continue
            left -= 1
            failed = failed or item.error
        if failed is not None:
            raise failed
    finally:
        stop.set()
        threads.shutdown()
