"""A chat as what Gradio's Chatbot shows: text, a panel per thought and per tool call, notes. All text is escaped."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from typing import Any

from glm4lite_ui.chats import Chat, Part, Turn
from glm4lite_ui.markup import code_block, literal, safe_markdown, with_original

ENDINGS = {
    "length": "The answer was cut: the longest answer allowed, or the context, is used up.",
    "cancelled": "Stopped.",
    "tool_rounds": "Stopped: the model kept calling tools.",
}
DROPPED = "From here upwards the model no longer reads this chat: its context was full."
Shown = dict[str, Any]


def chat_messages(chat: Chat, answering: bool = False) -> list[Shown]:
    """The messages of the Chatbot; `answering` says that the last turn is still under way."""
    return [message for message, _ in _placed(chat, answering)]


def turn_at(chat: Chat, index: int | list[int] | tuple[int, ...], question: bool = False) -> int | None:
    """The turn that the message at the Chatbot's `index` belongs to; with `question` only if it is the user's text."""
    number = index if isinstance(index, int) else index[0]
    shown = list(_placed(chat, False))
    if not 0 <= number < len(shown) or (question and not _is_question(*shown[number : number + 2])):
        return None
    return shown[number][1]


def _is_question(message: tuple[Shown, int], following: tuple[Shown, int] | None = None) -> bool:
    """A turn's files stand before its text, also as the user's messages."""
    last = following is None or following[0]["role"] != "user" or following[1] != message[1]
    return message[0]["role"] == "user" and last


def _placed(chat: Chat, answering: bool) -> Iterator[tuple[Shown, int]]:
    turns = chat.turns
    for number, turn in enumerate(turns):
        under_way = answering and number == len(turns) - 1
        for message in _turn(turn, under_way):
            yield message, number
        following = turns[number + 1 : number + 2]
        if turn.dropped and following and not following[0].dropped:
            yield _note(DROPPED), number


def _turn(turn: Turn, under_way: bool) -> Iterator[Shown]:
    for file in turn.files:
        yield _message("user", f"{literal(file.name)} · {file.tokens:,} tokens")
    yield _message("user", _said(turn.user))
    for part in turn.parts:
        if part.kind == "text":
            if part.text.strip():
                yield _message("assistant", _written(part, under_way))
        else:
            yield _thought(part, under_way) if part.kind == "thinking" else _call(part, under_way)
    if under_way:
        return
    if turn.error:
        yield _note(turn.error)
    elif turn.counts and (ending := ENDINGS.get(turn.counts.finish_reason)):
        yield _note(ending)


def _message(role: str, content: str) -> Shown:
    """As a block: a string Gradio would indent anew, with spaces for tabs."""
    return {"role": role, "content": {"type": "text", "text": content}}


@functools.lru_cache(512)  # a chat is drawn ten times a second while its last answer grows
def _said(text: str) -> str:
    return with_original(safe_markdown(text), text)


def _written(part: Part, under_way: bool) -> str:
    return safe_markdown(part.text) if under_way and part.seconds is None else _said(part.text)


def _thought(part: Part, under_way: bool) -> Shown:
    title = "Thinking" if under_way and part.seconds is None else "Thought"
    return _panel(title, _written(part, under_way), part, under_way)


def _call(part: Part, under_way: bool) -> Shown:
    pieces = [code_block(_indented(part.arguments), "json")]
    if part.seconds is not None:
        pieces += ["**Error**" if part.error else "**Result**", code_block(part.text)]
    elif not under_way:
        pieces.append("It was not run.")
    title = f"{literal(part.name)}{' failed' if part.error else ''}"
    return _panel(title, "\n\n".join(pieces), part, under_way)


def _panel(title: str, content: str, part: Part, under_way: bool) -> Shown:
    """Open with a spinner while it is under way, then collapsed with its duration."""
    pending = under_way and part.seconds is None
    metadata: dict[str, Any] = {"title": title, "status": "pending" if pending else "done"}
    if part.seconds is not None:
        metadata["duration"] = max(round(part.seconds, 2), 0.01)
    if part.kind == "call" and not pending:
        metadata["log"] = _first_line(part.text)
    return _message("assistant", content) | {"metadata": metadata}


def _first_line(text: str) -> str:
    line = text.strip().split("\n", 1)[0]
    return line if len(line) <= 60 else line[:59] + "…"


def _indented(arguments: str) -> str:
    try:
        return json.dumps(json.loads(arguments), ensure_ascii=False, indent=2)
    except ValueError:
        return arguments


def _note(text: str) -> Shown:
    return _message("assistant", f"> {literal(text)}")
