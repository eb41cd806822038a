"""A real HTTP server on loopback that gives out files by ranges, and misbehaves as it is told, answer by answer."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from tests.glm4lite.loopback import Loopback, QuietHandler


@dataclass
class Answer:
    """What is sent for one request; a fault changes it."""

    number: int
    path: str
    first: int
    last: int
    status: int
    body: bytes
    headers: dict[str, str]
    breaks: int | None = None
    """After so many bytes of the body the connection is closed."""
    stalls: float = 0.0
    """Seconds of silence in the middle of the body."""


Fault = Callable[[Answer], None]


@dataclass
class FileServer(Loopback):
    """`with FileServer({"/a": data}) as server: ... server.url, server.sent`."""

    files: dict[str, bytes]
    fault: Fault = lambda answer: None
    """Called with each answer to a GET before it is sent."""
    ranges: bool = True
    etags: dict[str, str] = field(default_factory=dict)
    pace: float = 0.0
    """Seconds before each answer."""
    sent: list[tuple[str, int, int]] = field(default_factory=list)
    """Path, first byte and number of bytes of each body, as far as it was sent."""
    tokens: list[str | None] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        files = self

        class Handler(_Handler):
            server_files = files

        self._lock, self.count = threading.Lock(), 0
        super().__init__(Handler)

    @property
    def bytes_sent(self) -> int:
        return sum(count for _, _, count in self.sent)

    def next_number(self) -> int:
        with self._lock:
            self.count += 1
            return self.count


class _Handler(QuietHandler):
    server_files: FileServer

    def do_GET(self) -> None:
        files = self.server_files
        files.tokens.append(self.headers.get("Authorization"))
        files.asked.append(self.path)
        if files.pace:
            time.sleep(files.pace)
        data = files.files.get(self.path)
        if data is None:
            return self._send(Answer(0, self.path, 0, 0, 404, b"", {}))
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        headers = {"ETag": f'"{files.etags[self.path]}"'} if self.path in files.etags else {}
        if part is None or not files.ranges:
            answer = Answer(0, self.path, 0, len(data) - 1, 200, data, headers)
        else:
            first, last = int(part[1]), min(int(part[2] or len(data)), len(data) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            answer = Answer(0, self.path, first, last, 206, data[first : last + 1], headers)
        if self.command == "GET":
            answer.number = files.next_number()
            files.fault(answer)
        return self._send(answer)

    def _send(self, answer: Answer) -> None:
        answer.body = b"" if answer.status >= 300 else answer.body
        self.send_response(answer.status)
        for key, value in ({"Content-Length": str(len(answer.body))} | answer.headers).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "GET" or answer.status >= 300:
            return
        done = 0
        with suppress(ConnectionError):
            middle = len(answer.body) // 2 if answer.stalls else 0
            for piece in (answer.body[:middle], answer.body[middle : answer.breaks]):
                self.wfile.write(piece)
                self.wfile.flush()
                done += len(piece)
                if answer.stalls and done == middle:
                    time.sleep(answer.stalls)
        if answer.status in (200, 206):
            self.server_files.sent.append((answer.path, answer.first, done))
        self.close_connection = self.close_connection or answer.breaks is not None or bool(answer.stalls)
