"""The page on a FastAPI app: nothing leaves the machine, and nobody but the user's own browser gets in."""

from __future__ import annotations

import asyncio
import os
import re
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from fastapi.responses import PlainTextResponse
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from glm4lite.errors import Glm4liteError, one_line
from glm4lite.owned_folder import OwnedFolder, remove_abandoned_temporary
from glm4lite.server import create_app, serve
from glm4lite.server.errors import ApiError
from glm4lite.server.launch import url_of
from glm4lite_ui.transfer import add_transfers
from glm4lite_ui.uploads import uploaded

if TYPE_CHECKING:
    from gradio import Blocks

    from glm4lite_ui.runtime import Runtime

_UPLOADS = "glm4lite-ui-"
UPLOAD_LIMIT = "64mb"  # as attachments.py takes


@contextmanager
def _own_environment(uploads: str) -> Iterator[None]:
    """For importing and setting up Gradio: nothing that a user's environment says about it, and no proxies.

    A variable of Gradio's may open the page to others, or be something it cannot read; its clients, made while it is
    imported, end with a traceback over a proxy they do not know. The page fetches nothing. A model's download may need
    the proxies, so they come back.
    """
    for name in [name for name in os.environ if name.upper().startswith("GRADIO_")]:
        del os.environ[name]
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_SHARE": "False", "GRADIO_RUN_HISTORY": "False"}
    os.environ |= {"GRADIO_SSR_MODE": "False", "GRADIO_MCP_SERVER": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}
    os.environ["GRADIO_TEMP_DIR"] = uploads
    proxies = {name: value for name, value in os.environ.items() if name.lower().endswith("_proxy")}
    for name in proxies:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ |= proxies


def _folder_for_uploads() -> OwnedFolder:
    """Removed when the server ends; what servers that were killed left is removed now."""
    try:
        remove_abandoned_temporary(_UPLOADS)
        return OwnedFolder(_UPLOADS)
    except OSError as error:
        raise Glm4liteError(
            f"uploads cannot be kept ({one_line(error)}); set TMPDIR to a folder you can write"
        ) from None


def _remove_at_the_end(app: FastAPI, uploads: OwnedFolder) -> None:
    """When the server ends, also by a signal."""
    inner = app.router.lifespan_context

    @asynccontextmanager
    async def lifespan(running: FastAPI) -> AsyncIterator[Any]:
        try:
            async with inner(running) as state:
                yield state
        finally:
            uploads.discard()

    app.router.lifespan_context = lifespan


def mount(app: FastAPI, runtime: Runtime) -> FastAPI:
    """Puts the page at "/" of `app`; routes that `app` has already stay."""
    add_transfers(app, runtime)
    uploads = _folder_for_uploads()
    with _own_environment(str(uploads.path / "files")):  # the lock is no upload
        mounted = _mount_gradio(app, runtime)
    _remove_at_the_end(mounted, uploads)
    return mounted


def _mount_gradio(app: FastAPI, runtime: Runtime) -> FastAPI:
    import gradio as gr

    from glm4lite_ui.app import build
    from glm4lite_ui.layout import CSS, theme

    page = build(runtime)
    _take_uploads_only(page)
    gate = Middleware(Gate, closing=app.state.closing)
    return gr.mount_gradio_app(
        app,
        page,
        path="/",
        server_name="127.0.0.1",
        footer_links=[],
        run_history=False,
        allowed_paths=[],
        blocked_paths=[str(runtime.store.folder.absolute())],
        show_error=False,
        max_file_size=UPLOAD_LIMIT,
        enable_monitoring=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        theme=theme(),
        css_paths=[CSS],
        app_kwargs={"middleware": [gate], "docs_url": None, "redoc_url": None, "openapi_url": None},
    )


# What the page itself asks for. Everything else that Gradio serves (files of this machine, a proxy, API pages, direct
# calls, run history, monitoring, code from a chat) is not there.
OPEN = re.compile(
    r"/(config/?|theme\.css|favicon\.ico|manifest\.json|robots\.txt|(static|assets|svelte)/.*)?"
    r"|/gradio_api/(queue/(join|data)|upload|upload_progress|heartbeat/\w+|cancel|reset/?|startup-events|theme\.css)"
    r"|/gradio_api/app_id"  # a random number, asked for until a lost server is back
)
STREAMS = re.compile(r"/gradio_api/(queue/data|heartbeat/)")
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' blob: data:; worker-src 'self' blob:; "
    "frame-src 'none'; object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
)
HEADERS = {
    b"content-security-policy": POLICY.encode(),
    b"x-content-type-options": b"nosniff",
    b"x-frame-options": b"DENY",
    b"referrer-policy": b"no-referrer",
    b"cross-origin-opener-policy": b"same-origin",
    b"cross-origin-resource-policy": b"same-origin",
}


class Gate:
    """ASGI middleware of the page: only what it needs is served, and its answers may load nothing from elsewhere.

    When `closing` is set its event streams end, which otherwise last as long as the page is open.
    """

    def __init__(self, app: ASGIApp, closing: asyncio.Event) -> None:
        self.app, self._closing = app, closing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                named = [(name, value) for name, value in message["headers"] if name.lower() not in HEADERS]
                message = {**message, "headers": [*named, *HEADERS.items()]}
            await send(message)

        path = scope["path"] if scope["type"] == "http" else None
        if path is None:
            await self.app(scope, receive, send)
        elif path.startswith("/v1/"):
            await ApiError(f"{scope['method']} {path}: Not Found", 404).response()(scope, receive, send)
        elif not OPEN.fullmatch(path):
            await PlainTextResponse("not found", 404)(scope, receive, guarded)
        elif STREAMS.match(path):
            await self._until_closing(scope, receive, guarded)
        else:
            await self.app(scope, receive, guarded)

    async def _until_closing(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = ended = False

        async def noting(message: Message) -> None:
            nonlocal begun, ended
            if self._closing.is_set():  # Gradio would report its own cancelling as an error
                return
            begun = True
            ended = message["type"] == "http.response.body" and not message.get("more_body", False)
            await send(message)

        stream = asyncio.ensure_future(self.app(scope, receive, noting))
        closing = asyncio.ensure_future(self._closing.wait())
        try:
            await asyncio.wait({stream, closing}, return_when=asyncio.FIRST_COMPLETED)
            if stream.done():
                return stream.result()
        finally:
            closing.cancel()
            stream.cancel()
        await asyncio.wait({stream})
        if begun and not ended:
            await send({"type": "http.response.body", "body": b"", "more_body": False})


def _take_uploads_only(page: Blocks) -> None:
    """An event may name only files that were uploaded.

    Gradio checks that only where `launch` was called (6.31, `_check_allowed`): mounted, it would read any file of this
    machine, and fetch any address, that stands in an event's data.
    """
    page.has_launched = True

    async def refuse(path: str | Path) -> str:
        return str(uploaded(path))

    for block in page.blocks.values():
        block.async_move_resource_to_block_cache = refuse  # type: ignore[method-assign, assignment]


def serve_page(runtime: Runtime, listening: socket.socket, say: Callable[[str], None]) -> None:
    """The page at "/" and OpenAI's API at "/v1" of one address, until Ctrl-C."""
    app = mount(create_app(runtime.worker, lambda: runtime.name), runtime)
    try:
        serve(app, listening, lambda: say(f"Open {url_of(listening)} in a browser (Ctrl-C ends)"))
    finally:
        runtime.close()
