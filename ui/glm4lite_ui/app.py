"""The page as a whole: which handler answers which event."""

from __future__ import annotations

import functools
import html
import inspect
import logging
from collections.abc import Callable, Iterator
from typing import Any

import gradio as gr

from glm4lite.errors import Glm4liteError
from glm4lite_ui.conversation import ConversationHandlers
from glm4lite_ui.drawing import Drawing
from glm4lite_ui.layout import lay_out
from glm4lite_ui.library import LibraryHandlers
from glm4lite_ui.model_page import ModelHandlers
from glm4lite_ui.panels import PAGE_JS
from glm4lite_ui.runtime import Runtime

logger = logging.getLogger("glm4lite")

ANSWERS_AT_ONCE = 32  # that are watched; they queue for the engine

Handler = Callable[..., Any]


def build(runtime: Runtime) -> gr.Blocks:
    """The page, for serving.py to mount."""
    with gr.Blocks(title="glm4lite", analytics_enabled=False, fill_width=True, delete_cache=(3600, 3600)) as blocks:
        drawing = Drawing(runtime, lay_out(runtime.tools))
        _wire_conversation(drawing, ConversationHandlers(runtime, drawing))
        _wire_library(blocks, drawing, LibraryHandlers(runtime, drawing))
        _wire_model(blocks, drawing, ModelHandlers(runtime, drawing))
    blocks.queue(max_size=32, api_open=False)
    return blocks


def _wire_conversation(drawing: Drawing, on: ConversationHandlers) -> None:
    parts, outputs = drawing.components.conversation, drawing.outputs()
    chat, seen = parts.chat_id, parts.seen
    _stream(parts.message.submit, on.send, [parts.message, chat], outputs)
    _stream(parts.chatbot.example_select, on.example, [chat], outputs)
    _stream(parts.chatbot.retry, on.regenerate, [chat, seen], outputs)
    _stream(parts.chatbot.edit, on.edit, [chat, seen], outputs)
    _stream(parts.drop.click, on.drop_oldest, [chat], outputs)
    _now(parts.message.stop, on.stop, [chat], [])
    _now(parts.approve.click, on.decide("approve"), [chat, parts.asked_id], [])
    _now(parts.always.click, on.decide("always"), [chat, parts.asked_id], [])
    _now(parts.deny.click, on.decide("deny"), [chat, parts.asked_id], [])
    _now(parts.chatbot.undo, on.undo, [chat, seen], outputs)
    _now(parts.turns.mark, on.mark, [chat, seen], [*outputs, parts.marked_text, parts.marked_turn])
    _now(parts.delete.click, on.delete, [chat, seen, parts.marked_turn], outputs)
    _now(parts.unmark.click, lambda: gr.Column(visible=False), [], [parts.marked])
    known = gr.State([])
    _now(parts.message.change, on.weigh, [parts.message, known, chat], [parts.live, known])


def _wire_library(blocks: gr.Blocks, drawing: Drawing, on: LibraryHandlers) -> None:
    library, parts, panel = drawing.components.library, drawing.components.conversation, drawing.components.settings
    outputs, chat = drawing.outputs(), parts.chat_id
    _stream(blocks.load, on.start, [], outputs)
    blocks.unload(on.left)
    blocks.load(None, js=PAGE_JS, api_visibility="private")
    _stream(library.new.click, on.new, [], outputs)
    _stream(library.chats.open, on.open, [], outputs)
    _stream(library.chats.remove, on.remove, [chat, library.search], outputs)
    _now(library.search.input, on.search, [library.search, chat], [library.chats])
    for event in (parts.title.blur, parts.title.submit):
        _now(event, on.rename, [parts.title, chat, library.search], [library.chats])
    for event in (panel.system.blur, panel.tools.input):
        _now(event, on.set, [chat, *panel.inputs()], [])
    for number in (panel.temperature, panel.top_p, panel.max_new_tokens, panel.seed):
        _now(number.input, on.set, [chat, *panel.inputs()], [])
    _now(panel.ask_again.click, on.ask_again, [chat], [panel.ask_again])


def _wire_model(blocks: gr.Blocks, drawing: Drawing, on: ModelHandlers) -> None:
    panel = drawing.components.model
    _now(blocks.load, on.facts, [], [panel.facts])
    _now(panel.tab.select, on.facts, [], [panel.facts])
    _stream(panel.load.click, on.load, [panel.source, panel.quant], [panel.facts, panel.progress, panel.load])


def _stream(event: Handler, handler: Handler, inputs: list[Any], outputs: list[Any]) -> None:
    """An event answered by many drawings; it may come again before they end, in another chat."""
    event(
        _told(handler),
        inputs,
        outputs,
        show_progress="hidden",
        api_visibility="private",
        concurrency_limit=ANSWERS_AT_ONCE,
        concurrency_id="answers",
        trigger_mode="multiple",
    )


def _now(event: Handler, handler: Handler, inputs: list[Any], outputs: list[Any]) -> None:
    """An event answered at once, also while answers are under way.

    It passes Gradio's queue too: only there an error becomes a message on the page.
    """
    event(_told(handler), inputs, outputs, show_progress="hidden", api_visibility="private", concurrency_limit=None)


def _told(handler: Handler) -> Handler:
    """What a user can cause is shown as a message on the page; anything else is logged and named there."""

    def problem(error: Exception) -> gr.Error:
        if not isinstance(error, Glm4liteError):
            logger.error("the page failed", exc_info=error)
        said = html.escape(str(error) or type(error).__name__)  # the page draws it as HTML
        return gr.Error(said, duration=10, print_exception=False, title="glm4lite")

    if inspect.isgeneratorfunction(handler):

        @functools.wraps(handler)
        def stream(*values: Any) -> Iterator[Any]:
            try:
                yield from handler(*values)
            except Exception as error:
                raise problem(error) from error

        return stream

    @functools.wraps(handler)
    def once(*values: Any) -> Any:
        try:
            return handler(*values)
        except Exception as error:
            raise problem(error) from error

    return once
