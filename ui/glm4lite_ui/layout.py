"""What is on the page: components and where they stand, and nothing of what they do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from glm4lite.tools import Tool
from glm4lite_ui.artifacts import PREVIEW_JS
from glm4lite_ui.formulas import DISPLAY, INLINE
from glm4lite_ui.panels import CHAT_LIST_JS, TURNS_JS

CSS = Path(__file__).with_name("style.css")
GREETING = "## glm4lite\nA GLM-4 model on your own machine. Nothing you write leaves it."
FORMULAS: list[dict[str, str | bool]] = [
    {"left": left, "right": right, "display": (left, right) == DISPLAY} for left, right in (DISPLAY, INLINE)
]
TEXT_FILES = ["text", ".md", ".json", ".csv", ".py", ".js", ".ts", ".html", ".css", ".xml", ".yaml", ".yml", ".toml"]
TEXT_FILES += [".c", ".h", ".cpp", ".rs", ".go", ".java", ".sh", ".sql", ".log", ".ini", ".tex", ".svg"]


@dataclass
class Library:
    """The chats on the left."""

    new: gr.Button
    search: gr.Textbox
    chats: gr.HTML


@dataclass
class Conversation:
    """The middle: the chat that is open."""

    chat_id: gr.Textbox  # hidden; the page holds it, so that it outlives a restart of the server
    seen: gr.Textbox  # hidden; the state of the chat that this window shows
    title: gr.Textbox
    chatbot: gr.Chatbot
    turns: gr.HTML  # empty; the buttons that delete turns speak through it
    previews: gr.HTML
    asking: gr.Column
    asked: gr.Markdown
    asked_id: gr.Textbox  # hidden; which call the buttons are about
    approve: gr.Button
    always: gr.Button
    deny: gr.Button
    full: gr.Column
    full_text: gr.Markdown
    drop: gr.Button
    marked: gr.Column
    marked_text: gr.Markdown
    marked_turn: gr.State
    delete: gr.Button
    unmark: gr.Button
    message: gr.MultimodalTextbox
    live: gr.HTML


@dataclass
class SettingsPanel:
    """The right: how this chat is answered."""

    system: gr.Textbox
    temperature: gr.Number
    top_p: gr.Number
    max_new_tokens: gr.Number
    seed: gr.Number
    tools: gr.CheckboxGroup
    ask_again: gr.Button
    export: gr.HTML

    def inputs(self) -> list[Any]:
        """In the order of `Settings`."""
        return [self.system, self.temperature, self.top_p, self.max_new_tokens, self.seed, self.tools]


@dataclass
class ModelPanel:
    """The second tab: what is loaded."""

    tab: gr.Tab
    facts: gr.HTML
    source: gr.Textbox
    quant: gr.Dropdown
    load: gr.Button
    progress: gr.HTML


@dataclass
class Components:
    """All that events read or change."""

    library: Library
    conversation: Conversation
    settings: SettingsPanel
    model: ModelPanel


def theme() -> gr.themes.Base:
    """The system's own fonts: nothing is fetched."""
    fonts = ["ui-sans-serif", "system-ui", "Noto Sans CJK SC", "sans-serif"]
    mono = ["ui-monospace", "Consolas", "Noto Sans Mono CJK SC", "monospace"]
    return gr.themes.Soft(primary_hue="teal", secondary_hue="teal", neutral_hue="slate", font=fonts, font_mono=mono)


def lay_out(tools: Sequence[Tool]) -> Components:
    """Builds the page inside the current Blocks."""
    with gr.Sidebar(width=280, open=False, elem_id="library"):
        library = _library()
    with gr.Sidebar(width=300, position="right", open=False, elem_id="settings"):
        settings = _settings(tools)
    with gr.Tabs(elem_id="tabs"):
        with gr.Tab("Chat", elem_id="chat-tab"):
            conversation = _conversation()
        with gr.Tab("Model", elem_id="model-tab") as tab:
            model = _model(tab)
    return Components(library, conversation, settings, model)


def _library() -> Library:
    new = gr.Button("New chat", variant="primary", size="md", elem_id="new-chat")
    search = gr.Textbox(placeholder="Search chats", show_label=False, container=False, elem_id="search")
    return Library(new, search, gr.HTML("", js_on_load=CHAT_LIST_JS, elem_id="chats"))


def _conversation() -> Conversation:
    chat_id = gr.Textbox("", visible="hidden", elem_id="chat-id")
    seen = gr.Textbox("", visible="hidden", elem_id="seen")
    with gr.Column(elem_id="chat-column"):
        title = gr.Textbox(show_label=False, container=False, elem_id="chat-title", max_length=120)
        chatbot = _chatbot()
        turns = gr.HTML("", js_on_load=TURNS_JS, elem_id="turns")
        previews = gr.HTML("", js_on_load=PREVIEW_JS, elem_id="previews")
        asking, asked, asked_id, approve, always, deny = _approval()
        with gr.Column(visible=False, elem_id="full", elem_classes="g-card") as full:
            full_text = gr.Markdown(latex_delimiters=[])
            drop = gr.Button("Drop the oldest turns and answer", variant="primary", size="sm")
        with gr.Column(visible=False, elem_id="marked", elem_classes="g-card") as marked:
            marked_text, marked_turn = gr.Markdown(latex_delimiters=[]), gr.State(None)
            with gr.Row():
                delete = gr.Button("Delete this turn", variant="stop", size="sm")
                unmark = gr.Button("Keep it", size="sm")
        message = gr.MultimodalTextbox(
            placeholder="Ask something",
            show_label=False,
            file_types=TEXT_FILES,
            file_count="multiple",
            max_lines=8,
            autofocus=True,
            elem_id="message",
            max_plain_text_length=100_000,
        )
        live = gr.HTML("", elem_id="live")
    return Conversation(
        chat_id, seen, title, chatbot, turns, previews, asking, asked, asked_id, approve, always, deny, full, full_text,
        drop, marked, marked_text, marked_turn, delete, unmark, message, live,
    )  # fmt: skip


def _chatbot() -> gr.Chatbot:
    return gr.Chatbot(
        elem_id="chatbot",
        show_label=False,
        container=False,
        editable="user",
        latex_delimiters=FORMULAS,
        buttons=["copy"],
        placeholder=GREETING,
        examples=[{"text": "What is 37 * 24?"}, {"text": "What time is it in Tokyo?"}],
        allow_tags=False,
        layout="bubble",
    )


def _approval() -> tuple[gr.Column, gr.Markdown, gr.Textbox, gr.Button, gr.Button, gr.Button]:
    with gr.Column(visible=False, elem_id="asking", elem_classes="g-card") as column:
        asked, asked_id = gr.Markdown(latex_delimiters=[]), gr.Textbox("", visible="hidden", elem_id="asked-id")
        with gr.Row():
            approve = gr.Button("Approve", variant="primary", size="sm", min_width=80)
            always = gr.Button("Always for this chat", size="sm", min_width=120)
            deny = gr.Button("Deny", variant="stop", size="sm", min_width=80)
    return column, asked, asked_id, approve, always, deny


def _settings(tools: Sequence[Tool]) -> SettingsPanel:
    """The numbers have no bounds here: the handler's refusal names the field, Gradio's does not."""
    gr.Markdown("### This chat")
    system = gr.Textbox(label="System prompt", lines=3, max_lines=10, elem_id="system")
    with gr.Row():
        temperature = gr.Number(label="Temperature", step=0.1, min_width=100)
        top_p = gr.Number(label="Top-p", step=0.05, min_width=100)
    with gr.Row():
        longest = gr.Number(label="Max tokens", precision=0, min_width=100)
        seed = gr.Number(label="Seed", precision=0, placeholder="random", value=None, min_width=100)
    names = [tool.name for tool in tools]
    chosen = gr.CheckboxGroup(names, value=names, label="Tools", visible=bool(names), elem_id="tools")
    again = gr.Button("Ask again before every tool", size="sm", visible=False)
    return SettingsPanel(system, temperature, top_p, longest, seed, chosen, again, gr.HTML("", elem_id="export"))


def _model(tab: gr.Tab) -> ModelPanel:
    with gr.Column(elem_id="model-column"):
        facts = gr.HTML("", elem_id="facts")
        gr.Markdown("### Load another model")
        with gr.Row(equal_height=True):
            source = gr.Textbox(
                label="Model", placeholder="A folder, or a Hub repository such as zai-org/GLM-4-9B-0414", scale=3
            )
            quant = gr.Dropdown(["auto", "int4", "int8", "nf4", "fp4", "none"], value="auto", label="Weights", scale=1)
        load = gr.Button("Load", variant="primary")
        progress = gr.HTML("", elem_id="load-progress")
    return ModelPanel(tab, facts, source, quant, load, progress)
