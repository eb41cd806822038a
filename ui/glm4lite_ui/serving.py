"""The page on a FastAPI app: nothing leaves the machine, and nobody but the user's own browser gets in."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal
from urllib.parse import quote

from fastapi import FastAPI, Response
from fastapi.responses import PlainTextResponse

from glm4lite.errors import Glm4liteError
from glm4lite_ui.export import KINDS, as_json, as_markdown, file_name

if TYPE_CHECKING:
    from glm4lite_ui.runtime import Runtime

UPLOAD_LIMIT = "2mb"  # of text: more than any context holds


def keep_gradio_quiet() -> None:
    """Before Gradio is imported: no analytics, no share link, no code from a chat, an own folder for uploads."""
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_SHARE": "False", "GRADIO_RUN_HISTORY": "False"}
    os.environ |= {"GRADIO_SSR_MODE": "False", "GRADIO_MCP_SERVER": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}
    for unwanted in ("GRADIO_VIBE_MODE", "GRADIO_ALLOWED_PATHS", "GRADIO_ROOT_PATH", "GRADIO_HOT_RELOAD"):
        os.environ.pop(unwanted, None)
    os.environ["GRADIO_TEMP_DIR"] = tempfile.mkdtemp(prefix="glm4lite-ui-")


def mount(app: FastAPI, runtime: Runtime) -> FastAPI:
    """Puts the page at "/" of `app`; routes that `app` has already stay."""
    keep_gradio_quiet()
    import gradio as gr

    from glm4lite_ui.app import build
    from glm4lite_ui.layout import CSS, theme

    _add_exports(app, runtime)
    return gr.mount_gradio_app(
        app,
        build(runtime),
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
    )


def _add_exports(app: FastAPI, runtime: Runtime) -> None:
    """GET /export/<chat>.md and .json: a saved chat as a download."""

    def export(chat_id: str, kind: Literal["md", "json"]) -> Response:
        try:
            chat = runtime.open(chat_id)
        except Glm4liteError as error:
            return PlainTextResponse(str(error), 404)
        text = as_markdown(chat) if kind == "md" else as_json(chat)
        headers = {"Content-Disposition": f"attachment; filename*=utf-8''{quote(file_name(chat, kind))}"}
        return Response(text, media_type=f"{KINDS[kind]}; charset=utf-8", headers=headers)

    app.add_api_route("/export/{chat_id}.{kind}", export, methods=["GET"], response_class=Response)


class PortError(Glm4liteError):
    """The port cannot be listened on."""


def serve(runtime: Runtime, port: int, say: Callable[[str], None]) -> None:
    """Serves the page on 127.0.0.1 until Ctrl-C; port 0 takes a free one. Raises PortError."""
    import uvicorn

    listener = _listen(port)
    app = mount(FastAPI(openapi_url=None), runtime)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
    say(f"glm4lite: open http://127.0.0.1:{listener.getsockname()[1]} (Ctrl-C ends it)")
    try:
        server.run(sockets=[listener])
    finally:
        runtime.close()


def _listen(port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(("127.0.0.1", port))
    except OSError as error:
        listener.close()
        raise PortError(f"port {port} cannot be used: {error.strerror}; choose another with --port") from None
    return listener
