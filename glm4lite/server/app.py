"""create_app: the endpoints, on FastAPI so that a page can be mounted on the same app."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from starlette.background import BackgroundTask
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from glm4lite.base.errors import CheckpointError, NoModel
from glm4lite.engine.worker import EngineWorker
from glm4lite.server.body import Bodies, parse
from glm4lite.server.endpoint import CHAT, COMPLETION, Asked, Endpoint, check_model
from glm4lite.server.errors import ApiError, json_response, told
from glm4lite.server.guard import Guard
from glm4lite.server.metrics import Metrics
from glm4lite.server.preparing import Preparing
from glm4lite.server.stream import Stream, events

LOOKING = ["GET", "HEAD"]  # HEAD is what the health checks of containers send
ENDPOINTS = {
    "/v1/models": (LOOKING, "models"),
    "/v1/models/{name:path}": (LOOKING, "model"),
    "/v1/chat/completions": (["POST"], "chat"),
    "/v1/completions": (["POST"], "completion"),
    "/health": (LOOKING, "health"),
    "/metrics": (LOOKING, "metrics_page"),
}
NO_BUFFER = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


def create_app(
    worker: EngineWorker,
    model: str | Callable[[], str] = "nano",
    api_key: str | None = None,
    hosts: Iterable[str] = (),
) -> FastAPI:
    """The app of one model.

    model: its name in the API, or a function that tells it where another model may be loaded. api_key: asked for
    everywhere but at /health. hosts: names besides localhost and loopback addresses under which it answers without a
    key. The worker is closed with the app.
    """
    api = Api(worker, model)
    app = FastAPI(
        title="glm4lite",
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        lifespan=_closing(worker, api.preparing),
        telemetry={"tracing": False, "metrics": False, "logs": False, "auto_configure": False},
    )
    app.state.worker = worker
    app.state.closing = asyncio.Event()  # set when the server stops, for streams that end with the page only
    app.add_middleware(Guard, api_key=api_key, hosts=tuple(hosts))
    app.add_middleware(_Counted, metrics=api.metrics)
    app.add_exception_handler(ApiError, _refused)
    app.add_exception_handler(HTTPException, _refused)
    app.add_exception_handler(CheckpointError, _failed)
    app.add_exception_handler(NoModel, _failed)
    app.add_exception_handler(Exception, _failed)
    for path, (methods, endpoint) in ENDPOINTS.items():
        app.add_api_route(path, getattr(api, endpoint), methods=methods)
    return app


class Api:
    """The endpoints. What comes before the model happens in Preparing's thread, the model's work in the worker's."""

    def __init__(self, worker: EngineWorker, model: str | Callable[[], str]) -> None:
        self._worker, self._named, self._started = worker, model, int(time.time())
        self.metrics, self._bodies, self.preparing = Metrics(worker), Bodies(), Preparing()

    @property
    def _model(self) -> str:
        return self._named if isinstance(self._named, str) else self._named()

    async def models(self) -> Response:
        cards = [self._card()] if self._worker.engine.loaded else []
        return json_response({"object": "list", "data": cards})

    async def model(self, name: str) -> Response:
        check_model(name, self._model)
        return json_response(self._card())

    async def health(self) -> Response:
        state = self._worker.state()
        return json_response({"status": "ok", "waiting": state.waiting, "running": state.running})

    async def metrics_page(self) -> Response:
        return PlainTextResponse(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def chat(self, request: Request) -> Response:
        return await self._answered(request, CHAT)

    async def completion(self, request: Request) -> Response:
        return await self._answered(request, COMPLETION)

    async def _answered(self, request: Request, endpoint: Endpoint[Asked]) -> Response:
        engine = self._worker.engine
        async with self._bodies.read(request, engine.model.context) as body:
            asked = await self.preparing.run(request, lambda: endpoint.read(parse(body), self._model))
            question = await self.preparing.run(request, lambda: endpoint.ask(engine, asked))
        reply = endpoint.reply(self._model, engine.tokenizer)
        stream = Stream(self._worker, question, request)
        said = _said([*asked.ignored, *question.ignored])
        if asked.stream:
            sent = events(stream, reply, asked.include_usage)
            # `events` cancels by itself, but is never begun for a client that is gone already.
            gone = BackgroundTask(stream.cancel)
            return StreamingResponse(sent, media_type="text/event-stream", headers=NO_BUFFER | said, background=gone)
        async for piece in stream.pieces():
            if piece is not None:
                for _ in reply.chunks(piece):
                    pass
        if stream.gone:
            return Response(status_code=499)  # nobody reads it; nginx' number for that, for the metrics
        return json_response(reply.whole(), headers=said)

    def _card(self) -> dict[str, Any]:
        context = self._worker.engine.model.context
        about = {"id": self._model, "object": "model", "created": self._started, "owned_by": "glm4lite"}
        return {**about, "context_length": context}


class _Counted:
    """Counts answers by endpoint and status; paths nobody declared are one endpoint."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counting(message: Message) -> None:
            if message["type"] == "http.response.start":
                path = getattr(scope.get("route"), "path", "")
                self._metrics.count(path if path in ENDPOINTS else "other", message["status"])
            await send(message)

        await self._app(scope, receive, counting if scope["type"] == "http" else send)


def _said(ignored: list[str]) -> dict[str, str]:
    """A header that names what the answer takes no notice of, so that a misspelt field does not pass in silence."""
    names = [re.sub(r"[^\w.-]", "?", name[:40], flags=re.ASCII) for name in ignored[:16]]
    return {"X-Ignored-Fields": ", ".join(names)} if names else {}


def _closing(worker: EngineWorker, preparing: Preparing) -> Any:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        preparing.close()
        await run_in_threadpool(worker.close)

    return lifespan


async def _failed(request: Request, error: Exception) -> Response:
    """What the model's files or this program did wrong; of the latter uvicorn logs the traceback."""
    return told(error).response()


async def _refused(request: Request, error: Exception) -> Response:
    if isinstance(error, ApiError):
        return error.response()
    if isinstance(error, HTTPException):
        said = f"{request.method} {request.url.path[:200]}: {error.detail}"
        return ApiError(said, error.status_code, headers=error.headers).response()
    raise error
