"""Chats as files: Markdown for people, JSON for programs (and for importing them again); all of them as one archive."""

from __future__ import annotations

import json
import re
import time
import zipfile
from collections.abc import Callable, Iterable
from typing import IO, Literal, NamedTuple

from markdown_it import MarkdownIt

from glm4lite.base.errors import one_line
from glm4lite_ui.chats import Chat, Part
from glm4lite_ui.formulas import DISPLAY, INLINE
from glm4lite_ui.history import question
from glm4lite_ui.markup import code_block, literal, safe_markdown, text_html
from glm4lite_ui.saved.shared import to_data

_COMMONMARK = MarkdownIt("commonmark")
_OWN = re.compile(r"</?details>|<summary>[^<]*</summary>")
_FORMULA_SIGNS = str.maketrans(dict(zip("".join(INLINE + DISPLAY), ("\\(", "\\)", "$$", "$$"), strict=True)))
Language = Literal["en", "zh"]


class _Words(NamedTuple):
    """What a document says of itself."""

    system: str
    user: str
    model: str
    thought: str
    not_run: str


_WORDS: dict[Language, _Words] = {
    "en": _Words("System", "You", "Model", "Thought", "not run"),
    "zh": _Words("系统提示词", "用户", "模型", "思考过程", "没有运行"),
}
KINDS = {"md": "text/markdown", "json": "application/json"}


def as_json(chat: Chat) -> str:
    """The saved chat, and under "messages" the conversation in OpenAI's form."""
    return json.dumps(to_data(chat), ensure_ascii=False, indent=2)


def as_markdown(chat: Chat, language: Language = "en") -> str:
    """Title, system prompt and turns; thoughts and tool calls are folded.

    Texts stand as they were said, unless one of them would draw HTML or a picture where the file is read: a picture's
    address can tell a stranger what the chat holds. Then all are written anew.
    """
    words = _WORDS[language]
    as_said = _document(chat, words, str, str)
    return _document(chat, words, _without_html, literal) if _draws(as_said) else as_said


def _document(chat: Chat, words: _Words, written: Callable[[str], str], on_a_line: Callable[[str], str]) -> str:
    pieces = [f"# {on_a_line(chat.title)}", time.strftime("%Y-%m-%d %H:%M", time.localtime(chat.created))]
    if chat.settings.system.strip():
        pieces += [f"## {words.system}", written(chat.settings.system)]
    for turn in chat.turns:
        pieces += [f"## {words.user}", written(question(turn)), f"## {words.model}"]
        pieces += [_part(part, words, written) for part in turn.parts]
        pieces += [f"> {on_a_line(turn.error)}"] if turn.error else []
    return "\n\n".join(pieces) + "\n"


def _part(part: Part, words: _Words, written: Callable[[str], str]) -> str:
    if part.kind == "text":
        return written(part.text)
    if part.kind == "thinking":
        return f"<details><summary>{words.thought}</summary>\n\n{written(part.text)}\n\n</details>"
    result = words.not_run if part.seconds is None else part.text
    blocks = f"{code_block(part.arguments, 'json')}\n\n{code_block(result)}"
    return f"<details><summary>{text_html(one_line(part.name))}</summary>\n\n{blocks}\n\n</details>"


def _draws(text: str) -> bool:
    """Whether CommonMark finds a picture, or HTML that is not this module's."""
    pieces = [piece for token in _COMMONMARK.parse(text) for piece in (token, *(token.children or []))]
    html = (piece.content for piece in pieces if piece.type in ("html_block", "html_inline"))
    return any(piece.type == "image" for piece in pieces) or any(_OWN.sub("", part).strip() for part in html)


def _without_html(text: str) -> str:
    return safe_markdown(text).translate(_FORMULA_SIGNS)


def write_archive(chats: Iterable[Chat], file: IO[bytes], language: Language = "en") -> None:
    """A zip archive with each chat as JSON and as Markdown."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for chat in chats:
            for kind, text in (("json", as_json(chat)), ("md", as_markdown(chat, language))):
                name = file_name(chat, kind).removesuffix(f".{kind}")
                archive.writestr(f"{kind}/{name}-{chat.id}.{kind}", text.encode("utf-8", "replace"))


def file_name(chat: Chat, kind: str) -> str:
    """The title in letters that every file system takes."""
    words = re.sub(r"[^\w-]+", "-", chat.title).strip("-")[:60] or "chat"
    return f"{words}.{kind}"
