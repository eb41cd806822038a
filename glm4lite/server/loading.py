"""What is answered while a model loads: 503 with how far it is, so that whoever waits for it sees that it comes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from socket import socket
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from glm4lite.base.events import Progress
from glm4lite.server.errors import ApiError, json_response
from glm4lite.server.guard import Access
from glm4lite.server.launch import serving
from glm4lite.server.manners import with_manners

METHODS = ["GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"]
RETRY_S = 2


class Loading:
    """How far a load is; `show` is what it reports to."""

    def __init__(self, show: Callable[[Progress], None]) -> None:
        self._show = show
        self._progress: Progress | None = None

    def show(self, progress: Progress) -> None:
        """Takes a report, and hands it on."""
        self._progress = progress
        self._show(progress)

    async def answer(self, request: Request) -> Response:
        """The same to every request."""
        far, said = self._progress, "the model is loading"
        state: dict[str, Any] = {"status": "loading"}
        if far is not None:
            said += f": {far.stage}, {far.done} of {far.total} {far.unit}"
            state["progress"] = {"stage": far.stage, "done": far.done, "total": far.total, "unit": far.unit}
        wait = {"Retry-After": str(RETRY_S), "Connection": "close"}
        if request.url.path == "/health":
            return json_response(state, 503, wait)
        return ApiError(said, 503, code="model_loading", headers=wait).response(request.url.path)

    def answering(self, listening: socket, access: Access) -> AbstractContextManager[None]:
        """Answers at that socket for the length of the `with` block."""
        app = Starlette(routes=[Route("/{path:path}", self.answer, methods=METHODS)])
        with_manners(app, access)
        return serving(app, listening)
