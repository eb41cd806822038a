"""From the engine's thread to the event loop: the pieces of one answer, for as long as the client is there."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator

from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from glm4lite.base.errors import Glm4liteError, QueueFull, WorkerClosed
from glm4lite.base.events import Done, Progress
from glm4lite.engine.worker import Ended, EngineWorker, Job
from glm4lite.server.answer import Piece, answer
from glm4lite.server.errors import ApiError, encode, told
from glm4lite.server.question import Question
from glm4lite.server.replies import JSON, Reply

logger = logging.getLogger("glm4lite")

POLL_S = 0.15  # how often a silent answer looks whether its client is still there
QUIET_S = 10.0  # after which a stream says that it is alive, for proxies in between


class Stream:
    """One question in the worker's queue. Iterate it once; the job is cancelled when the iteration ends early.

    Raises ApiError: 429 at once where the queue is full, 500 for what went wrong within.
    """

    def __init__(self, worker: EngineWorker, question: Question, request: Request) -> None:
        self._worker, self._request = worker, request
        self._pieces: asyncio.Queue[Piece | Ended] = asyncio.Queue()
        self.gone = False  # the client went away
        loop, cancel = asyncio.get_running_loop(), threading.Event()

        def deliver(piece: Piece | Ended) -> None:
            loop.call_soon_threadsafe(self._pieces.put_nowait, piece)

        try:
            self._job: Job[Piece] = worker.submit(lambda engine: answer(engine, question, cancel), deliver, cancel)
        except QueueFull as error:
            wait = {"Retry-After": str(error.retry_after)}
            raise ApiError(str(error), 429, code="queue_full", headers=wait) from None
        except WorkerClosed:
            raise _stopping() from None

    async def pieces(self) -> AsyncIterator[Piece | None]:
        """The pieces, Done last; None each time nothing came for a while."""
        looked, clock = 0.0, time.monotonic
        try:
            while not self.gone:
                piece = await self._next()
                if clock() - looked > POLL_S:
                    looked, self.gone = clock(), await self._request.is_disconnected()
                if isinstance(piece, Ended):
                    self._raise(piece.error)
                    return
                if isinstance(piece, Done) and piece.finish_reason == "cancelled":
                    raise _stopping()  # or the client left, and nobody reads this
                yield piece
        finally:
            self.cancel()

    async def _next(self) -> Piece | Ended | None:
        try:
            return await asyncio.wait_for(self._pieces.get(), POLL_S)
        except TimeoutError:
            return None

    def _raise(self, error: BaseException | None) -> None:
        if error is None:
            return
        if not isinstance(error, Glm4liteError):
            logger.error("an answer failed (%s)", self._request.state.request_id, exc_info=error)
        raise told(error)

    def cancel(self) -> None:
        """The answer is not wanted any more; nothing happens when it is complete."""
        self._worker.cancel(self._job)


def _stopping() -> ApiError:
    return ApiError("the server is stopping", 503)


class EventStream(StreamingResponse):
    """Server-sent events; the connection may put a comment between two of them (connection.py)."""

    media_type = "text/event-stream"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope.setdefault("state", {})["event_stream"] = True
        await super().__call__(scope, receive, send)


async def events(stream: Stream, reply: Reply, include_usage: bool) -> AsyncIterator[bytes]:
    """The answer as server-sent events. What goes wrong on the way is an event with an error object."""
    quiet = 0.0
    for chunk in reply.first():
        yield _event(chunk)
    try:
        async for piece in stream.pieces():
            quiet = quiet + POLL_S if piece is None else 0.0
            if piece is None and quiet >= QUIET_S:
                quiet = 0.0
                yield b": waiting\n\n"
            elif isinstance(piece, Progress):
                yield f": {piece.stage} {piece.done}/{piece.total} {piece.unit}\n\n".encode()
            elif piece is not None:
                for chunk in reply.chunks(piece):
                    yield _event(chunk)
    except ApiError as error:
        for chunk in reply.failed(error):
            yield _event(chunk)
        return
    for chunk in reply.last(include_usage):
        yield _event(chunk)
    yield reply.end


def _event(chunk: JSON) -> bytes:
    """An event; one that has a `type` is called so, as in OpenAI's Responses and in Anthropic's API."""
    name = f"event: {chunk['type']}\n".encode() if "type" in chunk else b""
    return name + b"data: " + encode(chunk) + b"\n\n"
