"""Saved chats: one JSON file each in the user's data folder, written whole or not at all."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from glm4lite.errors import one_line
from glm4lite_ui.chats import Chat, ChatError, read_chat

logger = logging.getLogger("glm4lite")

LARGEST = 64 << 20  # bytes of a chat's file; the longest context is a hundredth of it
_ID = re.compile(r"[0-9a-f]{16}")
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
        self.listeners: list[Callable[[str], None]] = []  # each is told the id of a chat that was saved or deleted
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
        self._changed(chat.id)

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
        self._changed(chat_id)

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

    def _changed(self, chat_id: str) -> None:
        for tell in self.listeners:
            tell(chat_id)

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


def _text(chat: Chat) -> str:
    pieces = [chat.title]
    for turn in chat.tree:
        pieces += [turn.user, *(part.text for part in turn.parts if part.kind == "text")]
    return "\n".join(pieces).casefold()
