"""create_app: the endpoints, on FastAPI so that a page can be mounted on the same app."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

from fastapi import FastAPI
from starlette.background import BackgroundTask
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from glm4lite.base.errors import CheckpointError, NoModel
from glm4lite.engine.engine import Engine
from glm4lite.engine.worker import EngineWorker
from glm4lite.server.body import Bodies, parse
from glm4lite.server.endpoint import CHAT, COMPLETION, Asked, Endpoint, ModelNames
from glm4lite.server.errors import ApiError, json_response, told
from glm4lite.server.guard import Access
from glm4lite.server.manners import with_manners
from glm4lite.server.messages import MessagesRequest, messages_question
from glm4lite.server.messages_reply import MessagesReply
from glm4lite.server.metrics import Metrics
from glm4lite.server.preparing import Preparing
from glm4lite.server.response_store import ResponseStore
from glm4lite.server.responses import ResponsesForm, ResponsesRequest, responses_question
from glm4lite.server.responses_reply import ResponsesReply
from glm4lite.server.stream import EventStream, Stream, events
from glm4lite.server.tokens import count_tokens, detokenize, tokenize

LOOKING = ["GET", "HEAD"]  # HEAD is what the health checks of containers send
ENDPOINTS = {
    "/v1/models": (LOOKING, "models"),
    "/v1/models/{name:path}": (LOOKING, "model"),
    "/v1/chat/completions": (["POST"], "chat"),
    "/v1/completions": (["POST"], "completion"),
    "/v1/responses": (["POST"], "respond"),
    "/v1/responses/{name}": ([*LOOKING, "DELETE"], "response"),
    "/v1/messages": (["POST"], "message"),
    "/v1/messages/count_tokens": (["POST"], "count_tokens"),
    "/v1/embeddings": (["POST"], "embeddings"),
    "/v1/tokenize": (["POST"], "tokenize"),
    "/v1/detokenize": (["POST"], "detokenize"),
    "/health": (LOOKING, "health"),
    "/metrics": (LOOKING, "metrics_page"),
}  # those of /v1 are answered without it too
MESSAGES = Endpoint[MessagesRequest](MessagesRequest, messages_question, MessagesReply)
NO_BUFFER = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


def create_app(
    worker: EngineWorker,
    model: str | Callable[[], str] | ModelNames = "nano",
    access: Access = Access(),
) -> FastAPI:
    """The app of one model.

    model: its name in the API, a function that tells it where another model may be loaded, or all its names. access:
    who is let in; its key is asked for everywhere but at /health. The worker is closed with the app.
    """
    api = Api(worker, model if isinstance(model, ModelNames) else ModelNames(model))
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
    with_manners(app, access)
    app.add_middleware(_Counted, metrics=api.metrics)
    app.add_exception_handler(ApiError, _refused)
    app.add_exception_handler(HTTPException, _refused)
    app.add_exception_handler(CheckpointError, _failed)
    app.add_exception_handler(NoModel, _failed)
    app.add_exception_handler(Exception, _failed)
    for path, (methods, endpoint) in ENDPOINTS.items():
        for address in dict.fromkeys((path, path.removeprefix("/v1"))):
            app.add_api_route(address, getattr(api, endpoint), methods=methods)
    return app


class Api:
    """The endpoints. What comes before the model happens in Preparing's thread, the model's work in the worker's."""

    def __init__(self, worker: EngineWorker, names: ModelNames) -> None:
        self._worker, self._names, self._started = worker, names, int(time.time())
        self.metrics, self._bodies, self.preparing = Metrics(worker), Bodies(), Preparing()
        self._store = ResponseStore()
        self._responses = Endpoint[ResponsesRequest](
            ResponsesForm(self._store),
            responses_question,
            lambda name, question, asked: ResponsesReply(name, question, asked, self._store),
        )

    async def models(self) -> Response:
        cards = [self._card(name) for name in self._names.all] if self._worker.engine.loaded else []
        ends = (
            {"first_id": cards[0]["id"], "last_id": cards[-1]["id"]} if cards else {"first_id": None, "last_id": None}
        )
        return json_response({"object": "list", "data": cards, "has_more": False, **ends})

    async def model(self, name: str) -> Response:
        if not name:  # some clients end the list's address with a slash
            return await self.models()
        self._names.check(name)
        return json_response(self._card(name))

    async def health(self) -> Response:
        state = self._worker.state()
        return json_response({"status": "ok", "waiting": state.waiting, "running": state.running})

    async def metrics_page(self) -> Response:
        return PlainTextResponse(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def chat(self, request: Request) -> Response:
        return await self._answered(request, CHAT)

    async def completion(self, request: Request) -> Response:
        return await self._answered(request, COMPLETION)

    async def respond(self, request: Request) -> Response:
        return await self._answered(request, self._responses)

    async def response(self, request: Request, name: str) -> Response:
        if request.method == "DELETE":
            self._store.forget(name)
            return json_response({"id": name, "object": "response", "deleted": True})
        if request.query_params.get("stream") == "true":
            raise ApiError("stream: a stored response is not streamed again", param="stream", code="unsupported_value")
        return json_response(self._store.response(name))

    async def message(self, request: Request) -> Response:
        return await self._answered(request, MESSAGES)

    async def count_tokens(self, request: Request) -> Response:
        return await self._computed(request, count_tokens)

    async def tokenize(self, request: Request) -> Response:
        return await self._computed(request, tokenize)

    async def detokenize(self, request: Request) -> Response:
        return await self._computed(request, detokenize)

    async def embeddings(self) -> Response:
        raise ApiError("this server gives no embeddings: GLM-4 models were trained to continue text", 400)

    async def _computed(
        self, request: Request, compute: Callable[[Engine, dict[str, Any]], dict[str, Any]]
    ) -> Response:
        """What needs the tokenizer alone."""
        engine = self._worker.engine

        def told_of() -> dict[str, Any]:
            asked = parse(body)
            if isinstance(name := asked.get("model"), str):
                self._names.check(name)
            return compute(engine, asked)

        async with self._bodies.read(request, engine.model.context) as body:
            return json_response(await self.preparing.run(request, told_of))

    async def _answered(self, request: Request, endpoint: Endpoint[Asked]) -> Response:
        engine = self._worker.engine
        async with self._bodies.read(request, engine.model.context) as body:
            asked = await self.preparing.run(request, lambda: endpoint.read(parse(body), self._names))
            question = await self.preparing.run(request, lambda: endpoint.ask(engine, asked, self._names))
        reply = endpoint.reply(self._names.answering(asked.model), question, asked)
        stream = Stream(self._worker, question, request)
        said = _said([*asked.ignored, *question.ignored])
        if asked.stream:
            sent = events(stream, reply, asked.include_usage)
            # `events` cancels by itself, but is never begun for a client that is gone already.
            gone = BackgroundTask(stream.cancel)
            return EventStream(sent, headers=NO_BUFFER | said, background=gone)
        async for piece in stream.pieces():
            if piece is not None:
                for _ in reply.chunks(piece):
                    pass
        if stream.gone:
            return Response(status_code=499)  # nobody reads it; nginx' number for that, for the metrics
        return json_response(reply.whole(), headers=said)

    def _card(self, name: str) -> dict[str, Any]:
        """A model, in OpenAI's form and in Anthropic's."""
        context = self._worker.engine.model.context
        about = {"id": name, "object": "model", "created": self._started, "owned_by": "glm4lite"}
        since = datetime.fromtimestamp(self._started, UTC).isoformat()
        return {**about, "context_length": context, "type": "model", "display_name": name, "created_at": since}


class _Counted:
    """Counts answers by endpoint and status; paths nobody declared are one endpoint."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counting(message: Message) -> None:
            if message["type"] == "http.response.start":
                path = getattr(scope.get("route"), "path", "")
                name = path if path in ENDPOINTS else f"/v1{path}"
                self._metrics.count(name if name in ENDPOINTS else "other", message["status"])
            await send(message)

        await self._app(scope, receive, counting if scope["type"] == "http" else send)


def _said(ignored: list[str]) -> dict[str, str]:
    """A header that names what the answer takes no notice of, so that a misspelt field does not pass in silence."""
    names = [re.sub(r"[^\w.\[\]-]", "?", name[:40], flags=re.ASCII) for name in ignored[:16]]
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
    response = told(error).response(request.url.path)
    response.headers["x-request-id"] = request.state.request_id  # Starlette answers for a bug outside of all else
    return response


async def _refused(request: Request, error: Exception) -> Response:
    if isinstance(error, ApiError):
        return error.response(request.url.path)
    if isinstance(error, HTTPException):
        said = f"{request.method} {request.url.path[:200]}: {error.detail}"
        return ApiError(said, error.status_code, headers=error.headers).response(request.url.path)
    raise error
