"""A chat as a file: Markdown for people, JSON for programs."""

from __future__ import annotations

import json
import re
import time

from glm4lite_ui.chats import Chat, Part, Turn
from glm4lite_ui.history import messages, question
from glm4lite_ui.markup import code_block

KINDS = {"md": "text/markdown", "json": "application/json"}


def as_json(chat: Chat) -> str:
    """The saved chat, and under "messages" the conversation in OpenAI's form."""
    data = chat.to_json() | {"messages": [message.to_dict() for message in messages(chat)]}
    return json.dumps(data, ensure_ascii=False, indent=2)


def as_markdown(chat: Chat) -> str:
    """Title, system prompt and turns; thoughts and tool calls are folded."""
    pieces = [f"# {chat.title}", time.strftime("%Y-%m-%d %H:%M", time.localtime(chat.created))]
    if chat.settings.system.strip():
        pieces += ["## System", chat.settings.system]
    for turn in chat.turns:
        pieces += ["## You", question(turn), "## Model", *map(_part, turn.parts), *_ending(turn)]
    return "\n\n".join(pieces) + "\n"


def _part(part: Part) -> str:
    if part.kind == "text":
        return part.text
    if part.kind == "thinking":
        return f"<details><summary>Thought</summary>\n\n{part.text}\n\n</details>"
    result = "not run" if part.seconds is None else part.text
    blocks = f"{code_block(part.arguments, 'json')}\n\n{code_block(result)}"
    return f"<details><summary>{part.name}</summary>\n\n{blocks}\n\n</details>"


def _ending(turn: Turn) -> list[str]:
    return [f"> {turn.error}"] if turn.error else []


def file_name(chat: Chat, kind: str) -> str:
    """The title in letters that every file system takes."""
    words = re.sub(r"[^\w-]+", "-", chat.title).strip("-")[:60] or "chat"
    return f"{words}.{kind}"
