"""Threads that fetch, beside a caller's thread that reports how far they are and can stop them.

So Ctrl-C, or an exception from the progress callback, ends a download at once.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable

from glm4lite.base.errors import HubError, one_line
from glm4lite.base.events import Progress

ProgressCallback = Callable[[Progress], None]

_POLL_SECONDS = 0.1
_LEAVING_SECONDS = 2  # a stalled connection is not waited for


class Stopped(Exception):
    """Ends the connections after the caller stopped."""


class Counter:
    """Bytes that are here so far, of `total`; what an earlier run left counts from the beginning."""

    def __init__(self, progress: ProgressCallback | None) -> None:
        self.total = 0
        self.stopped, self.waited = threading.Event(), False
        self._done, self._shown = 0, 0
        self._progress = progress
        self._lock = threading.Lock()

    def add(self, count: int) -> None:
        """Called by the connections' threads; fewer where a server begins again. Raises where the caller stopped."""
        self.poll()
        with self._lock:
            self._done += count

    def poll(self) -> None:
        if self.stopped.is_set():
            raise Stopped

    def show(self) -> None:
        """Called by the caller's thread."""
        done = max(self._shown, min(self._done, self.total))  # a server that began again does not turn the bar back
        if self._progress is not None and done != self._shown:
            self._shown = done
            self._progress(Progress("download", done, self.total, "bytes"))


class Connections:
    """`count` threads that do `work`, which returns when nothing is left for its thread."""

    def __init__(self, work: Callable[[], None], count: int, counter: Counter) -> None:
        self._work, self._counter = work, counter
        self._ended = queue.SimpleQueue[Exception | None]()
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    def _run(self) -> None:
        try:
            self._work()
        except Exception as error:
            self._ended.put(error)
        except BaseException as error:  # a panic of native code
            self._ended.put(HubError(f"the download failed ({one_line(error)}); run it again"))
        else:
            self._ended.put(None)

    def wait(self) -> Exception | None:
        """Shows the count until all threads have ended, or returns the first error; then none of them goes on."""
        left = len(self._threads)
        try:
            while left:
                try:
                    error = self._ended.get(timeout=_POLL_SECONDS)
                except queue.Empty:
                    self._counter.show()
                    continue
                if error is not None:
                    return error
                left -= 1
            self._counter.show()
            return None
        finally:
            if left:
                self._counter.stopped.set()
            self._join()

    def stop(self) -> None:
        self._counter.stopped.set()
        self._join()

    def _join(self) -> None:
        deadline = time.monotonic() + _LEAVING_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
