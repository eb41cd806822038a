"""The page on a FastAPI app: nothing leaves the machine, and nobody but the user's own browser gets in."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from fastapi import FastAPI
from fastapi.responses import PlainTextResponse
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from glm4lite.server import create_app, serve
from glm4lite.server.errors import ApiError
from glm4lite.server.launch import url_of
from glm4lite_ui.routes import add_routes
from glm4lite_ui.transfer import add_transfers

if TYPE_CHECKING:
    from glm4lite_ui.runtime import Runtime


@contextmanager
def _own_environment() -> Iterator[None]:
    """For importing and setting up Gradio: nothing that a user's environment says about it, and no proxies.

    A variable of Gradio's may open the page to others, or be something it cannot read; its clients, made while it is
    imported, end with a traceback over a proxy they do not know. The page fetches nothing. A model's download may need
    the proxies, so they come back.
    """
    for name in [name for name in os.environ if name.upper().startswith("GRADIO_")]:
        del os.environ[name]
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_SHARE": "False", "GRADIO_RUN_HISTORY": "False"}
    os.environ |= {"GRADIO_SSR_MODE": "False", "GRADIO_MCP_SERVER": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}
    proxies = {name: value for name, value in os.environ.items() if name.lower().endswith("_proxy")}
    for name in proxies:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ |= proxies


def mount(app: FastAPI, runtime: Runtime) -> FastAPI:
    """Puts the page at "/" of `app`; routes that `app` has already stay. MCP servers of the page begin to connect."""
    add_transfers(app, runtime)
    add_routes(app, runtime)
    runtime.toolset.servers.start()
    with _own_environment():
        return _mount_gradio(app)


def _mount_gradio(app: FastAPI) -> FastAPI:
    import gradio as gr

    from glm4lite_ui.layout import HEAD, build, theme

    return gr.mount_gradio_app(
        app,
        build(),
        path="/",
        server_name="127.0.0.1",
        footer_links=[],
        run_history=False,
        allowed_paths=[],
        show_error=False,
        enable_monitoring=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        theme=theme(),
        head=HEAD,
        app_kwargs={"middleware": [Middleware(Gate)], "docs_url": None, "redoc_url": None, "openapi_url": None},
    )


# What the page itself asks for. Everything else of Gradio's (events, uploads, this machine's files, a proxy, API pages,
# run history, monitoring, code from a chat) is not there.
OPEN = re.compile(r"/(config/?|theme\.css|favicon\.ico|manifest\.json|robots\.txt|(static|assets|svelte)/.*)?")
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
    """ASGI middleware of Gradio's part: only what the page needs is served, and may load nothing from elsewhere."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

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
        else:
            await self.app(scope, receive, guarded)


def serve_page(runtime: Runtime, listening: socket.socket, say: Callable[[str], None]) -> None:
    """The page at "/" and OpenAI's API at "/v1" of one address, until Ctrl-C."""
    app = mount(create_app(runtime.worker, lambda: runtime.name), runtime)
    try:
        serve(app, listening, lambda: say(f"Open {url_of(listening)} in a browser (Ctrl-C ends)"))
    finally:
        runtime.close()
