"""A saved chat as the messages that the model reads."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

from glm4lite.messages import Message, ToolCall
from glm4lite_ui.chats import Attachment, Chat, Part, Turn

NOT_RUN = "Error: the call was not run"


def messages(chat: Chat, until: int | None = None) -> list[Message]:
    """The system prompt and the turns before `until` (None: all) that were not dropped."""
    found = [Message("system", chat.settings.system)] if chat.settings.system.strip() else []
    calls = 0
    for turn in chat.turns[:until]:
        if turn.dropped or (turn.error and not turn.parts and turn is not chat.turns[-1]):
            continue  # a question that failed stands on the page, and was never answered
        found.append(Message("user", question(turn)))
        for message in _answer(turn, calls):
            calls += len(message.tool_calls)
            found.append(message)
    return found


def question(turn: Turn) -> str:
    """What the user typed, then each file under its name."""
    return "\n\n".join([turn.user, *map(_file, turn.files)]).strip()


def _file(file: Attachment) -> str:
    fence = "```"
    while fence in file.text:  # a file may hold fences of its own
        fence += "`"
    return f"File {file.name}:\n{fence}\n{file.text}\n{fence}"


def _answer(turn: Turn, calls_before: int) -> Iterator[Message]:
    """One assistant message per round, behind it the results of its calls. Thoughts are not read again."""
    number = calls_before
    for _, group in groupby(turn.parts, key=lambda part: part.round):
        parts = list(group)
        text = "".join(part.text for part in parts if part.kind == "text")
        calls: list[tuple[ToolCall, Part]] = []
        for part in parts:
            if part.kind == "call":
                number += 1
                calls.append((ToolCall(f"call_{number}", part.name, part.arguments), part))
        if text or calls:
            yield Message("assistant", text, tuple(call for call, _ in calls))
        for call, part in calls:
            result = NOT_RUN if part.seconds is None else part.text
            yield Message("tool", result, tool_call_id=call.id, name=call.name)
