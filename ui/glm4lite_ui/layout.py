"""What is on the page: components and where they stand, and nothing of what they do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import gradio as gr

from glm4lite_ui.panels import CHAT_LIST_JS

CSS = Path(__file__).with_name("style.css")
FORMULAS: list[dict[str, str | bool]] = [
    {"left": "$$", "right": "$$", "display": True},
    {"left": "\\[", "right": "\\]", "display": True},
    {"left": "\\(", "right": "\\)", "display": False},
]
TEXT_FILES = ["text", ".md", ".json", ".csv", ".py", ".js", ".ts", ".html", ".css", ".xml", ".yaml", ".yml", ".toml"]
TEXT_FILES += [".c", ".h", ".cpp", ".rs", ".go", ".java", ".sh", ".sql", ".log", ".ini", ".tex", ".svg"]


@dataclass
class Components:
    """The components that events read or change."""

    chat_id: gr.State
    title: gr.Textbox
    new: gr.Button
    search: gr.Textbox
    chats: gr.HTML
    chatbot: gr.Chatbot
    live: gr.HTML
    asking: gr.Group
    asked: gr.Markdown
    approve: gr.Button
    always: gr.Button
    deny: gr.Button
    full: gr.Group
    full_text: gr.Markdown
    drop: gr.Button
    message: gr.MultimodalTextbox


def theme() -> gr.themes.Base:
    """The system's own fonts: nothing is fetched."""
    fonts = ["ui-sans-serif", "system-ui", "Noto Sans CJK SC", "sans-serif"]
    mono = ["ui-monospace", "Consolas", "Noto Sans Mono CJK SC", "monospace"]
    return gr.themes.Soft(primary_hue="teal", secondary_hue="teal", neutral_hue="slate", font=fonts, font_mono=mono)


def lay_out(greeting: str) -> Components:
    """Builds the page inside the current Blocks."""
    chat_id = gr.State("")
    with gr.Sidebar(width=280):
        new = gr.Button("New chat", variant="primary", size="md")
        search = gr.Textbox(placeholder="Search chats", show_label=False, container=False, elem_id="search")
        chats = gr.HTML("", js_on_load=CHAT_LIST_JS, elem_id="chats")
    with gr.Row(elem_id="title-row"):
        title = gr.Textbox(show_label=False, container=False, elem_id="chat-title", max_length=120)
    with gr.Column(elem_id="chat-column"):
        chatbot = _chatbot(greeting)
        asking, asked, approve, always, deny = _approval()
        with gr.Group(visible=False, elem_id="full") as full:
            full_text = gr.Markdown()
            drop = gr.Button("Drop the oldest turns and answer", variant="primary", size="sm")
        message = gr.MultimodalTextbox(
            placeholder="Ask something", show_label=False, file_types=TEXT_FILES, file_count="multiple",
            max_lines=8, autofocus=True, elem_id="message", max_plain_text_length=100_000,
        )  # fmt: skip
        live = gr.HTML("", elem_id="live")
    return Components(
        chat_id, title, new, search, chats, chatbot, live, asking, asked, approve, always, deny, full, full_text, drop,
        message,
    )  # fmt: skip


def _chatbot(greeting: str) -> gr.Chatbot:
    return gr.Chatbot(
        elem_id="chatbot",
        show_label=False,
        container=False,
        editable="user",
        latex_delimiters=FORMULAS,
        buttons=["copy"],
        placeholder=greeting,
        examples=[{"text": "What is 37 * 24?"}, {"text": "What time is it in Tokyo?"}],
        allow_tags=False,
        layout="bubble",
    )


def _approval() -> tuple[gr.Group, gr.Markdown, gr.Button, gr.Button, gr.Button]:
    with gr.Group(visible=False, elem_id="asking") as group:
        asked = gr.Markdown()
        with gr.Row():
            approve = gr.Button("Approve", variant="primary", size="sm")
            always = gr.Button("Always for this chat", size="sm")
            deny = gr.Button("Deny", variant="stop", size="sm")
    return group, asked, approve, always, deny
