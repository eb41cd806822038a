"""What the page shows of a chat, as Gradio's updates."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr

from glm4lite_ui.answering import Answer
from glm4lite_ui.artifacts import previews
from glm4lite_ui.chats import Chat
from glm4lite_ui.layout import Components
from glm4lite_ui.panels import chat_list, context_full, export_links, live_line, question_about
from glm4lite_ui.render import chat_messages
from glm4lite_ui.runtime import Runtime

Updates = dict[Any, Any]


class Drawing:
    """Draws a chat on the components; keeps nothing."""

    def __init__(self, runtime: Runtime, components: Components) -> None:
        self.runtime, self.components = runtime, components

    def outputs(self) -> list[Any]:
        """Every component that `whole` may change."""
        middle, settings = self.components.conversation, self.components.settings
        shown: list[Any] = [middle.chat_id, middle.title, middle.chatbot, middle.previews, middle.live, middle.message]
        shown += [
            middle.asking,
            middle.asked,
            middle.asked_id,
            middle.seen,
            middle.full,
            middle.full_text,
            middle.marked,
        ]
        return [*shown, self.components.library.chats, *settings.inputs(), settings.ask_again, settings.export]

    def whole(self, chat: Chat, answer: Answer | None = None) -> Updates:
        """Everything but the input's text."""
        middle = self.components.conversation
        return {
            middle.chat_id: chat.id,
            middle.seen: chat.state(),
            middle.title: chat.title,
            self.components.library.chats: self.list(chat.id),
            middle.chatbot: chat_messages(chat, answering=answer is not None),
            middle.previews: previews(chat.turns),
            middle.live: live_line(self.runtime, chat, answer),
            middle.asking: gr.Column(visible=False),
            middle.full: gr.Column(visible=False),
            middle.marked: gr.Column(visible=False),
            middle.message: self.input(answering=answer is not None),
        }

    def progress(self, answer: Answer) -> Updates:
        """What changes while an answer grows."""
        middle, asking = self.components.conversation, answer.asking
        return {
            middle.chatbot: chat_messages(answer.chat, answering=True),
            middle.live: live_line(self.runtime, answer.chat, answer),
            middle.asking: gr.Column(visible=asking is not None),
            middle.asked: question_about(asking),
            middle.asked_id: "" if asking is None else asking.id,
        }

    def followed(self, answer: Answer, window: str, also: Updates | None = None) -> Iterator[Updates]:
        """An answer as it grows, in one window; nothing is drawn while that shows another chat. `also` comes first."""
        with answer.watched_by(window):
            yield self.whole(answer.chat, answer) | (also or {})
            for _ in answer.updates():
                yield self.progress(answer) if self._shows(window, answer.chat) else self._nothing()
        if not self._shows(window, answer.chat):
            yield self._nothing()
            return
        offer = self.offer_to_drop(answer.chat) if answer.context_full else {}
        yield self.whole(answer.chat) | self.settings(answer.chat) | offer

    def _shows(self, window: str, chat: Chat) -> bool:
        return self.runtime.shown.get(window) == chat.id

    def _nothing(self) -> Updates:
        """Gradio wants a value for something; that of a component that it is to skip."""
        return {self.components.conversation.live: gr.skip()}

    def offer_to_drop(self, chat: Chat) -> Updates:
        """The context is full: what can be done."""
        middle = self.components.conversation
        return {middle.full: gr.Column(visible=True), middle.full_text: context_full(chat)}

    def settings(self, chat: Chat) -> Updates:
        """The panel on the right; what the chat leaves open shows the model's own value."""
        panel, settings = self.components.settings, chat.settings
        own = self.runtime.engine.params()
        names = [tool.name for tool in self.runtime.tools]
        values = [
            settings.system,
            own.temperature if settings.temperature is None else settings.temperature,
            own.top_p if settings.top_p is None else settings.top_p,
            settings.max_new_tokens,
            settings.seed,
            names if settings.tools is None else [name for name in settings.tools if name in names],
        ]
        links = export_links(chat) if chat.turns else ""
        always = gr.Button(visible=bool(settings.always))
        return {**dict(zip(panel.inputs(), values, strict=True)), panel.ask_again: always, panel.export: links}

    def list(self, current: str, query: str = "") -> str:
        return chat_list(self.runtime.store.find(query), current, searched=bool(query.strip()))

    def input(self, answering: bool, text: str | None = None) -> gr.MultimodalTextbox:
        """The input: a stop button while an answer is under way, a send button otherwise."""
        if text is None:
            return gr.MultimodalTextbox(submit_btn=not answering, stop_btn=answering)
        return gr.MultimodalTextbox({"text": text, "files": []}, submit_btn=not answering, stop_btn=answering)
