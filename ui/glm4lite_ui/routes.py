"""What the page asks of the server: JSON under /page/, beside one stream of messages per window (windows.py).

All of it passes the server's Guard, so that no other site's page gets through; bodies are JSON, which such a page could
not send without asking first, or a file's bytes. What a user can cause is an answer with a sentence in "error".
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Coroutine
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Body, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool

from glm4lite.base.errors import Glm4liteError, said_by
from glm4lite.base.sentences import Sentence
from glm4lite.server.stream import EventStream
from glm4lite_ui.answering import Decision
from glm4lite_ui.artifacts import artifacts_of
from glm4lite_ui.chats import NEW_TITLE, Attachment, Chat, Settings, to_json
from glm4lite_ui.models import Models, Row
from glm4lite_ui.runtime import Runtime
from glm4lite_ui.saved.store import grouped
from glm4lite_ui.tool_routes import Tools
from glm4lite_ui.windows import Windows

logger = logging.getLogger("glm4lite")

STATIC = Path(__file__).with_name("static")
LONGEST_TITLE = 120
LARGEST_BODY = 64 << 20  # bytes; a file's limit is the reader's own
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


class Sent(BaseModel):
    """A message. A chat that is not saved yet brings its title along, where the user gave it one."""

    text: str = ""
    files: list[Attachment] = []
    title: str = NEW_TITLE


class Edited(BaseModel):
    """A message in place of another; the files of that one are kept."""

    text: str = ""
    files: list[Attachment] = []


class Shown(BaseModel):
    """Which chat a window shows, and how many of its last turns. `visit` counts the window's changes of chat."""

    window: str
    chat: str
    visit: int
    turns: int = 0


def _refusal(said: Sentence, status: int) -> JSONResponse:
    return JSONResponse({"error": said.to_json()}, status)


class _Told(APIRoute):
    """A user's mistake is an answer, and so is what went wrong here, which is logged too."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def told(request: Request) -> Response:
            try:
                if int(request.headers.get("content-length") or 0) > LARGEST_BODY:
                    raise Glm4liteError("this is more than {size} MiB", size=LARGEST_BODY >> 20)
                answer = await handler(request)
            except Glm4liteError as error:
                answer = _refusal(said_by(error), 409)
            except RequestValidationError as error:
                problem = error.errors()[0]
                said = Sentence(
                    "{name} cannot be used: {problem}", name=str(problem["loc"][-1]), problem=problem["msg"]
                )
                answer = _refusal(said, 422)
            except Exception as error:
                logger.error("the page failed", exc_info=error)
                answer = _refusal(Sentence("something went wrong: {problem}", problem=said_by(error)), 500)
            answer.headers.update(HEADERS)
            return answer

        return told


class _Static(StaticFiles):
    def file_response(self, *args: Any, **named: Any) -> Response:
        answer = super().file_response(*args, **named)
        answer.headers.update(HEADERS)
        return answer


def add_routes(app: FastAPI, runtime: Runtime) -> None:
    """Everything under /page/."""
    windows = Windows(runtime, app.state.closing)
    runtime.store.listeners.append(windows.changed)
    router = APIRouter(prefix="/page", route_class=_Told)
    _Streams(runtime, windows).add(router)
    _Chats(runtime, windows).add(router)
    _Turns(runtime, windows).add(router)
    _Preferences(runtime).add(router)
    _Model(runtime, Models(runtime, windows.tell)).add(router)
    Tools(runtime, windows).add(router)
    app.include_router(router)
    app.mount("/page/static", _Static(directory=STATIC))


class _Streams:
    """What a window is told, and what it says of itself."""

    def __init__(self, runtime: Runtime, windows: Windows) -> None:
        self.runtime, self.windows = runtime, windows

    def add(self, router: APIRouter) -> None:
        router.add_api_route("/events", self.events, methods=["GET"])
        router.add_api_route("/show", self.show, methods=["POST"])
        router.add_api_route("/ack", self.ack, methods=["POST"])

    async def events(self, window: str) -> Response:
        return EventStream(self.windows.stream(window))

    async def show(self, shown: Shown) -> dict[str, bool]:
        window = self.windows.find(shown.window)
        if window is not None:
            window.show(shown.chat, shown.visit, shown.turns)
        return {"known": window is not None}

    async def ack(self, window: str, number: int) -> None:
        if (known := self.windows.find(window)) is not None:
            known.ack(number)


class _Chats:
    """The list, and what is done to a chat as a whole."""

    def __init__(self, runtime: Runtime, windows: Windows) -> None:
        self.runtime, self.windows = runtime, windows

    def add(self, router: APIRouter) -> None:
        router.add_api_route("/chats", self.find, methods=["GET"])
        router.add_api_route("/files", self.read_file, methods=["POST"])
        router.add_api_route("/chats/{chat_id}/artifacts", self.artifacts, methods=["GET"])
        router.add_api_route("/chats/{chat_id}", self.delete, methods=["DELETE"])
        for act in (
            self.send,
            self.stop,
            self.decide,
            self.drop_oldest,
            self.rename,
            self.place,
            self.type,
            self.set,
            self.ask_again,
            self.restore,
        ):
            router.add_api_route(f"/chats/{{chat_id}}/{act.__name__}", act, methods=["POST"])

    def find(self, query: str = "") -> list[dict[str, Any]]:
        return [asdict(group) for group in grouped(self.runtime.store.summaries(query))]

    async def read_file(self, name: str, request: Request) -> dict[str, Any]:
        """A file as it will be sent: its text and how many tokens that is."""
        data = await request.body()
        return to_json(await run_in_threadpool(self.runtime.attachment, name, data))

    def artifacts(self, chat_id: str) -> list[dict[str, object]]:
        return artifacts_of(self.runtime.open(chat_id))

    def send(self, chat_id: str, sent: Sent) -> None:
        text = _typed(sent.text)
        if not text and not sent.files:
            raise Glm4liteError("the message is empty")
        chat = self.runtime.change(chat_id)
        if not chat.tree:
            chat.title = _one_line(sent.title) or chat.title
        chat.ask(text, sent.files)
        self.runtime.answer(chat)
        self.runtime.type(chat_id, "")
        self.windows.changed(chat_id)

    def stop(self, chat_id: str) -> None:
        if (answer := self.runtime.answers.get(chat_id)) is not None:
            answer.stop()

    def decide(self, chat_id: str, asked: Annotated[str, Body()], decision: Annotated[Decision, Body()]) -> None:
        if (answer := self.runtime.answers.get(chat_id)) is not None:
            answer.decide(asked, decision)

    def drop_oldest(self, chat_id: str) -> None:
        """Answers again without the turns that no longer fit."""
        chat = self.runtime.change(chat_id)
        if not self.runtime.drop_oldest(chat):
            raise Glm4liteError("the last message alone does not fit the context: shorten it")
        failed = chat.turns[-1]
        chat.another(failed)
        chat.remove(failed)
        self.runtime.answer(chat)
        self.windows.changed(chat_id)

    def rename(self, chat_id: str, title: Annotated[str, Body(embed=True)]) -> None:
        if self.runtime.store.holds(chat_id) and (title := _one_line(title)):
            chat = self.runtime.open(chat_id)
            chat.title = title
            self.runtime.store.save(chat, said=False)

    def place(self, chat_id: str, pinned: Annotated[bool, Body()], folder: Annotated[str, Body()]) -> None:
        """Where the list shows it."""
        chat = self.runtime.open(chat_id)
        chat.pinned, chat.folder = pinned, _one_line(folder)
        self.runtime.store.save(chat, said=False)

    def type(self, chat_id: str, text: Annotated[str, Body(embed=True)]) -> None:
        """Keeps what is typed and not sent."""
        self.runtime.type(chat_id, text)

    def set(self, chat_id: str, settings: Settings) -> None:
        """Keeps a chat's settings; what was allowed for good is not among them."""
        settings.always = self.runtime.open(chat_id).settings.always
        self.runtime.set(chat_id, settings)

    def ask_again(self, chat_id: str) -> None:
        """Forgets which tools were allowed for good in this chat."""
        chat = self.runtime.open(chat_id)
        chat.settings.always.clear()
        self.runtime.store.save(chat, said=False)

    def delete(self, chat_id: str) -> None:
        self.runtime.delete(chat_id)
        self.windows.changed(chat_id)

    def restore(self, chat_id: str) -> None:
        """Takes a deletion back."""
        self.runtime.store.restore(chat_id)


class _Turns:
    """What is done to one turn of a chat."""

    def __init__(self, runtime: Runtime, windows: Windows) -> None:
        self.runtime, self.windows = runtime, windows

    def add(self, router: APIRouter) -> None:
        path = "/chats/{chat_id}/turns/{turn_id}"
        router.add_api_route(path, self.said, methods=["GET"])
        router.add_api_route(path, self.delete, methods=["DELETE"])
        for act in (self.regenerate, self.resume, self.edit, self.show, self.branch):
            router.add_api_route(f"{path}/{act.__name__}", act, methods=["POST"])

    def said(self, chat_id: str, turn_id: str) -> dict[str, str]:
        """What the user and the model said, as they said it, without thoughts and calls."""
        turn = self.runtime.open(chat_id).find(turn_id)
        answer = "\n\n".join(part.text.strip("\n") for part in turn.parts if part.kind == "text" and part.text.strip())
        return {"user": turn.user, "answer": answer}

    def regenerate(self, chat_id: str, turn_id: str) -> None:
        chat = self.runtime.change(chat_id)
        chat.another(chat.find(turn_id))
        self._answer(chat)

    def edit(self, chat_id: str, turn_id: str, edited: Edited) -> None:
        """Answers the changed message beside the old one."""
        chat, text = self.runtime.change(chat_id), _typed(edited.text)
        turn = chat.find(turn_id)
        files = [*turn.files, *edited.files]
        if not text and not files:
            raise Glm4liteError("the message is empty")
        chat.another(turn, text, files)
        self._answer(chat)

    def resume(self, chat_id: str, turn_id: str) -> None:
        """Goes on with an answer that was cut."""
        chat = self.runtime.change(chat_id)
        chat.show(chat.find(turn_id))
        self._answer(chat, resume=True)

    def show(self, chat_id: str, turn_id: str) -> None:
        """Shows this version of a turn, and what follows it."""
        chat = self.runtime.change(chat_id)
        chat.show(chat.find(turn_id))
        self.runtime.store.save(chat)

    def branch(self, chat_id: str, turn_id: str) -> dict[str, str]:
        """A new chat with all up to this turn."""
        chat = self.runtime.open(chat_id)
        new = chat.branch(chat.find(turn_id))
        self.runtime.store.save(new)
        return {"id": new.id}

    def delete(self, chat_id: str, turn_id: str) -> None:
        chat = self.runtime.change(chat_id)
        chat.remove(chat.find(turn_id))
        self.runtime.store.save(chat)

    def _answer(self, chat: Chat, resume: bool = False) -> None:
        self.runtime.answer(chat, resume)
        self.windows.changed(chat.id)


class _Preferences:
    """What new chats start with, and settings under a name."""

    def __init__(self, runtime: Runtime) -> None:
        self.preferences = runtime.preferences

    def add(self, router: APIRouter) -> None:
        router.add_api_route("/preferences", self.all, methods=["GET"])
        router.add_api_route("/preferences/new_chat", self.use_for_new_chats, methods=["POST"])
        router.add_api_route("/preferences/presets", self.keep, methods=["POST"])
        router.add_api_route("/preferences/presets", self.delete, methods=["DELETE"])

    def all(self) -> dict[str, Any]:
        presets = {name: asdict(settings) for name, settings in self.preferences.presets.items()}
        return {"new_chat": asdict(self.preferences.new_chat), "presets": presets}

    def use_for_new_chats(self, settings: Settings) -> None:
        self.preferences.use_for_new_chats(settings)

    def keep(self, name: Annotated[str, Body()], settings: Annotated[Settings, Body()]) -> None:
        self.preferences.keep_preset(name, settings)

    def delete(self, name: str) -> None:
        self.preferences.delete_preset(name)


class _Model:
    """What is loaded, and loading another."""

    def __init__(self, runtime: Runtime, models: Models) -> None:
        self.runtime, self.models = runtime, models

    def add(self, router: APIRouter) -> None:
        router.add_api_route("/model", self.about, methods=["GET"])
        router.add_api_route("/model/plan", self.plan, methods=["POST"])
        router.add_api_route("/model/load", self.load, methods=["POST"])
        router.add_api_route("/model/cancel", self.cancel, methods=["POST"])
        router.add_api_route("/model/unload", self.unload, methods=["POST"])

    def about(self) -> dict[str, Any]:
        return self.models.about()

    def plan(
        self,
        source: Annotated[str, Body()],
        quant: Annotated[str, Body()] = "auto",
        lora: Annotated[list[str] | None, Body()] = None,
    ) -> list[Row]:
        return self.models.plan(source, quant, _adapters(lora))

    def load(
        self,
        source: Annotated[str, Body()],
        quant: Annotated[str, Body()] = "auto",
        lora: Annotated[list[str] | None, Body()] = None,
    ) -> None:
        self.models.load(source.strip(), quant, _adapters(lora))

    def cancel(self) -> None:
        self.models.cancel()

    def unload(self) -> None:
        self.models.unload()


def _adapters(lines: list[str] | None) -> tuple[str, ...]:
    return tuple(one.strip() for one in lines or () if one.strip())


def _one_line(text: str) -> str:
    return " ".join(_typed(text).split())[:LONGEST_TITLE]


def _typed(text: str) -> str:
    """Text of a browser, which may send half a sign."""
    return text.encode("utf-8", "replace").decode().strip()
