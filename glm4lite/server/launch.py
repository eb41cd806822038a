"""Serving an app: where it may listen, and uvicorn's settings."""

from __future__ import annotations

import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool

from glm4lite.base.errors import ConfigError, one_line
from glm4lite.server.connection import HEAD_BYTES, Connection
from glm4lite.server.guard import is_loopback

SHUTDOWN_S = 2  # for the last words of answers that are being given
KEEP_ALIVE_S = 60  # that a connection may rest between two requests, as clients' own pools let theirs


@dataclass(frozen=True)
class Address:
    """Where to listen, and the key that is asked for. Raises ConfigError, before anything is loaded.

    Without a key only this machine's own names are possible: whoever reaches the port uses the model.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.api_key is not None and (not self.api_key.strip() or not self.api_key.isprintable()):
            raise ConfigError("the API key is empty or holds what cannot be typed")
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"the port is {self.port}; use a number up to 65535")
        if self.api_key is None and not is_loopback(self.host):
            raise ConfigError(
                f"--host {self.host[:100]} would open the model to other machines: that needs an --api-key"
            )

    def listen(self) -> socket.socket:
        """A bound socket, so that a port in use is said before a model loads; ConfigError."""
        try:
            family, kind, protocol, _, where = socket.getaddrinfo(
                self.host, self.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            listening = socket.socket(family, kind, protocol)
        except (OSError, UnicodeError) as error:
            raise ConfigError(f"--host {self.host[:100]}: {one_line(error)}") from None
        try:
            if sys.platform == "win32":  # its SO_REUSEADDR would take the port of a program that is running
                listening.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
            else:
                listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(where)
        except OSError as error:
            listening.close()
            raise ConfigError(f"cannot listen on {self.host[:100]} port {self.port}: {one_line(error)}") from None
        return listening


def name_of(model: str | Path) -> str:
    """What a model is called in the API: a folder by its last name, anything else as it was asked for."""
    return Path(model).resolve().name if Path(model).is_dir() else str(model)


def url_of(listening: socket.socket) -> str:
    """http://127.0.0.1:8000"""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(app: Starlette, listening: socket.socket, started: Callable[[], None] = lambda: None) -> None:
    """Serves an app of `create_app` until Ctrl-C; `started` is called when requests are answered."""
    with suppress(KeyboardInterrupt):  # uvicorn raises the one it ended for once more
        Server(app, started).run(sockets=[listening])


@contextmanager
def serving(app: Starlette, listening: socket.socket) -> Iterator[None]:
    """Serves any app in a thread, for the length of the `with` block; the socket stays open for the next one."""
    server = uvicorn.Server(_configured(app))
    thread = threading.Thread(target=server.run, args=([listening.dup()],), name="http", daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.should_exit = True
        thread.join()


class Server(uvicorn.Server):
    """uvicorn as this app needs it; `should_exit` ends it."""

    def __init__(self, app: Starlette, started: Callable[[], None] = lambda: None) -> None:
        super().__init__(_configured(app))
        self._announce, self._state = started, app.state

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._announce()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._state.closing.set()
        await run_in_threadpool(self._state.worker.close)  # uvicorn waits for answers first, and then closes the app
        await super().shutdown(sockets)


def _configured(app: Starlette) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        log_level="warning",  # no access log: requests are counted in /metrics, and nothing of them is written down
        access_log=False,
        server_header=False,
        proxy_headers=False,
        ws="none",
        http=Connection,
        h11_max_incomplete_event_size=HEAD_BYTES,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=SHUTDOWN_S,
    )
