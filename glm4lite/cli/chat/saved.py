"""Conversations that `/save` keeps and `/load` brings back: one JSON file each, written whole or not at all.

    {"format": "glm4lite conversation", "version": 1, "model": "nano", "settings": {"temperature": 0.7},
     "messages": [{"role": "user", "content": "Hi"}, …]}

`messages` are OpenAI's, so that other programs can read them.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from glm4lite.base.errors import Glm4liteError, one_line, shown
from glm4lite.base.files import read_json
from glm4lite.base.user_folder import make_private, user_folder
from glm4lite.text.messages import Message

FORMAT, VERSION = "glm4lite conversation", 1
_NAME = re.compile(r"[^\W_][\w .-]{0,99}")


class SavedError(Glm4liteError):
    """A conversation cannot be saved or brought back."""


@dataclass
class Saved:
    """A conversation: the model's name, the settings that were changed, the messages with the system prompt."""

    model: str
    messages: list[Message]
    settings: dict[str, Any] = field(default_factory=dict)


def path_of(name: str) -> Path:
    """A bare name lies in the user's data folder; what holds a `/` or ends in .json is a path."""
    if "/" in name or os.sep in name or name.endswith(".json"):
        return Path(name).expanduser()
    if not _NAME.fullmatch(name) or name.endswith((".", " ")):
        raise SavedError(
            f"{shown(name)} is no name for a conversation; use letters, digits, spaces, - and _; or a path"
        )
    return folder() / f"{name}.json"


def folder() -> Path:
    return user_folder() / "conversations"


def names() -> Iterator[str]:
    """Of what lies in the user's data folder, in order."""
    try:
        yield from sorted(file.stem for file in folder().glob("*.json"))
    except (OSError, Glm4liteError):
        return


def save(path: Path, saved: Saved, overwrite: bool = False) -> None:
    """Raises SavedError where something else lies there already, or nothing can be written."""
    data = {"format": FORMAT, "version": VERSION, "model": saved.model, "settings": saved.settings}
    data["messages"] = [message.to_dict() for message in saved.messages]
    text = json.dumps(data, ensure_ascii=False, indent=1).encode("utf-8", "replace")
    if path.exists() and not overwrite:
        raise SavedError(f"{path} is there already; take another name or delete it")
    part: Path | None = None
    try:
        if path.parent == folder():
            make_private(path.parent)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", suffix=".part", delete=False) as file:
            part = Path(file.name)  # for this user alone
            file.write(text)
        part.replace(path)
    except OSError as error:
        if part is not None:
            part.unlink(missing_ok=True)
        raise SavedError(f"{path} cannot be written: {error.strerror or one_line(error)}") from None


def load(path: Path) -> Saved:
    """Raises SavedError for what is missing, or was not written by `save`."""
    if not path.exists():
        known = ", ".join(names())
        raise SavedError(f"{path} does not exist{f'; saved are: {known}' if known else ''}")
    try:
        data = read_json(path, SavedError)
    except SavedError as error:
        raise SavedError(str(error).partition(";")[0]) from None  # what follows is advice about a model's files
    if data.get("format") != FORMAT:
        raise SavedError(f"{path} is no saved conversation: its format is {shown(data.get('format'))}")
    if data.get("version") != VERSION:
        raise SavedError(f"{path} has version {shown(data.get('version'))}; this glm4lite reads {VERSION}")
    messages, settings = data.get("messages"), data.get("settings", {})
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not isinstance(settings, dict):
        raise SavedError(f"{path} holds no list of messages, or no object of settings")
    try:
        return Saved(str(data.get("model", "")), [Message.from_dict(message) for message in messages], settings)
    except Glm4liteError as error:
        raise SavedError(f"{path}: {error}") from None
