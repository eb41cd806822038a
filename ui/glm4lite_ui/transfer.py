"""Chats out of the page and into it, over HTTP.

GET  /export/<chat>.md and .json   a saved chat as a download; ?language=zh for Chinese headings
GET  /export/all.zip               every one
POST /page/import?name=<file>      a file's bytes; {"said": sentences for the user, "chats": ids,
                                   "skipped": [[title, why]], "left_out": {what: number}},
                                   or {"error": a sentence} where not one chat was read
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.background import BackgroundTask
from starlette.concurrency import run_in_threadpool

from glm4lite.base.errors import Glm4liteError, said_by
from glm4lite.base.sentences import Sentence
from glm4lite_ui.attachments import shown_name
from glm4lite_ui.export import KINDS, Language, as_json, as_markdown, file_name, write_archive
from glm4lite_ui.runtime import Runtime
from glm4lite_ui.saved.importing import LARGEST, import_chats

_TOLD = 1000  # chats that were skipped, by name


def add_transfers(app: FastAPI, runtime: Runtime) -> None:
    """Adds the routes."""

    def export(chat_id: str, kind: Literal["md", "json"], language: Language = "en") -> Response:
        if not runtime.store.holds(chat_id):
            return PlainTextResponse("this chat is not there", 404)
        chat = runtime.open(chat_id)
        text = as_markdown(chat, language) if kind == "md" else as_json(chat)
        headers = {"Content-Disposition": f"attachment; filename*=utf-8''{quote(file_name(chat, kind))}"}
        return Response(text, media_type=f"{KINDS[kind]}; charset=utf-8", headers=headers)

    def export_all(language: Language = "en") -> Response:
        file = tempfile.TemporaryFile()  # noqa: SIM115  # closed when it was sent
        write_archive(runtime.store.every(), file, language)
        name = time.strftime("glm4lite-chats-%Y-%m-%d.zip")
        headers = {"Content-Disposition": f"attachment; filename={name}", "Content-Length": str(file.tell())}
        file.seek(0)
        pieces, closing = iter(lambda: file.read(1 << 16), b""), BackgroundTask(file.close)
        return StreamingResponse(pieces, media_type="application/zip", headers=headers, background=closing)

    async def import_file(name: str, request: Request) -> Response:
        try:
            return JSONResponse(await _import(runtime, shown_name(name), request))
        except Glm4liteError as error:
            return JSONResponse({"error": said_by(error).to_json()}, 409)

    app.add_api_route("/export/all.zip", export_all, methods=["GET"], response_class=Response)
    app.add_api_route("/export/{chat_id}.{kind}", export, methods=["GET", "HEAD"], response_class=Response)
    app.add_api_route("/page/import", import_file, methods=["POST"], response_class=Response)


async def _import(runtime: Runtime, name: str, request: Request) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path, size = Path(folder) / "upload", 0
        with path.open("wb") as file:
            async for piece in request.stream():
                size += len(piece)
                if size > LARGEST:
                    larger = Sentence("it is larger than {size} MiB", size=LARGEST >> 20)
                    raise Glm4liteError("{name} cannot be imported: {why}", name=name, why=larger)
                file.write(piece)
        came = await run_in_threadpool(import_chats, runtime.store, path, name)
    said, skipped = [one.to_json() for one in came.said()], came.skipped[:_TOLD]
    return {"said": said, "chats": came.chats, "skipped": skipped, "left_out": came.left_out}
