"""The handlers of the open chat: what asks for an answer, and what happens to answers and turns."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import gradio as gr

from glm4lite.errors import Glm4liteError
from glm4lite_ui.answering import Decision
from glm4lite_ui.chats import Attachment, Chat
from glm4lite_ui.drawing import Drawing, Updates
from glm4lite_ui.markup import literal, original_of, text_html
from glm4lite_ui.panels import live_line
from glm4lite_ui.render import turn_at
from glm4lite_ui.runtime import Runtime
from glm4lite_ui.uploads import uploaded


class ConversationHandlers:
    """They keep nothing: chats are on disk, answers under way in the Runtime."""

    def __init__(self, runtime: Runtime, drawing: Drawing) -> None:
        self.runtime, self.draw = runtime, drawing
        self.parts = drawing.components.conversation

    # Streams: each yields what is drawn while an answer grows

    def send(self, message: dict[str, Any], chat_id: str, request: gr.Request) -> Iterator[Updates]:
        text, paths = _typed(message.get("text")), message.get("files") or []
        if not text and not paths:
            return
        chat = self.runtime.change(chat_id)
        chat.ask(text, [self._attachment(path) for path in paths])
        yield from self._answer(chat, request, {self.parts.message: self.draw.input(True, text="")})

    def example(self, chat_id: str, event: gr.SelectData, request: gr.Request) -> Iterator[Updates]:
        yield from self.send({"text": str(event.value.get("text", ""))}, chat_id, request)

    def regenerate(self, chat_id: str, seen: str, request: gr.Request) -> Iterator[Updates]:
        chat = self.runtime.change(chat_id)
        if _changed_meanwhile(chat, seen):
            yield self.draw.whole(chat)
        elif chat.turns:
            chat.another(chat.turns[-1])
            yield from self._answer(chat, request)

    def edit(self, chat_id: str, seen: str, event: gr.EditData, request: gr.Request) -> Iterator[Updates]:
        """Answers the changed message; the old one stays, with what followed it."""
        chat = self.runtime.change(chat_id)
        place, text = turn_at(chat, event.index, question=True), _typed(_edited_text(event.value))
        if _changed_meanwhile(chat, seen) or place is None or not text:
            yield self.draw.whole(chat)
            return
        chat.another(chat.turns[place], text)
        yield from self._answer(chat, request)

    def drop_oldest(self, chat_id: str, request: gr.Request) -> Iterator[Updates]:
        chat = self.runtime.change(chat_id)
        if not self.runtime.drop_oldest(chat):
            raise Glm4liteError("The last message alone does not fit the context: shorten it.")
        chat.another(chat.turns[-1])
        yield from self._answer(chat, request)

    def _answer(self, chat: Chat, request: gr.Request, also: Updates | None = None) -> Iterator[Updates]:
        answer, window = self.runtime.answer(chat), str(request.session_hash)
        self.runtime.shown[window] = chat.id
        yield from self.draw.followed(answer, window, also)

    # At once

    def stop(self, chat_id: str) -> None:
        if (answer := self.runtime.answers.get(chat_id)) is not None:
            answer.stop()

    def decide(self, decision: Decision) -> Callable[[str, str], None]:
        """The handler of a button under a call that waits."""

        def handler(chat_id: str, asked: str) -> None:
            if (answer := self.runtime.answers.get(chat_id)) is not None:
                answer.decide(asked, decision)

        return handler

    def mark(self, chat_id: str, seen: str, event: gr.EventData) -> Updates:
        """Asks whether a turn is to be deleted."""
        chat, place = self.runtime.change(chat_id), event.turn
        if _changed_meanwhile(chat, seen):
            return self.draw.whole(chat)
        if not isinstance(place, int) or not 0 <= place < len(chat.turns):
            raise Glm4liteError("this turn is not there any more")
        words = " ".join(chat.turns[place].user.split())
        text = literal(words if len(words) <= 80 else words[:79] + "…")
        return {
            self.parts.marked: gr.Column(visible=True),
            self.parts.marked_text: f"Turn {place + 1}: {text}",
            self.parts.marked_turn: place,
        }

    def delete(self, chat_id: str, seen: str, place: int | None) -> Updates:
        chat = self.runtime.change(chat_id)
        if not _changed_meanwhile(chat, seen) and place is not None and 0 <= place < len(chat.turns):
            chat.remove(chat.turns[place])
            self.runtime.store.save(chat)
        return self.draw.whole(chat) | self.draw.settings(chat)

    def undo(self, chat_id: str, seen: str) -> Updates:
        """Deletes the last turn and puts its text back into the input."""
        chat = self.runtime.change(chat_id)
        if _changed_meanwhile(chat, seen):
            return self.draw.whole(chat)
        text = ""
        if chat.turns:
            text = chat.turns[-1].user
            chat.remove(chat.turns[-1])
        self.runtime.store.save(chat)
        return self.draw.whole(chat) | self.draw.settings(chat) | {self.parts.message: self.draw.input(False, text)}

    def weigh(self, message: dict[str, Any], known: list[str], chat_id: str) -> tuple[Any, list[str]]:
        """Says how many tokens the attached files take, when they change."""
        paths = message.get("files") or []
        if paths == known or chat_id in self.runtime.answers:
            return gr.skip(), paths
        if not paths:
            return live_line(self.runtime, self.runtime.open(chat_id)), paths
        return "".join(f"<span>{text_html(self._weight(path))}</span>" for path in paths), paths

    def _weight(self, path: str) -> str:
        try:
            file = self._attachment(path)
        except Glm4liteError as error:
            return str(error)
        return f"{file.name}: {file.tokens:,} tokens"

    def _attachment(self, path: str) -> Attachment:
        file = uploaded(path)
        return self.runtime.attachment(file.name, file)


def _changed_meanwhile(chat: Chat, seen: str) -> bool:
    """Whether a window shows another state of the chat than there is now: a turn's place would mean another turn."""
    if seen == chat.state():
        return False
    gr.Warning("This chat was changed in another window. Here it is as it is now.", title="glm4lite")
    return True


def _typed(text: str | None) -> str:
    """Text of a browser, which may send half a sign."""
    return (text or "").encode("utf-8", "replace").decode().strip()


def _edited_text(value: Any) -> str:
    """Gradio gives the edited message as text or as its content blocks."""
    if isinstance(value, list):
        value = "".join(str(block.get("text", "")) if isinstance(block, dict) else str(block) for block in value)
    return original_of(str(value or ""))
