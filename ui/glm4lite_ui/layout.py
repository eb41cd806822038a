"""The page as a Gradio app: a Blocks of components of its own, which static/page.js brings to life.

They are `gr.HTML` with a template and a script instead of Gradio's Chatbot, Textbox and so on, and speak to the routes
under /page/ instead of Gradio's events: those pass a queue that looks for work each millisecond for ever, drop what is
typed while one is under way, do not say which chat an answer of theirs is for, and send a whole conversation's
difference for each piece of text. So none of Gradio's events, uploads or sessions is used, or served (serving.py).
"""

from __future__ import annotations

import functools
from pathlib import Path

import gradio as gr

STATIC = Path(__file__).with_name("static")
# Not as Gradio's css, whose selectors it writes anew.
HEAD = "".join(f'<link rel="stylesheet" href="/page/static/{name}.css">' for name in ("page", "thread", "code"))
PIECES = ("header", "library", "thread", "composer", "pane", "sheets")


def piece(name: str) -> gr.HTML:
    """A part of the page: static/<name>.html, which the page's script takes over."""
    return gr.HTML(
        html_template=(STATIC / f"{name}.html").read_text(encoding="utf-8"),
        js_on_load="import('/page/static/page.js').then(page => page.mounted(element))",
        apply_default_css=False,
        elem_classes="piece",
    )


class Page(gr.Blocks):
    """Blocks whose queue stays asleep, as there is no event for it."""

    def run_startup_events(self) -> None:
        self.is_running = True
        self.create_limiter()


def theme() -> gr.themes.Base:
    """The system's own fonts, so that nothing is fetched; page.css names them."""
    return gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["monospace"])


@functools.cache  # Gradio takes as long for it as for all of the server, and it holds nothing of who sees it
def build() -> Page:
    """The page, for serving.py to mount."""
    with Page(title="glm4lite", analytics_enabled=False, fill_width=True) as page:
        for name in PIECES:
            piece(name)
    return page
