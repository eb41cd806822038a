"""The body of a request: JSON in UTF-8 of bounded size, or an ApiError that says what is wrong with it."""

from __future__ import annotations

import json
from typing import Any

from starlette.requests import Request

from glm4lite.errors import one_line
from glm4lite.server.errors import ApiError

BODY_LIMIT = 8 << 20  # bytes; a million tokens of English are half of it
_DRAINED = 256 << 20  # read and dropped behind the limit, because most clients read no answer before they sent all


async def read_json(request: Request, limit: int = BODY_LIMIT) -> dict[str, Any]:
    """The JSON object in the body. Raises ApiError: 415, 413 or 400."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # a page of another origin cannot send this without asking first
        raise ApiError(f"Content-Type must be application/json, found {kind[:100]!r}", 415)
    return parse(await _read(request, limit))


def parse(body: bytes) -> dict[str, Any]:
    """A JSON object from bytes; NaN and Infinity are no JSON."""
    try:
        value = json.loads(body.decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise ApiError(f"the body is not valid UTF-8 (byte {error.start})") from None
    except RecursionError:
        raise ApiError("the body is nested too deeply") from None
    except ValueError as error:
        raise ApiError(f"the body is not valid JSON: {one_line(error)[:200]}") from None
    if not isinstance(value, dict):
        raise ApiError(f"the body must be a JSON object, found {type(value).__name__}")
    return value


async def _read(request: Request, limit: int) -> bytes:
    chunks, size = list[bytes](), 0
    async for chunk in request.stream():
        size += len(chunk)
        if size <= limit:
            chunks.append(chunk)
        else:
            chunks.clear()
        if size > _DRAINED:
            break
    if size > limit:
        raise ApiError(f"the body is larger than {limit >> 20} MiB", 413, code="request_too_large")
    return b"".join(chunks)


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON value")
