"""The body of a request: JSON in UTF-8 of bounded size and structure, or an ApiError that says what is wrong with it.

Python's parser holds the interpreter for as long as it runs, and a list of millions of `[]` takes it seconds and
hundreds of times the body's memory. So the structure is counted while the body arrives, and what no request needs is
refused before it is parsed, and without being kept.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
from starlette.requests import ClientDisconnect, Request

from glm4lite.base.errors import one_line
from glm4lite.server.errors import ApiError

BODY_LIMIT = 8 << 20  # bytes; a million tokens of English are half of it
HELD_LIMIT = 64 << 20  # bytes of all bodies that are read or wait to be parsed
_DRAINED = 256 << 20  # read and dropped behind the limit, because most clients read no answer before they sent all

# More than 16 000 messages and 128 tools consist of.
MOST_CONTAINERS = 100_000  # lists and objects
MOST_MEMBERS = 100_000  # of objects
MOST_VALUES = 200_000  # of all kinds, besides the token ids of a prompt
DEEPEST = 100
_PIECE = 64 << 10
_DEPTH_STEP = np.zeros(256, np.int8)
_DEPTH_STEP[list(b"[{")], _DEPTH_STEP[list(b"]}")] = 1, -1


class Structure:
    """Counts what JSON that is fed in pieces consists of (`found`) and how deep it is; ApiError where it is too much.

    Text that is no JSON is counted in some way: right up to where a parser would give up.
    """

    def __init__(self, context: int) -> None:
        # A prompt may be a list of token ids.
        self._most = {"lists and objects": MOST_CONTAINERS, "members": MOST_MEMBERS, "values": MOST_VALUES + context}
        self.found = dict.fromkeys(self._most, 0)
        self.end()

    def feed(self, data: bytes) -> None:
        """More of the text."""
        for start in range(0, len(data), _PIECE):
            self._count(self._outside(data[start : start + _PIECE]))

    def end(self) -> None:
        """What follows is another text; its values are added to those so far."""
        self._in_string, self._carried, self._depth = False, b"", 0

    def _outside(self, piece: bytes) -> bytes:
        """What of the piece stands outside of strings."""
        text = self._carried + piece
        # A backslash at the end belongs to the character that comes next.
        self._carried = b"\\" if (len(text) - len(text.rstrip(b"\\"))) % 2 else b""
        text = text.removesuffix(self._carried).replace(rb"\\", b"").replace(rb"\"", b"")
        parts = text.split(b'"')
        begin = int(self._in_string)
        self._in_string ^= len(parts) % 2 == 0
        return b"".join(parts[begin::2])

    def _count(self, text: bytes) -> None:
        opened = text.count(b"[") + text.count(b"{")
        counts = {"lists and objects": opened, "members": text.count(b":"), "values": opened + text.count(b",")}
        for what, count in counts.items():
            self.found[what] += count
            if self.found[what] > self._most[what]:
                raise ApiError(f"the body holds more than {self._most[what]} {what}")
        depths = _DEPTH_STEP[np.frombuffer(text, np.uint8)].cumsum(dtype=np.int64)
        if depths.size:
            deepest, self._depth = self._depth + int(depths.max()), self._depth + int(depths[-1])
            if deepest > DEEPEST:
                raise ApiError(f"the body is nested too deeply: more than {DEEPEST} lists and objects in each other")


class Bodies:
    """Reads bodies, and counts the memory that all of them hold together."""

    def __init__(self, limit: int = BODY_LIMIT, together: int = HELD_LIMIT) -> None:
        self.limit, self.together, self.held = limit, together, 0

    @asynccontextmanager
    async def read(self, request: Request, context: int) -> AsyncIterator[bytearray]:
        """The body's bytes, for a model of that context; they count as held until the `with` block ends.

        Raises ApiError: 415, 413, 400, or 503 where others hold too much. The rest of a refused body is dropped.
        """
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # a page of another origin cannot send this without asking first
            raise ApiError(f"Content-Type must be application/json, found {kind[:100]!r}", 415)
        body, refusal, dropped = _Body(self, Structure(context)), None, 0
        try:
            async for chunk in _chunks(request):
                if refusal is None:
                    refusal = body.add(chunk)
                else:
                    dropped += len(chunk)
                if dropped > _DRAINED:
                    break
            if refusal is not None:
                raise refusal
            yield body.data
        finally:
            body.drop()


class _Body:
    """One body as it arrives."""

    def __init__(self, bodies: Bodies, structure: Structure) -> None:
        self._bodies, self._structure = bodies, structure
        self._held = 0
        self.data = bytearray()

    def add(self, chunk: bytes) -> ApiError | None:
        """Why the body is refused, of which nothing is held then."""
        try:
            self._take(len(chunk))
            self._structure.feed(chunk)
        except ApiError as error:
            self.drop()
            return error
        self.data += chunk
        return None

    def drop(self) -> None:
        self._bodies.held -= self._held
        self._held = 0
        self.data.clear()

    def _take(self, more: int) -> None:
        bodies = self._bodies
        if self._held + more > bodies.limit:
            raise ApiError(f"the body is larger than {bodies.limit >> 20} MiB", 413, code="request_too_large")
        if bodies.held + more > bodies.together:
            wait = {"Retry-After": "1"}
            raise ApiError("too many large requests at once; try again in 1 s", 503, code="overloaded", headers=wait)
        bodies.held += more
        self._held += more


def parse(body: bytearray) -> dict[str, Any]:
    """A JSON object from bytes, which are given up; NaN and Infinity are no JSON."""
    try:
        text = body.decode("utf-8")
        body.clear()
        value = json.loads(text, parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise ApiError(f"the body is not valid UTF-8 (byte {error.start})") from None
    except RecursionError:
        raise ApiError("the body is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ApiError(f"the body is not valid JSON: {one_line(error)[:200]}") from None
    except ValueError:  # Python reads no longer ones, because that takes the square of their length
        raise ApiError("the body holds a whole number of thousands of digits") from None
    if not isinstance(value, dict):
        raise ApiError(f"the body must be a JSON object, found {type(value).__name__}")
    return value


async def _chunks(request: Request) -> AsyncIterator[bytes]:
    try:
        async for chunk in request.stream():
            yield chunk
    except ClientDisconnect:
        raise ApiError("the body ended early") from None  # nobody reads it


def _refuse_constant(name: str) -> Any:
    raise ApiError(f"the body is not valid JSON: {name} is not a JSON value")
