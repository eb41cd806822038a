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
import queue
import secrets
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, BinaryIO

from glm4lite.base.errors import Glm4liteError, shown
from glm4lite.engine.worker import Ended, EngineWorker
from glm4lite.server.answer import Piece, answer
from glm4lite.server.body import BODY_LIMIT, Structure, parse
from glm4lite.server.endpoint import CHAT, COMPLETION, Endpoint, ModelNames
from glm4lite.server.errors import ApiError, told
from glm4lite.server.replies import JSON, Reply

logger = logging.getLogger("glm4lite")

LINE_LIMIT = BODY_LIMIT + (64 << 10)  # bytes: a body, and what stands around it
LONGEST_ID = 512  # characters
POLL_S = 0.5  # on Windows no wait without an end hears Ctrl-C
_MARK = b"\xef\xbb\xbf"  # at the start of files that were written on Windows
_ENDPOINTS: dict[str, Endpoint[Any]] = {"/v1/chat/completions": CHAT, "/v1/completions": COMPLETION}


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

    def endpoint(self) -> Endpoint[Any]:
        """Whose body this is. Raises ApiError where nobody answers it."""
        url, method = self.fields.get("url"), self.fields.get("method")
        if not isinstance(url, str) or url not in _ENDPOINTS:
            raise ApiError(f"url: {shown(url)} is not answered; use {' or '.join(_ENDPOINTS)}", 404, param="url")
        if method != "POST":
            raise ApiError(f"method: must be 'POST', found {shown(method)}", 405, param="method")
        return _ENDPOINTS[url]

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

    @property
    def error(self) -> str | None:
        """Why there is no answer."""
        if not failed(self.line):
            return None
        error = self.line["error"] or self.line["response"]["body"]["error"]
        return str(error["message"])

    @property
    def where(self) -> str:
        """The request, for people."""
        error = self.line["error"]
        return f"in line {error['line']}" if error else f"of {shown(self.line['custom_id'])}"


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


def results(worker: EngineWorker, model: str, asked: Iterable[Request | LineError], at_once: int) -> Generator[Result]:
    """The answers, as they complete. Closing the iterator stops what is under way.

    model: the name by which requests call it. at_once: how many requests are read ahead and answered at once; the
    worker must let as many wait. Raises what reading `asked` raises, which happens in a thread of its own, so that a
    slow writer of requests does not hold up the answers.
    """
    run = _Run(worker, model, asked, at_once)
    try:
        yield from run.results()
    finally:
        run.stop()


class _Run:
    def __init__(self, worker: EngineWorker, model: str, asked: Iterable[Request | LineError], at_once: int) -> None:
        self._worker, self._model, self._asked, self._at_once = worker, model, asked, at_once
        self._room = threading.Semaphore(at_once)
        self._stopped = threading.Event()
        self._ended: queue.SimpleQueue[_Ended | BaseException | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, name="requests", daemon=True).start()

    def results(self) -> Iterator[Result]:
        while (ended := self._next()) is not None:
            if isinstance(ended, BaseException):
                raise ended
            yield ended.result()
            self._room.release()

    def stop(self) -> None:
        self._stopped.set()
        self._room.release(self._at_once + 1)  # a reader that waits for room looks, and ends

    def _next(self) -> _Ended | BaseException | None:
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
                    self._ended.put(_Ended(None, request))
                else:
                    self._begin(request)
            for _ in range(self._at_once):
                self._room.acquire()  # all are written
            self._ended.put(None)
        except BaseException as error:
            self._ended.put(error)

    def _begin(self, request: Request) -> None:
        """Prepares a request and puts it into the worker's queue; what it may not ask for ends it here."""
        engine, pieces, ended = self._worker.engine, list[Piece](), _Ended(request.custom_id)
        try:
            endpoint = request.endpoint()
            names = ModelNames(self._model, adapters=engine.adapters)
            asked = endpoint.read(request.body(), names)
            ended.ignored = tuple(asked.ignored)
            if asked.stream:
                raise ApiError("stream: true is not supported in a batch", param="stream", code="unsupported_value")
            question = endpoint.ask(engine, asked, names)
            ended.ignored += question.ignored
        except Exception as error:
            ended.error = error
            self._ended.put(ended)
            return
        ended.answer = partial(_whole, endpoint.reply(names.answering(asked.model), question, asked), pieces)

        def deliver(piece: Piece | Ended) -> None:
            if isinstance(piece, Ended):
                ended.error = piece.error
                self._ended.put(ended)
            else:
                pieces.append(piece)

        self._worker.submit(lambda engine: answer(engine, question, self._stopped), deliver, self._stopped)


def _whole(reply: Reply, pieces: list[Piece]) -> JSON:
    for piece in pieces:
        for _ in reply.chunks(piece):
            pass
    return reply.whole()


@dataclass
class _Ended:
    """A line that was dealt with: `answer` makes the body where there is no error."""

    custom_id: str | None
    error: BaseException | None = None
    answer: Callable[[], JSON] = dict
    ignored: tuple[str, ...] = ()

    def result(self) -> Result:
        response: JSON | None = None
        error: JSON | None = None
        if isinstance(self.error, LineError):
            error = {"code": self.error.code, "message": str(self.error), "line": self.error.number}
        else:
            status, body = self._answered()
            response = {"status_code": status, "request_id": f"req_{secrets.token_hex(12)}", "body": body}
        head = {"id": f"batch_req_{secrets.token_hex(12)}", "custom_id": self.custom_id}
        return Result({**head, "response": response, "error": error}, self.ignored)

    def _answered(self) -> tuple[int, JSON]:
        """The status and the body of the server's answer."""
        error = self.error
        if error is None:
            try:
                return 200, self.answer()
            except Exception as found:
                error = found
        if not isinstance(error, ApiError | Glm4liteError):
            logger.error("a request failed", exc_info=error)
        refusal = told(error)
        return refusal.status, refusal.body()


def _is_text(value: str) -> bool:
    """Whether it can be written; JSON can hold one half of a surrogate pair."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
