"""Text made safe to show: Markdown without live HTML or pictures, code fences nothing can close, HTML."""

from __future__ import annotations

import html
import re
from collections.abc import Callable

# What is shown as it is: fenced code (an unfinished fence reaches to the end), code spans, formulas.
_VERBATIM = re.compile(
    r"^(?P<indent> {0,3})(?P<fence>`{3,}|~{3,})[^\n]*(?:\n.*?(?:^ {0,3}(?P=fence)[`~]*[ \t]*$|\Z)|\Z)"
    r"|(?P<span>`+)(?!`).+?(?<!`)(?P=span)(?!`)"
    r"|\$\$.+?\$\$|\\\(.+?\\\)|\\\[.+?\\\]",
    re.DOTALL | re.MULTILINE,
)
_TAG = re.compile(r"<(?=[a-zA-Z/!?])")
_ENTITY = re.compile(r"&(?=#?\w+;)")
_IMAGE = re.compile(r"!(?=\[)")


def safe_markdown(text: str) -> str:
    """Markdown whose HTML is read, not obeyed, and whose pictures are links: a picture's address can carry a secret."""
    return _outside_code(text, _escape)


def original_markdown(shown: str) -> str:
    """What `safe_markdown` was given, for text that a user edited on the page."""
    return _outside_code(shown, _unescape)


def code_block(text: str, language: str = "") -> str:
    """A fence that is longer than any inside."""
    runs = (len(run) for run in re.findall(r"`{3,}", text))
    fence = "`" * (max(runs, default=2) + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def text_html(text: object) -> str:
    """For HTML that Gradio reads as a template too: nothing of it may look like one."""
    escaped = html.escape(str(text))
    return escaped.translate({ord(sign): f"&#{ord(sign)};" for sign in "{}$`\\"})


def _outside_code(text: str, change: Callable[[str], str]) -> str:
    pieces, end = [], 0
    for found in _VERBATIM.finditer(text):
        pieces += [change(text[end : found.start()]), found.group()]
        end = found.end()
    return "".join([*pieces, change(text[end:])])


def _escape(text: str) -> str:
    text = _TAG.sub("&lt;", _ENTITY.sub("&amp;", text))
    return _IMAGE.sub(r"\\!", text)


def _unescape(text: str) -> str:
    text = text.replace(r"\![", "![").replace("&lt;", "<")
    return text.replace("&amp;", "&")
