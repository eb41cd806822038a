"""The handlers of the saved chats and of a chat's settings."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import gradio as gr

from glm4lite_ui.chats import Chat
from glm4lite_ui.drawing import Drawing, Updates
from glm4lite_ui.runtime import Runtime


class LibraryHandlers:
    """New, open, rename, search, delete; and the panel on the right."""

    def __init__(self, runtime: Runtime, drawing: Drawing) -> None:
        self.runtime, self.draw = runtime, drawing

    def start(self, request: gr.Request) -> Iterator[Updates]:
        """The page was opened: the chat that its address names, or a new one."""
        chat_id = request.query_params.get("chat", "")
        chat = self.runtime.open(chat_id) if self.runtime.store.holds(chat_id) else self._new_chat()
        yield from self._show(chat, request)

    def left(self, request: gr.Request) -> None:
        """The page was closed."""
        self.runtime.shown.pop(str(request.session_hash), None)

    def new(self, request: gr.Request) -> Iterator[Updates]:
        yield from self._show(self._new_chat(), request)

    def _new_chat(self) -> Chat:
        """Ids are made here, so that each page that is opened gets its own."""
        return self.runtime.open(secrets.token_hex(8))

    def open(self, event: gr.EventData, request: gr.Request) -> Iterator[Updates]:
        yield from self._show(self.runtime.open(str(event.chat)), request)

    def _show(self, chat: Chat, request: gr.Request) -> Iterator[Updates]:
        """Draws the chat, and goes on while it is being answered, unless this window follows that answer already."""
        answer, window = self.runtime.answers.get(chat.id), str(request.session_hash)
        self.runtime.shown[window] = chat.id
        if answer is None or answer.is_watched_by(window):
            yield self.draw.whole(chat, answer) | self.draw.settings(chat)
        else:
            yield from self.draw.followed(answer, window, self.draw.settings(chat))

    def remove(self, current: str, query: str, event: gr.EventData, request: gr.Request) -> Iterator[Updates]:
        self.runtime.delete(str(event.chat))
        if event.chat == current:
            yield from self._show(self._new_chat(), request)
        else:
            yield {self.draw.components.library.chats: self.search(query, current)}

    def search(self, query: str, current: str) -> str:
        return self.draw.list(current, query)

    def rename(self, title: str, chat_id: str, query: str) -> str:
        title = " ".join(title.split())
        if title and self.runtime.store.holds(chat_id):
            chat = self.runtime.open(chat_id)
            if chat.title != title:
                chat.title = title
                self.runtime.store.save(chat, said=False)
        return self.draw.list(chat_id, query)

    def set(self, chat_id: str, *values: Any) -> None:
        """Keeps the panel's values with the chat; a value the model would take anyway is left open."""
        system, temperature, top_p, max_new_tokens, seed, tools = values
        chat, own = self.runtime.open(chat_id), self.runtime.engine.params()
        names = [tool.name for tool in self.runtime.tools]
        settings = replace(
            chat.settings,
            system=system or "",
            temperature=None if temperature in (None, own.temperature) else float(temperature),
            top_p=None if top_p in (None, own.top_p) else float(top_p),
            max_new_tokens=None if max_new_tokens is None else int(max_new_tokens),
            seed=None if seed is None else int(seed),
            tools=None if set(tools) == set(names) else list(tools),
        )
        self.runtime.set(chat_id, settings)  # what cannot be used is said now, and not kept

    def ask_again(self, chat_id: str) -> Any:
        """Forgets which tools were allowed for good in this chat."""
        chat = self.runtime.open(chat_id)
        chat.settings.always.clear()
        self.runtime.store.save(chat, said=False)
        return gr.Button(visible=False)
