"""Preparing: what has to be done with a body before the model's queue: parsed, checked, rendered, tokenized.

One body at a time, on a thread of its own: the event loop goes on answering, and many large requests together take no
more memory and hold the interpreter no longer than one.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from starlette.requests import Request

from glm4lite.server.errors import ApiError

T = TypeVar("T")
POLL_S = 0.15  # how often a request that waits for its turn looks whether its client is still there


class Preparing:
    """The thread."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "requests")

    async def run(self, request: Request, step: Callable[[], T]) -> T:
        """What `step` returns or raises, when its turn came; it is not begun for a client that went away meanwhile."""
        future = asyncio.wrap_future(self._thread.submit(_without_collecting, step))
        while not future.done():
            await asyncio.wait({future}, timeout=POLL_S)
            if not future.done() and await request.is_disconnected():
                future.cancel()
                raise ApiError("the client went away", 499)  # nobody reads it; nginx' number for that
        return future.result()

    def close(self) -> None:
        """Ends the thread after what it does now."""
        self._thread.shutdown(wait=False, cancel_futures=True)


def _without_collecting(step: Callable[[], T]) -> T:
    """What is prepared holds no cycles, but its many lists and objects make Python look through the whole heap, a
    loaded model's too, several times, with everybody else waiting."""
    was = gc.isenabled()
    gc.disable()
    try:
        return step()
    finally:
        if was:
            gc.enable()
