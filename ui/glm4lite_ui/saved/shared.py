"""A chat's file: the tree of its turns, and derived from it the conversation in OpenAI's messages.

The terminal and other programs read and write the messages alone, and leave the tree as it is. So what the messages
have more than the tree comes into it when the file is read: behind the turns that are the same, or as a version beside
one that is not. What stands in the tree is never lost.

    data = to_data(chat)                          # {"format", "title", "tree", …, "messages": [{"role", "content"}, …],
                                                  # "cut": {"text", "thinking"} of a last answer that can go on}
    data["messages"].append({"role": "user", "content": "And then?"})
    from_data(data).turns[-1].user                # And then?
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from glm4lite.base.errors import Glm4liteError
from glm4lite.text.messages import Message
from glm4lite.text.template import Begun
from glm4lite_ui.chats import Chat, Part, Turn, read_chat
from glm4lite_ui.history import cut_answer, is_passed_over, messages


def to_data(chat: Chat) -> dict[str, Any]:
    """The content of the chat's file."""
    cut = asdict(cut_answer(chat)[1]) if chat.turns and chat.turns[-1].cut else None
    return chat.to_json() | {"messages": [message.to_dict() for message in messages(chat)], "cut": cut}


def from_data(data: object, chat_id: str | None = None) -> Chat:
    """The chat, with what its messages have more; ValueError names what cannot be read."""
    chat = read_chat(data, chat_id)
    if not isinstance(data, Mapping) or (said := data.get("messages")) is None:
        return chat
    if not isinstance(said, list):
        raise ValueError("messages: it is no list")
    try:
        read = [Message.from_dict(message) for message in said]
    except Glm4liteError as error:
        raise ValueError(f"messages: {error}") from None
    _take(chat, read)
    cut = Begun.of(data.get("cut"), read)
    if cut is not None and _content(messages(chat)) == _content(read):
        _mark_cut(chat.turns[-1], cut)
    return chat


def _mark_cut(turn: Turn, cut: Begun) -> None:
    """The turn's last round ended in the middle. Its thought is none of the messages."""
    if turn.counts is not None or turn.unfinished:
        return  # the page knows better
    turn.unfinished = True
    ending = bool(cut.text)  # the last part is this text
    last = turn.parts[-1].round if turn.parts else -1
    if cut.thinking:
        place = len(turn.parts) - ending
        turn.parts.insert(place, Part("thinking", last if ending else last + 1, cut.thinking, seconds=0.0))


def _take(chat: Chat, said: Sequence[Message]) -> None:
    if _content(messages(chat)) == _content(said):
        return
    following, shown = defaultdict[str, list[Turn]](list), chat.turns
    for turn in (*shown, *chat.tree):
        following[turn.after].append(turn)
    passed = {turn.id for turn in shown if is_passed_over(turn, shown[-1])}
    last, exchanges = "", _exchanges(said)
    for place, exchange in enumerate(exchanges):
        found = _same(following[last], last, exchange)
        while found is None and (over := next((turn for turn in following[last] if turn.id in passed), None)):
            last = over.id
            found = _same(following[last], last, exchange)
        if found is None:
            return _append(chat, exchanges[place:], last)
        last = found.id


def _same(turns: Sequence[Turn], after: str, exchange: Sequence[Message]) -> Turn | None:
    named = _id(after, exchange)
    return next((turn for turn in turns if turn.id == named or _content(_read(turn)) == _content(exchange)), None)


def _append(chat: Chat, exchanges: Sequence[Sequence[Message]], after: str) -> None:
    for exchange in exchanges:
        chat.tree.append(_turn(exchange, after))
        after = chat.tree[-1].id
    chat.show(chat.tree[-1])


def _exchanges(said: Sequence[Message]) -> list[list[Message]]:
    """Each question with what follows it until the next; the system prompt is none."""
    exchanges: list[list[Message]] = []
    for message in said:
        if message.role == "system":
            continue
        if message.role == "user" or not exchanges:
            exchanges.append([])
        exchanges[-1].append(message)
    return exchanges


def _read(turn: Turn) -> list[Message]:
    """What the model reads of one turn."""
    return messages(Chat.of(replace(turn)))


def _content(said: Sequence[Message]) -> list[Any]:
    """What makes messages the same: calls are counted anew in each program."""
    calls = ([[call.name, call.arguments] for call in message.tool_calls] for message in said)
    return [[message.role, message.content, made] for message, made in zip(said, calls, strict=True)]


def _id(after: str, exchange: Sequence[Message]) -> str:
    """The same at each reading, until the chat is saved with it."""
    content = json.dumps([after, _content(exchange)]).encode()
    return hashlib.sha256(content).hexdigest()[:16]


def _turn(exchange: Sequence[Message], after: str) -> Turn:
    asked = exchange[0].content if exchange[0].role == "user" else ""
    turn, waiting, number = Turn(asked, id=_id(after, exchange), after=after), dict[str, Part](), -1
    for message in exchange:
        if message.role == "assistant":
            number += 1
            turn.parts += [Part("text", number, message.content, seconds=0.0)] if message.content else []
            for call in message.tool_calls:
                part = Part("call", number, name=call.name, arguments=call.arguments)
                turn.parts.append(part)
                waiting[call.id or str(len(waiting))] = part
        elif message.role == "tool" and waiting:
            named = message.tool_call_id or ""
            part = waiting.pop(named if named in waiting else next(iter(waiting)))
            part.text, part.error, part.seconds = message.content, message.content.startswith("Error: "), 0.0
    return turn
