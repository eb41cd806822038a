"""Connection: uvicorn's HTTP/1.1, with an end to waiting for the other side.

uvicorn closes an idle connection, but waits for ever for the end of a header or a body that has begun, and for a reader
that does not read. A web page's long event streams are none of these: they are read, and their requests are complete.

A client may close its sending side once its request is sent, and still read (`nc -N`). On the wire that looks like one
that left. So it is asked: an interim response (102) reaches the one, and is refused by the other's system, which the
next write tells. Once the answer itself is being sent, that is what tells; a stream that may be silent for long writes
something now and then (an event stream a comment).
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from glm4lite.server.errors import ApiError, encode

HEAD_S = 10.0  # for a request's line and headers, from the first byte of a connection on
BODY_S = 120.0  # for the body: 8 MiB at half a megabit a second
READ_S = 30.0  # for a client to take the 64 KiB that wait for it
MOST_CONNECTIONS = 200  # below the 256 open files that macOS allows
HEAD_BYTES = 32 << 10
PROBE_S = 0.1  # until a client that sends no more is asked whether it reads; then twice as long each time
LONGEST_PROBE_S = 5.0
_RECEIVED = 16 << 10  # bytes taken at once: a client that sends one byte a chunk must not keep the loop for long


_SENT = (h11.DONE, h11.MUST_CLOSE)  # states of a client's side whose request is complete


class Connection(H11Protocol):
    """One client."""

    head_s, body_s, read_s, most = HEAD_S, BODY_S, READ_S, MOST_CONNECTIONS

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        with suppress(AttributeError):  # asyncio's own transport has it
            transport.max_size = _RECEIVED  # type: ignore[attr-defined]
        self._heard = False
        self._rests = False  # between two requests, for which uvicorn has a timer
        self._sends_no_more = False
        self._waits_for: Any = None  # the state of the client's side that the timer was started in
        self._arriving = _Timer(self.loop)
        self._leaving = _Timer(self.loop)
        self._asking = _Timer(self.loop)
        super().connection_made(transport)
        if len(self.connections) > self.most:
            self._refuse(ApiError(f"{self.most} connections are open already", 503, code="overloaded"))
        else:
            self._watch()

    def data_received(self, data: bytes) -> None:
        self._heard, self._rests = True, False
        super().data_received(data)
        self._watch()

    def eof_received(self) -> bool:  # type: ignore[override]
        """Whether the connection stays open: where a request is complete, and its answer is not."""
        if self.cycle is None or self.cycle.response_complete or self.conn.their_state not in _SENT:
            return False
        self._sends_no_more = True
        self._asking.start(PROBE_S, lambda: self._ask(PROBE_S))
        return True

    def on_response_complete(self) -> None:
        self._heard, self._rests = False, True
        super().on_response_complete()
        self._watch()
        if self._sends_no_more:
            self._asking.stop()
            self.transport.close()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._leaving.start(self.read_s, self.transport.abort)  # closing waits for the last bytes to be taken

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._arriving, self._leaving, self._asking):
            timer.stop()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._leaving.start(self.read_s, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._leaving.stop()

    def _watch(self) -> None:
        """Starts the timer of what the client has to send next."""
        rests = self._rests and self.conn.their_state is h11.IDLE
        state = None if rests else self.conn.their_state
        if state is self._waits_for:
            return
        self._waits_for = state
        limits = {h11.IDLE: self.head_s, h11.SEND_BODY: self.body_s}
        if state in limits:
            self._arriving.start(limits[state], self._give_up)
        else:
            self._arriving.stop()

    def _ask(self, next_s: float) -> None:
        """Writes what only a client that reads takes, as long as nothing else is being sent."""
        if self.transport.is_closing() or self.conn.our_state is not h11.SEND_RESPONSE:
            return
        if self.conn.their_http_version == b"1.1":  # older clients know no interim responses
            self.transport.write(self.conn.send(h11.InformationalResponse(status_code=102, headers=[])) or b"")
            self._asking.start(next_s, lambda: self._ask(min(2 * next_s, LONGEST_PROBE_S)))

    def _give_up(self) -> None:
        part = "header" if self.conn.their_state is h11.IDLE else "body"
        self._refuse(ApiError(f"the request's {part} did not arrive in time", 408))

    def _refuse(self, error: ApiError) -> None:
        """Says why, where that is possible, and closes."""
        begun = self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE)
        if not begun and (self._heard or error.status != 408):
            body = encode(error.body())
            headers = [
                ("content-type", "application/json"),
                ("content-length", str(len(body))),
                ("connection", "close"),
            ]
            for event in (h11.Response(status_code=error.status, headers=headers), h11.Data(body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        if self.cycle is not None:  # whoever answers has nobody to answer any more
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.close()
        self._leaving.start(self.read_s, self.transport.abort)


class _Timer:
    """At most one call to come."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._handle: asyncio.TimerHandle | None = None

    def start(self, seconds: float, call: Any) -> None:
        self.stop()
        self._handle = self._loop.call_later(seconds, call)

    def stop(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
        self._handle = None
