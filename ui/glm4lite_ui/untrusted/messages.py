"""Messages as other programs keep them, and the tree of turns that they make.

A message names the one before it, and only these names are followed, from the first messages on: so a circle is never
entered. A turn is a user's message with what was answered until the next one. Where an answer was made again, or a
question changed, there are several ways from the first message on, and each becomes a version.
"""

from __future__ import annotations

import html
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from glm4lite.base.errors import Glm4liteError
from glm4lite_ui.chats import Chat, Part, Turn

MOST_TURNS = 20_000  # of a chat
_FOLDED = re.compile(r'<details type="(reasoning|tool_calls|code_interpreter)"[^<>]*>\s*(?:<summary>[^<]*</summary>)?')
_CITED = re.compile("\ue200[^\ue201]*\ue201")  # where ChatGPT's page draws a link to a source
_SUMMARIES = ("reasoning_recap", "system_error")  # of ChatGPT, of what is there anyway


class Skipped(Glm4liteError):
    """Why one chat is not taken."""


@dataclass
class Node:
    """A message as other programs keep it. `role` "" is a place without a message."""

    id: str
    parent: str | None
    role: str = ""
    parts: list[Part] = field(default_factory=list)


@dataclass
class Source:
    """One chat of another program."""

    nodes: list[Node]
    current: str | None = None  # the last message of the way that was shown
    system: str = ""


def from_chatgpt(item: dict[str, Any], left_out: Counter[str]) -> Source:
    nodes = list[Node]()
    for name, node in item["mapping"].items():
        message = object_of(node, "message")
        metadata = object_of(message, "metadata")
        parent = node.get("parent") if isinstance(node, dict) else None
        made = Node(name, parent if isinstance(parent, str) else None)
        if message and metadata.get("is_visually_hidden_from_conversation") is not True:
            _fill_from_chatgpt(made, message, left_out)
        nodes.append(made)
    return Source(_in_order(nodes, item["mapping"], "children"), text_of(item, "current_node") or None)


def _fill_from_chatgpt(node: Node, message: dict[str, Any], left_out: Counter[str]) -> None:
    role, content = text_of(object_of(message, "author"), "role"), object_of(message, "content")
    kind, parts = text_of(content, "content_type"), content.get("parts")
    said = [part for part in parts if isinstance(part, str)] if isinstance(parts, list) else []
    said += [text_of(content, "text")] if isinstance(content.get("text"), str) else []
    left_out["pictures and files"] += sum(isinstance(part, dict) for part in parts) if isinstance(parts, list) else 0
    text = _CITED.sub("", "\n\n".join(part for part in said if part))
    if kind == "thoughts" and isinstance(thoughts := content.get("thoughts"), list):
        text = "\n\n".join(text_of(thought, "content") for thought in thoughts)
    left_out["custom instructions"] += kind in ("user_editable_context", "model_editable_context")
    if role == "system" or kind in _SUMMARIES or not text.strip():
        return
    if role == "tool" or (role == "assistant" and text_of(message, "recipient") not in ("", "all")):
        left_out["calls of tools"] += role == "tool"
        return
    if role in ("user", "assistant"):
        node.role = role
        node.parts = [Part("thinking" if kind == "thoughts" else "text", 0, text, seconds=0.0)]


def from_open_webui(inner: dict[str, Any], messages: dict[str, Any], left_out: Counter[str]) -> Source:
    nodes = list[Node]()
    for name, message in messages.items():
        if isinstance(message, dict):
            parent = message.get("parentId")
            nodes.append(Node(name, parent if isinstance(parent, str) else None, *_said(message, left_out)))
    nodes = _in_order(nodes, messages, "childrenIds")
    system = text_of(object_of(inner, "params"), "system") or text_of(inner, "system")
    return Source(nodes, text_of(object_of(inner, "history"), "currentId") or None, system)


def from_list(messages: list[Any], left_out: Counter[str]) -> Source:
    source, last = Source([]), None
    for place, message in enumerate(messages):
        if isinstance(message, dict) and message.get("role") == "system":
            source.system = source.system or _said_text(message, left_out)
        elif isinstance(message, dict):
            source.nodes.append(Node(str(place), last, *_said(message, left_out)))
            last = str(place)
    return source


def _said(message: dict[str, Any], left_out: Counter[str]) -> tuple[str, list[Part]]:
    """Role and parts of a message in OpenAI's form; Open WebUI folds thoughts into it as HTML."""
    role, text = text_of(message, "role"), _said_text(message, left_out)
    left_out["pictures and files"] += len(files) if isinstance(files := message.get("files"), list) else 0
    if role not in ("user", "assistant"):
        left_out["calls of tools"] += role == "tool"
        return "", []
    if role == "user":
        return role, [Part("text", 0, text, seconds=0.0)]
    return role, [part for part in _unfolded(text, left_out) if part.text.strip()]


def _unfolded(text: str, left_out: Counter[str]) -> Iterator[Part]:
    """Open WebUI's answer without its HTML: thoughts, quoted there line by line, and text."""
    place = 0
    while (found := _FOLDED.search(text, place)) and (end := text.find("</details>", found.end())) >= 0:
        yield Part("text", 0, text[place : found.start()], seconds=0.0)
        folded, place = text[found.end() : end], end + len("</details>")
        folded = html.unescape(folded) if folded.lstrip().startswith("&gt;") else folded
        if found[1] == "reasoning":
            yield Part("thinking", 0, re.sub(r"(?m)^[ \t]*> ?", "", folded).strip(), seconds=0.0)
        else:
            left_out["calls of tools"] += 1
    yield Part("text", 0, text[place:].strip() if place else text, seconds=0.0)


def _said_text(message: dict[str, Any], left_out: Counter[str]) -> str:
    content = message.get("content")
    if not isinstance(content, list):
        return content if isinstance(content, str) else ""
    left_out["pictures and files"] += sum(text_of(part, "type") not in ("text", "") for part in content)
    return "\n\n".join(text for part in content if (text := text_of(part, "text")))


def _in_order(nodes: list[Node], messages: dict[str, Any], children: str) -> list[Node]:
    """In the order in which each message lists those that answer it, where it does."""
    ranks = dict[str, int]()
    for message in messages.values():
        if isinstance(message, dict) and isinstance(listed := message.get(children), list):
            ranks |= {name: rank for rank, name in enumerate(listed) if isinstance(name, str)}
    return sorted(nodes, key=lambda node: ranks.get(node.id, len(nodes)))


def put_turns(chat: Chat, source: Source, left_out: Counter[str]) -> None:
    """Makes the chat's tree: from each user's message on, each way of answers to the next ones, or to an end."""
    following, ids = defaultdict[str | None, list[Node]](list), {node.id for node in source.nodes}
    for node in source.nodes:
        following[node.parent if node.parent in ids else None].append(node)
    ends = dict[str, Turn]()  # the turn that ends with a message
    waiting: list[tuple[Node, str, Turn | None, list[Part]]]
    waiting = [(node, "", None, []) for node in reversed(following[None])]
    reached = 0
    while waiting:
        node, after, turn, parts = waiting.pop()
        reached += 1
        if node.role == "user":
            turn, parts = Turn("".join(part.text for part in node.parts), after=after), []
        elif turn is not None:
            parts = [*parts, *node.parts]
        behind = following[node.id]
        asked = [one for one in behind if one.role == "user"]
        if turn is not None and (asked or not behind):
            turn = Turn(turn.user, parts=_joined(parts), after=turn.after)
            chat.tree.append(turn)
            ends[node.id] = turn
            if len(chat.tree) > MOST_TURNS:
                raise Skipped("it has more than {count} turns", count=MOST_TURNS)
        last = turn.id if turn is not None and asked else after
        for one in reversed(behind):
            waiting.append((one, last if one.role == "user" else after, turn, parts))
    if reached < len(source.nodes):
        left_out["messages that follow each other in a circle"] += len(source.nodes) - reached
    if not chat.tree:
        raise Skipped("nothing was asked in it")
    _show_current(chat, source, ends)


def _joined(parts: list[Part]) -> list[Part]:
    """Neighbours of one kind are one part."""
    joined = list[Part]()
    for part in parts:
        if joined and joined[-1].kind == part.kind:
            joined[-1] = Part(part.kind, 0, f"{joined[-1].text}\n\n{part.text}", seconds=0.0)
        else:
            joined.append(part)
    return joined


def _show_current(chat: Chat, source: Source, ends: dict[str, Turn]) -> None:
    """The way that was shown there is shown here."""
    parents, at, seen = {node.id: node.parent for node in source.nodes}, source.current, set[str]()
    while at is not None and at not in ends and at not in seen:
        seen.add(at)
        at = parents.get(at)
    if at is not None and at in ends:
        chat.show(ends[at])


def object_of(value: Any, name: str) -> dict[str, Any]:
    found = value.get(name) if isinstance(value, dict) else None
    return found if isinstance(found, dict) else {}


def text_of(value: Any, name: str) -> str:
    found = value.get(name) if isinstance(value, dict) else None
    return found if isinstance(found, str) else ""
