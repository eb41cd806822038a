"""OpenAI's batch files: each line of one is a request, each line of the other an answer, in the order they complete.

    {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"model": "nano", "messages": […]}}
    {"id": "batch_req_…", "custom_id": "a", "response": {"status_code": 200, "request_id": "req_…", "body": {…}},
     "error": null}

The forms are those of https://platform.openai.com/docs/api-reference/batch/request-input and …/batch/request-output. A
request that the server would refuse has the server's status and error object as its response. A line that is no request
has no response, but an error with a code, a message and, as in `errors.data` of a batch, the line's number.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from glm4lite.base.errors import Glm4liteError, one_line, shown
from glm4lite.server.body import BODY_LIMIT, Structure, parse
from glm4lite.server.errors import ApiError, told
from glm4lite.server.replies import JSON

logger = logging.getLogger("glm4lite")

LINE_LIMIT = BODY_LIMIT + (64 << 10)  # bytes: a body, and what stands around it
LONGEST_ID = 512  # characters
_MARK = b"\xef\xbb\xbf"  # at the start of files that were written on Windows


class LineError(Exception):
    """A line that is no request, so that its answer cannot be called by a custom_id."""

    def __init__(self, number: int, code: str, message: str) -> None:
        super().__init__(message)
        self.number, self.code = number, code


@dataclass(frozen=True)
class Request:
    """One line. What it asks for is not checked yet."""

    custom_id: str
    fields: dict[str, Any] = field(repr=False)

    @classmethod
    def read(cls, number: int, line: bytes | None, context: int) -> Request:
        """The request of a line for a model of that context; LineError."""
        if line is None:
            raise LineError(number, "line_too_long", f"the line is longer than {LINE_LIMIT >> 20} MiB")
        try:
            Structure(context).feed(line)
            fields = parse(bytearray(line))
        except ApiError as error:
            raise LineError(number, "invalid_json_line", str(error).replace("the body", "the line", 1)) from None
        custom_id = fields.get("custom_id")
        if not isinstance(custom_id, str) or not 0 < len(custom_id) <= LONGEST_ID or not _is_text(custom_id):
            wanted = f"custom_id must be text of 1 to {LONGEST_ID} characters"
            raise LineError(number, "invalid_custom_id", f"{wanted}, found {shown(custom_id)}")
        return cls(custom_id, fields)

    def url(self, known: Collection[str]) -> str:
        """To which of the known addresses it goes. Raises ApiError where it is to none of them."""
        url, method = self.fields.get("url"), self.fields.get("method")
        if not isinstance(url, str) or url not in known:
            raise ApiError(f"url: {shown(url)} is not answered; use {' or '.join(known)}", 404, param="url")
        if method != "POST":
            raise ApiError(f"method: must be 'POST', found {shown(method)}", 405, param="method")
        return url

    def body(self) -> dict[str, Any]:
        """What is asked. Raises ApiError where it is no object."""
        body = self.fields.get("body")
        if not isinstance(body, dict):
            raise ApiError(f"body: must be a JSON object, found {shown(body)}", param="body")
        return body


@dataclass(frozen=True)
class Result:
    """A line of answers as JSON; `ignored` are names in the request's body that mean nothing here."""

    line: JSON
    ignored: tuple[str, ...] = ()

    @classmethod
    def of(cls, custom_id: str, status: int, body: JSON, ignored: tuple[str, ...] = ()) -> Result:
        """What a server answered, or would."""
        response = {"status_code": status, "request_id": f"req_{secrets.token_hex(12)}", "body": body}
        return cls({**_head(custom_id), "response": response, "error": None}, ignored)

    @classmethod
    def refused(cls, custom_id: str, error: BaseException, ignored: tuple[str, ...] = ()) -> Result:
        """Why a request has no answer, as the server would say it; what is a bug is logged."""
        if not isinstance(error, ApiError | Glm4liteError):
            logger.error("a request failed", exc_info=error)
        refusal = told(error)
        return cls.of(custom_id, refusal.status, refusal.body(), ignored)

    @classmethod
    def unread(cls, error: LineError) -> Result:
        """Why a line is no request."""
        said = {"code": error.code, "message": str(error), "line": error.number}
        return cls({**_head(None), "response": None, "error": said})

    @property
    def error(self) -> str | None:
        """Why there is no answer."""
        if not failed(self.line):
            return None
        if self.line["error"]:
            return str(self.line["error"]["message"])
        return _message(self.line["response"]["body"]) or f"status {self.line['response']['status_code']}"

    @property
    def where(self) -> str:
        """The request, for people."""
        error = self.line["error"]
        return f"in line {error['line']}" if error else f"of {shown(self.line['custom_id'])}"

    @property
    def new_tokens(self) -> int:
        """Tokens of the answer, as its `usage` counts them."""
        usage = ((self.line["response"] or {}).get("body") or {}).get("usage")
        found = usage.get("completion_tokens") if isinstance(usage, dict) else None
        return found if type(found) is int else 0


def lines(file: BinaryIO) -> Iterator[tuple[int, bytes | None]]:
    """Each line that is not blank, with its number from 1 on; None for a longer one, which is read but not held."""
    number = 0
    while line := file.readline(LINE_LIMIT + 1):
        number += 1
        if number == 1:
            line = line.removeprefix(_MARK)
        if len(line) <= LINE_LIMIT or line.endswith(b"\n"):
            if line.strip():
                yield number, line
            continue
        while line and not line.endswith(b"\n"):
            line = file.readline(1 << 16)
        yield number, None


def requests(file: BinaryIO, context: int) -> Iterator[Request | LineError]:
    """The requests of a file for a model of that context. Of the file no more than a line is held, and all ids."""
    places = dict[str, int]()
    for number, line in lines(file):
        try:
            request = Request.read(number, line, context)
            if place := places.get(request.custom_id):
                message = f"custom_id {shown(request.custom_id)} is that of line {place} already"
                raise LineError(number, "duplicate_custom_id", message)
        except LineError as error:
            yield error
        else:
            places[request.custom_id] = number
            yield request


def failed(line: JSON) -> bool:
    """Whether a line of answers holds none."""
    response = line.get("response")
    return not isinstance(response, dict) or response.get("status_code") != 200


def no_stream() -> ApiError:
    """A file has no room for an answer in pieces."""
    return ApiError("stream: true is not supported in a batch", param="stream", code="unsupported_value")


def _head(custom_id: str | None) -> JSON:
    return {"id": f"batch_req_{secrets.token_hex(12)}", "custom_id": custom_id}


def _message(body: JSON) -> str:
    """What a server says is wrong: OpenAI's object, vLLM's older one, FastAPI's."""
    error = body.get("error", body)
    said = (error.get("message") or error.get("detail")) if isinstance(error, dict) else error
    return one_line(said, 500) if said else ""


def _is_text(value: str) -> bool:
    """Whether it can be written; JSON can hold one half of a surrogate pair."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
