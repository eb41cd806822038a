"""What happens on the page: which function answers which click, and what it draws."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from glm4lite.errors import Glm4liteError
from glm4lite_ui.answering import Answer, Decision
from glm4lite_ui.chats import Attachment, Chat, Turn
from glm4lite_ui.layout import Components, lay_out
from glm4lite_ui.markup import original_markdown
from glm4lite_ui.panels import chat_list, context_full, live_line, question_about
from glm4lite_ui.render import chat_messages, turn_at
from glm4lite_ui.runtime import Runtime

logger = logging.getLogger("glm4lite")

GREETING = "## glm4lite\nA GLM-4 model on your own machine. Nothing you write leaves it."
Updates = dict[Any, Any]


class Page:
    """The handlers of one Blocks. They keep nothing: chats are on disk, answers under way in the Runtime."""

    def __init__(self, runtime: Runtime, parts: Components) -> None:
        self.runtime, self.parts = runtime, parts

    def wire(self, blocks: gr.Blocks) -> None:
        """Connects every event."""
        parts = self.parts
        shown = [parts.chat_id, parts.title, parts.chats, parts.chatbot, parts.live, parts.message]
        shown += [parts.asking, parts.asked, parts.full, parts.full_text]
        streams: list[tuple[Callable[..., Any], Callable[..., Any], list[Any]]] = [
            (parts.message.submit, self.send, [parts.message, parts.chat_id]),
            (parts.chatbot.example_select, self.example, [parts.chat_id]),
            (parts.chatbot.retry, self.regenerate, [parts.chat_id]),
            (parts.chatbot.edit, self.edit, [parts.chat_id]),
            (parts.drop.click, self.drop_oldest, [parts.chat_id]),
        ]
        for event, answer, inputs in streams:
            event(answer, inputs, shown, show_progress="hidden", api_visibility="private", concurrency_limit=8)
        quick: list[tuple[Callable[..., Any], Callable[..., Any], list[Any], list[Any]]] = [
            (blocks.load, self.new, [], shown),
            (parts.new.click, self.new, [], shown),
            (parts.message.stop, self.stop, [parts.chat_id], []),
            (parts.approve.click, self.decide("approve"), [parts.chat_id], []),
            (parts.always.click, self.decide("always"), [parts.chat_id], []),
            (parts.deny.click, self.decide("deny"), [parts.chat_id], []),
            (parts.chats.open, self.open, [], shown),
            (parts.chats.remove, self.remove, [parts.chat_id, parts.search], shown),
            (parts.search.input, self.search, [parts.search, parts.chat_id], [parts.chats]),
            (parts.title.blur, self.rename, [parts.title, parts.chat_id], [parts.chats]),
            (parts.title.submit, self.rename, [parts.title, parts.chat_id], [parts.chats]),
            (parts.chatbot.undo, self.undo, [parts.chat_id], shown),
        ]
        for event, handler, inputs, outputs in quick:
            event(handler, inputs, outputs, show_progress="hidden", api_visibility="private", queue=False)

    # What is answered, as a stream of drawings

    def send(self, message: dict[str, Any], chat_id: str) -> Iterator[Updates]:
        text, paths = (message.get("text") or "").strip(), message.get("files") or []
        if not text and not paths:
            return
        chat = self.runtime.open(chat_id)
        try:
            files = [self._attachment(path) for path in paths]
        except Glm4liteError as error:
            raise gr.Error(str(error), print_exception=False) from None
        chat.turns.append(Turn(text, files))
        yield from self._answer(chat)

    def example(self, chat_id: str, event: gr.SelectData) -> Iterator[Updates]:
        yield from self.send(event.value, chat_id)

    def regenerate(self, chat_id: str) -> Iterator[Updates]:
        chat = self.runtime.open(chat_id)
        if chat.turns:
            last = chat.turns[-1]
            chat.turns[-1] = Turn(last.user, last.files)
            yield from self._answer(chat)

    def edit(self, chat_id: str, event: gr.EditData) -> Iterator[Updates]:
        chat = self.runtime.open(chat_id)
        place = turn_at(chat, event.index)
        text = original_markdown(_edited_text(event.value)).strip()
        if place is None or not text:
            yield self.draw(chat)
            return
        files = chat.turns[place].files
        chat.turns[place:] = [Turn(text, files)]
        yield from self._answer(chat)

    def drop_oldest(self, chat_id: str) -> Iterator[Updates]:
        chat = self.runtime.open(chat_id)
        if not self.runtime.drop_oldest(chat):
            raise gr.Error("The last message alone does not fit: shorten it.", print_exception=False)
        last = chat.turns[-1]
        chat.turns[-1] = Turn(last.user, last.files)
        yield from self._answer(chat)

    def _answer(self, chat: Chat) -> Iterator[Updates]:
        parts = self.parts
        try:
            with self.runtime.answering(chat) as answer:
                yield self.draw(chat, answer) | {parts.message: _input(answering=True, text="")}
                for _ in answer.updates():
                    yield self._progress(answer)
        except Glm4liteError as error:
            raise gr.Error(str(error), print_exception=False) from None
        yield self.draw(chat) | self._offer(answer) | {parts.message: _input(answering=False)}

    def _progress(self, answer: Answer) -> Updates:
        parts, asking = self.parts, answer.asking
        return {
            parts.chatbot: chat_messages(answer.chat, answering=True),
            parts.live: live_line(self.runtime, answer.chat, answer),
            parts.asking: gr.Group(visible=asking is not None),
            parts.asked: question_about(asking),
        }

    def _offer(self, answer: Answer) -> Updates:
        if not answer.context_full:
            return {}
        return {self.parts.full: gr.Group(visible=True), self.parts.full_text: context_full(answer.chat)}

    # What is drawn at once

    def draw(self, chat: Chat, answer: Answer | None = None) -> Updates:
        """The whole page for a chat."""
        parts = self.parts
        return {
            parts.chat_id: chat.id,
            parts.title: chat.title,
            parts.chats: chat_list(self.runtime.store.find(), chat.id),
            parts.chatbot: chat_messages(chat, answering=answer is not None),
            parts.live: live_line(self.runtime, chat, answer),
            parts.asking: gr.Group(visible=False),
            parts.full: gr.Group(visible=False),
        }

    def new(self) -> Updates:
        return self.draw(Chat(id=secrets.token_hex(8))) | {self.parts.message: _input(answering=False)}

    def open(self, event: gr.EventData) -> Updates:
        chat_id = str(event.chat)
        answering = chat_id in self.runtime.answers
        return self.draw(self._read(chat_id)) | {self.parts.message: _input(answering)}

    def remove(self, current: str, query: str, event: gr.EventData) -> Updates:
        self.runtime.store.delete(str(event.chat))
        if event.chat == current:
            return self.new()
        return {self.parts.chats: self.search(query, current)}

    def search(self, query: str, current: str) -> str:
        return chat_list(self.runtime.store.find(query), current)

    def rename(self, title: str, chat_id: str) -> str:
        title = " ".join(title.split())
        if title and self.runtime.store.holds(chat_id):
            chat = self.runtime.open(chat_id)
            if chat.title != title:
                chat.title = title
                self.runtime.store.save(chat)
        return chat_list(self.runtime.store.find(), chat_id)

    def undo(self, chat_id: str) -> Updates:
        """Deletes the last turn and puts its text back into the input."""
        chat = self.runtime.open(chat_id)
        text = chat.turns.pop().user if chat.turns else ""
        self.runtime.store.save(chat)
        return self.draw(chat) | {self.parts.message: _input(answering=False, text=text)}

    def stop(self, chat_id: str) -> None:
        if (answer := self.runtime.answers.get(chat_id)) is not None:
            answer.stop()

    def decide(self, decision: Decision) -> Callable[[str], None]:
        """The handler of a button under a call that waits."""

        def handler(chat_id: str) -> None:
            if (answer := self.runtime.answers.get(chat_id)) is not None:
                answer.decide(decision)

        return handler

    def _read(self, chat_id: str) -> Chat:
        try:
            return self.runtime.open(chat_id)
        except Glm4liteError as error:
            raise gr.Error(str(error), print_exception=False) from None

    def _attachment(self, path: str) -> Attachment:
        return self.runtime.attachment(Path(path).name, Path(path).read_bytes())


def _input(answering: bool, text: str | None = None) -> gr.MultimodalTextbox:
    """The input: a stop button while an answer is under way, a send button otherwise."""
    value = {} if text is None else {"value": {"text": text, "files": []}}
    return gr.MultimodalTextbox(submit_btn=not answering, stop_btn=answering, **value)


def _edited_text(value: Any) -> str:
    """Gradio gives the edited message as text or as its content blocks."""
    if isinstance(value, list):
        return "".join(str(block.get("text", "")) if isinstance(block, dict) else str(block) for block in value)
    return str(value or "")


def build(runtime: Runtime) -> gr.Blocks:
    """The page."""
    with gr.Blocks(title="glm4lite", analytics_enabled=False, fill_width=True, delete_cache=(3600, 3600)) as blocks:
        Page(runtime, lay_out(GREETING)).wire(blocks)
    blocks.queue(max_size=32, api_open=False)
    return blocks
