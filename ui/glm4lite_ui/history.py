"""A saved chat as the messages that the model reads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from glm4lite.text.messages import Message, ToolCall
from glm4lite.text.template import Begun
from glm4lite_ui.chats import Attachment, Chat, Part, Turn

NOT_RUN = "Error: the call was not run"
_SAID = ("thinking", "text")


def messages(chat: Chat, until: int | None = None) -> list[Message]:
    """The system prompt and the turns shown before `until` (None: all) that were not dropped."""
    found = [Message("system", chat.settings.system)] if chat.settings.system.strip() else []
    turns, calls = chat.turns, 0
    for turn in turns[:until]:
        if turn.dropped or (turn.error and not turn.parts and turn is not turns[-1]):
            continue  # a question that failed stands on the page, and was never answered
        found.append(Message("user", question(turn)))
        for message in _answer(turn.parts, calls):
            calls += len(message.tool_calls)
            found.append(message)
    return found


def cut_answer(chat: Chat) -> tuple[list[Message], Begun]:
    """What the model reads to go on with the last turn, which is `cut`: all before its last round, and what it says."""
    *before, turn = chat.turns
    last = turn.parts[-1].round
    found = messages(chat, len(before))
    found.append(Message("user", question(turn)))
    found += _answer([part for part in turn.parts if part.round < last], sum(len(one.tool_calls) for one in found))
    said = {kind: [part.text for part in turn.parts if (part.kind, part.round) == (kind, last)] for kind in _SAID}
    return found, Begun(**{kind: "".join(texts) for kind, texts in said.items()})


def question(turn: Turn) -> str:
    """What the user typed, then each file under its name."""
    return "\n\n".join([turn.user, *map(_file, turn.files)]).strip()


def _file(file: Attachment) -> str:
    fence = "```"
    while fence in file.text:  # a file may hold fences of its own
        fence += "`"
    return f"File {file.name}:\n{fence}\n{file.text}\n{fence}"


def _answer(parts: Sequence[Part], calls_before: int) -> Iterator[Message]:
    """One assistant message per round, behind it the results of its calls. Thoughts are not read again."""
    number = calls_before
    for _, group in groupby(parts, key=lambda part: part.round):
        made = list(group)
        text = "".join(part.text for part in made if part.kind == "text")
        calls: list[tuple[ToolCall, Part]] = []
        for part in made:
            if part.kind == "call":
                number += 1
                calls.append((ToolCall(f"call_{number}", part.name, part.arguments), part))
        if text or calls:
            yield Message("assistant", text, tuple(call for call, _ in calls))
        for call, part in calls:
            result = NOT_RUN if part.seconds is None else part.text
            yield Message("tool", result, tool_call_id=call.id, name=call.name)
