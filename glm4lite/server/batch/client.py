"""A batch's requests answered by a server that speaks OpenAI's API: vLLM's, SGLang's, `glm4lite serve`.

A status that says "later" and a connection that fails are tried again for a minute. What a server says of one request
is that request's answer; what is wrong with the server (nobody there, another key, HTML) ends the run in one line, so
that not every line left becomes an error.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import threading
from dataclasses import dataclass, field
from typing import NoReturn
from urllib.parse import urlsplit

import httpx2

from glm4lite.base.errors import ConfigError, Glm4liteError, one_line, shown
from glm4lite.checkpoint.streaming import ProgressCallback
from glm4lite.server.batch.lines import Request, Result, no_stream
from glm4lite.server.batch.running import UNKNOWN_CONTEXT, Done
from glm4lite.server.errors import ApiError
from glm4lite.server.replies import JSON

AT_ONCE = 32  # requests that a server has at a time, unless told otherwise
MOST_AT_ONCE = 256
CONNECT_S = 10.0
SILENCE_S = 3600.0  # an answer is sent whole, so nothing is heard while it is computed
WAITS_S = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)  # before another try
LONGEST_WAIT_S = 120.0  # of what a Retry-After asks for
LATER = (408, 429, 502, 503, 504)
LONGEST_ANSWER = 256 << 20  # bytes; 128 K tokens with the log probabilities of 20 others each take half
KNOWN = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses")
_KEY = re.compile(r"[!-~]+")  # what a header can carry


class ServerError(Glm4liteError):
    """A server cannot be used: nobody is there, it wants another key, or it speaks something else."""


@dataclass(frozen=True)
class Server:
    """A server by its address, with or without /v1; ConfigError where that is none."""

    url: str
    key: str | None = field(default=None, repr=False)
    at_once: int = AT_ONCE

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.url)
            usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
            plain = not (parts.query or parts.fragment or parts.username)
        except ValueError:
            usable = plain = False
        if not (usable and plain and self.url.isprintable()):
            raise ConfigError(f"--server is {shown(self.url)}; use an address such as http://127.0.0.1:8000/v1")
        if not 1 <= self.at_once <= MOST_AT_ONCE:
            raise ConfigError(f"--parallel is {self.at_once}; a server gets from 1 to {MOST_AT_ONCE} requests at once")
        if self.key is not None and not _KEY.fullmatch(self.key):
            raise ConfigError("the API key is empty or holds what no header can carry")

    @property
    def base(self) -> str:
        """The address that /v1/… is added to."""
        return self.url.rstrip("/").removesuffix("/v1")

    def open(self, progress: ProgressCallback | None = None) -> Client:
        """Asks the server whether it is there; ServerError where it is not."""
        return Client(self)


class Client:
    """The Answerer of a server. Its requests are tasks of one thread, which closing cancels."""

    def __init__(self, server: Server) -> None:
        self.at_once, self.context, self._base = server.at_once, UNKNOWN_CONTEXT, server.base
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if server.key is not None:
            headers["Authorization"] = f"Bearer {server.key}"
        self._http = httpx2.AsyncClient(
            headers=headers,
            timeout=httpx2.Timeout(SILENCE_S, connect=CONNECT_S),
            limits=httpx2.Limits(max_connections=server.at_once),
        )
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="requests to the server", daemon=True).start()
        try:
            asyncio.run_coroutine_threadsafe(self._greet(), self._loop).result()
        except BaseException:
            self.close()
            raise

    def begin(self, request: Request, done: Done, cancel: threading.Event) -> None:
        async def answered() -> None:
            try:
                done(await self._result(request))
            except Exception as error:
                done(error)

        asyncio.run_coroutine_threadsafe(answered(), self._loop)

    def close(self) -> None:
        async def end() -> None:
            others = asyncio.all_tasks(self._loop) - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)
            await self._http.aclose()
            self._loop.stop()

        if self._loop.is_running():
            asyncio.run_coroutine_threadsafe(end(), self._loop)

    async def _greet(self) -> None:
        """A wrong address is said at once. Whether there is a list of models, and one yet, does not matter."""
        try:
            await asyncio.wait_for(self._tried("GET", "/v1/models", None), 2 * CONNECT_S)
        except TimeoutError:
            raise ServerError(f"{self._base} does not answer") from None
        except _Nobody as nobody:
            raise ServerError(str(nobody)) from None
        except _Later:
            return

    async def _result(self, request: Request) -> Result:
        try:
            url, body = request.url(KNOWN), request.body()
            if body.get("stream"):
                raise no_stream()
            status, said = await self._answer(url, json.dumps(body).encode())
        except ApiError as error:
            return Result.refused(request.custom_id, error)
        return Result.of(request.custom_id, status, said)

    async def _answer(self, url: str, body: bytes) -> tuple[int, JSON]:
        """What the server says of a request, asked again where it says later. Raises ServerError."""
        waits = iter(WAITS_S)
        while True:
            try:
                return await self._tried("POST", url, body)
            except httpx2.ReadTimeout:
                raise ApiError(f"the server gave no answer in {SILENCE_S:.0f} s", 504) from None
            except _Later as later:
                if (wait := next(waits, None)) is None:
                    raise ServerError(f"{later}, also after {sum(WAITS_S):.0f} s") from None
                # Spread, so that those who were refused together do not come back together.
                await asyncio.sleep(max(wait * random.uniform(0.5, 1.5), later.after))

    async def _tried(self, method: str, url: str, body: bytes | None) -> tuple[int, JSON]:
        where = self._base + url
        try:
            async with self._http.stream(method, where, content=body) as response:
                status, headers, data = response.status_code, response.headers, bytearray()
                async for piece in response.aiter_bytes():
                    data += piece
                    if len(data) > LONGEST_ANSWER:
                        raise ServerError(f"{where} answers with more than {LONGEST_ANSWER >> 20} MiB")
        except httpx2.ReadTimeout:
            raise
        except httpx2.TransportError as error:
            why = one_line(error, 200) or type(error).__name__
            if isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout):
                raise _Nobody(f"no server answers at {self._base} ({why})") from None
            raise _Later(f"{where} breaks off ({why})") from None
        if status in LATER:
            raise _Later(f"{where} answers {status}", _seconds(headers.get("Retry-After", "")))
        return status, self._read(where, status, headers.get("Content-Type", ""), bytes(data))

    def _read(self, where: str, status: int, kind: str, data: bytes) -> JSON:
        """The object of an answer that is one request's; ServerError for one that all would get."""
        try:
            said = json.loads(data, parse_constant=lambda _: None)  # NaN, as some servers write it
        except (ValueError, RecursionError):
            said = None
        if not isinstance(said, dict):
            _wrong(f"{where} answers {status} with {shown(kind or 'no type')}, which is no JSON object", self._base)
        if status in (401, 403):
            raise ServerError(f"{where} answers {status}: it takes no request with this key; give its own as --api-key")
        if status == 404 and "error" not in said and said.get("object") != "error" and not where.endswith("/models"):
            _wrong(f"{where} is not there ({status})", self._base)
        if 300 <= status < 400:
            _wrong(f"{where} answers {status}, which leads elsewhere", self._base)
        return said


class _Later(Exception):
    """What may go away by itself; `after` are seconds that the server asks to wait."""

    def __init__(self, why: str, after: float = 0.0) -> None:
        super().__init__(why)
        self.after = after


class _Nobody(_Later):
    """No connection is made."""


def _wrong(why: str, base: str) -> NoReturn:
    raise ServerError(f"{why}; is {base} an OpenAI server?")


def _seconds(text: str) -> float:
    """Of a Retry-After; 0 where it is a date or nothing."""
    return min(float(text), LONGEST_WAIT_S) if re.fullmatch(r"[0-9]{1,9}", text) else 0.0
