"""A web site on loopback whose answers a test decides: pages, searches, and how a server misbehaves."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit


@dataclass
class Answer:
    """`body` may be an iterator of pieces, which are sent as they come, without a length."""

    body: bytes | Iterable[bytes] = b""
    kind: str = "text/html; charset=utf-8"
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)


def html(title: str, *paragraphs: str) -> Answer:
    text = "".join(f"<p>{paragraph}</p>" for paragraph in paragraphs)
    return Answer(f"<html><head><title>{title}</title></head><body><nav>Menu</nav>{text}</body></html>".encode())


def redirect(target: str, status: int = 302) -> Answer:
    return Answer(status=status, headers={"Location": target})


def found(*results: Mapping[str, Any]) -> Answer:
    """As SearXNG answers in JSON."""
    return Answer(json.dumps({"query": "q", "results": list(results), "answers": []}).encode(), "application/json")


Page = Answer | Callable[[dict[str, list[str]]], Answer]


class WebSite:
    """Serves `pages` by path (a function gets the query's fields); `asked` are the paths with queries, in order."""

    def __init__(self, pages: Mapping[str, Page] | None = None) -> None:
        self.pages, self.asked = dict(pages or {}), list[str]()
        self.ended = threading.Event()
        site = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                site.asked.append(self.path)
                parts = urlsplit(self.path)
                page = site.pages.get(parts.path, Answer(b"nothing", status=404))
                answer = page if isinstance(page, Answer) else page(parse_qs(parts.query))
                with suppress(OSError):
                    self.answer(answer)

            def answer(self, answer: Answer) -> None:
                self.send_response(answer.status)
                headers = {"Content-Type": answer.kind, **answer.headers}
                if isinstance(answer.body, bytes):
                    headers["Content-Length"] = str(len(answer.body))
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                for piece in [answer.body] if isinstance(answer.body, bytes) else answer.body:
                    self.wfile.write(piece)
                    self.wfile.flush()

            def log_message(self, *_: object) -> None:
                """Nothing is printed."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self.host = f"127.0.0.1:{self.port}"
        self.url = f"http://{self.host}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.ended.set()
        self._server.shutdown()
        self._server.server_close()

    def silence(self) -> Iterable[bytes]:
        """A body that never comes, until the test is over."""
        self.ended.wait(60)
        yield b""

    def drops(self, piece: bytes = b"x", seconds: float = 0.05) -> Iterable[bytes]:
        """A body of a byte now and then."""
        while not self.ended.wait(seconds):
            yield piece

    def flood(self, size: int) -> Iterable[bytes]:
        """A body of so many bytes."""
        piece = b"x" * (1 << 16)
        for _ in range(size // len(piece)):
            yield piece
