"""Saved chats: one JSON file each in the user's data folder, written whole or not at all.

A chat is a list of turns; a turn is what the user said and the parts of the answer in their order. Everything else is
derived from it: what the model reads (history.py), what the page shows (render.py), what is exported (export.py).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import secrets
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from glm4lite.errors import Glm4liteError, one_line

logger = logging.getLogger("glm4lite")

TITLE_CHARACTERS = 60
NEW_TITLE = "New chat"
LARGEST = 64 << 20  # bytes of a chat's file; the longest context is a hundredth of it
_ID = re.compile(r"[0-9a-f]{16}")
# What the page can show: a number JSON has (no NaN), a time that a calendar has, an integer that JavaScript has.
_Number = Annotated[float, Field(allow_inf_nan=False)]
_Time = Annotated[float, Field(ge=0, le=32503680000, allow_inf_nan=False)]
_Integer = Annotated[int, Field(ge=-(2**53), le=2**53)]


class ChatError(Glm4liteError):
    """A saved chat cannot be read, found or written."""


@dataclass
class Part:
    """A piece of an answer. `text` is the thought, the text, or the call's result; `seconds` None: still under way.

    `round` counts the generations of the turn: calls of one round were made at once.
    """

    kind: Literal["thinking", "text", "call"]
    round: _Integer = 0
    text: str = ""
    name: str = ""
    arguments: str = ""  # JSON as the model wrote it
    error: bool = False
    seconds: _Number | None = None


@dataclass
class Attachment:
    """A text file sent with a message."""

    name: str
    text: str
    tokens: _Integer


@dataclass
class Counts:
    """A turn's Done event."""

    prompt_tokens: _Integer
    new_tokens: _Integer
    finish_reason: str
    tokens_per_s: _Number
    prefilled_tokens: _Integer


@dataclass
class Turn:
    """A question and its answer, or in `error` what went wrong instead.

    A `dropped` turn is shown, but the model no longer reads it.
    """

    user: str
    files: list[Attachment] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)
    counts: Counts | None = None
    error: str | None = None
    dropped: bool = False


@dataclass
class Settings:
    """Of one chat; None is the checkpoint's own value. `tools` None: all that are on by default."""

    system: str = ""
    temperature: _Number | None = None
    top_p: _Number | None = None
    max_new_tokens: _Integer = 1024
    seed: _Integer | None = None
    tools: list[str] | None = None
    always: list[str] = field(default_factory=list)  # full names of tools that need no more asking in this chat


@dataclass
class Chat:
    """A conversation as it is saved. Times are seconds since 1970."""

    id: str = field(default_factory=lambda: secrets.token_hex(8))
    title: str = NEW_TITLE
    created: _Time = field(default_factory=time.time)
    updated: _Time = field(default_factory=time.time)
    settings: Settings = field(default_factory=Settings)
    turns: list[Turn] = field(default_factory=list)

    def name_after_first_turn(self) -> None:
        """A chat nobody named is called what was asked first."""
        if self.title == NEW_TITLE and self.turns:
            words = " ".join(self.turns[0].user.split()) or NEW_TITLE
            self.title = words if len(words) <= TITLE_CHARACTERS else words[: TITLE_CHARACTERS - 1] + "…"

    def state(self) -> str:
        """Another text for other turns: what a window shows is compared by it with what there is."""
        turns = json.dumps([asdict(turn) for turn in self.turns])
        return hashlib.sha256(turns.encode()).hexdigest()[:16]

    def to_json(self) -> dict[str, Any]:
        return {"format": 1, **asdict(self)}


_CHAT = TypeAdapter(Chat)
_STALE_S = 3600.0  # a chat is saved in a moment
_ELSEWHERE = "name another folder with --chats or GLM4LITE_CHATS"


def data_folder() -> Path:
    """GLM4LITE_CHATS, or the place where this system keeps a program's data; ChatError where it knows none."""
    if chosen := os.environ.get("GLM4LITE_CHATS"):
        return Path(chosen)
    try:
        home = Path.home()
    except RuntimeError:
        raise ChatError(f"this user has no home folder; {_ELSEWHERE}") from None
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA", home / "AppData" / "Local"))
    elif sys.platform == "darwin":
        base = home / "Library" / "Application Support"
    else:
        base = Path(os.environ.get("XDG_DATA_HOME") or home / ".local" / "share")
    return base / "glm4lite" / "chats"


class ChatStore:
    """The saved chats of a folder. Ids are random, so a name from outside never becomes a path."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or data_folder()
        self._damaged = set[str]()
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            with tempfile.TemporaryFile(dir=self.folder):  # a folder that was there may be read-only
                pass
            for part in self.folder.glob("*.part"):  # half of a chat, left by a run that was killed while it saved
                if part.stat().st_mtime < time.time() - _STALE_S:
                    part.unlink(missing_ok=True)
        except OSError as error:
            raise ChatError(f"{self.folder}: chats cannot be kept here: {error.strerror}; {_ELSEWHERE}") from None

    def save(self, chat: Chat) -> None:
        """Writes beside the file, to the disk, and renames: a crash leaves the old chat or the new one."""
        chat.updated = time.time()
        text = json.dumps(chat.to_json(), ensure_ascii=False, indent=1).encode("utf-8", "replace")
        path, part = self._path(chat.id), None
        try:
            with tempfile.NamedTemporaryFile(dir=self.folder, suffix=".part", delete=False) as file:
                part = Path(file.name)
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        except OSError as error:
            if part is not None:
                part.unlink(missing_ok=True)
            raise ChatError(f"{self.folder}: the chat could not be saved: {error.strerror}") from error

    def load(self, chat_id: str) -> Chat:
        """Raises ChatError for a chat that is not there or whose file was damaged."""
        path = self._path(chat_id)
        try:
            return read_chat(_json(path), path.stem)
        except FileNotFoundError:
            raise ChatError("this chat is not there any more") from None
        except (OSError, ValueError, RecursionError) as error:
            raise ChatError(f"{path}: this chat cannot be read: {str(error).splitlines()[0]}") from error

    def holds(self, chat_id: str) -> bool:
        """Whether a chat is saved under this id, whatever is given as one."""
        return bool(_ID.fullmatch(chat_id)) and self._path(chat_id).exists()

    def delete(self, chat_id: str) -> None:
        self._path(chat_id).unlink(missing_ok=True)

    def find(self, query: str = "") -> list[Chat]:
        """Newest first; with a query those that contain all its words. Damaged files are left out, and logged once."""
        words, found = query.casefold().split(), []
        for path in self.folder.glob("*.json"):
            try:
                chat = self.load(path.stem)
            except ChatError as error:
                if path.name not in self._damaged:
                    logger.warning("%s", error)
                self._damaged.add(path.name)
                continue
            if not words or all(word in _text(chat) for word in words):
                found.append(chat)
        return sorted(found, key=lambda chat: chat.updated, reverse=True)

    def _path(self, chat_id: str) -> Path:
        if not _ID.fullmatch(chat_id):
            raise ChatError(f"{one_line(chat_id)[:100]} is not the name of a chat")
        return self.folder / f"{chat_id}.json"


def _json(path: Path) -> Any:
    """Of a plain file (a pipe would wait for ever); ValueError for what is none that a page could be sent."""
    if not path.exists():
        raise FileNotFoundError
    if not path.is_file() or path.stat().st_size > LARGEST:
        raise ValueError(f"it is no file of at most {LARGEST >> 20} MiB")
    data = json.loads(path.read_bytes())
    json.dumps(data, ensure_ascii=False).encode()  # refuses half a sign
    return data


def read_chat(data: Mapping[str, Any], chat_id: str | None = None) -> Chat:
    """A chat from `to_json()`'s form; ValueError names what cannot be read."""
    if not isinstance(data, Mapping) or data.get("format") != 1:
        raise ValueError("format must be 1")
    fields = {name: value for name, value in data.items() if name != "format"}
    try:
        chat: Chat = _CHAT.validate_python(fields | ({"id": chat_id} if chat_id else {}))
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        raise ValueError(f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}") from None
    return chat


def _text(chat: Chat) -> str:
    pieces = [chat.title]
    for turn in chat.turns:
        pieces += [turn.user, *(part.text for part in turn.parts if part.kind == "text")]
    return "\n".join(pieces).casefold()
