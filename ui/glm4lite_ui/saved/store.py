"""The folder of saved chats: one JSON file each, written whole or not at all, and an index of them in memory.

    store = ChatStore()
    store.summaries("moon café")       # Summaries, newest first, of the chats that hold both words; "" for all
    grouped(store.summaries())         # the same for the list on the page: pinned, folders, today, 7 days, older
    chat = store.load(chat_id)
    chat.pinned, chat.folder = True, "Work"
    store.save(chat, said=False)  # its place in the list stays

The index is read from the files when the list is first asked for, and of a file again when its time or size changed:
another program may write here, too.
"""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
import threading
import time
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Literal

from glm4lite.base.errors import Glm4liteError, one_line, said_by
from glm4lite.base.sentences import Sentence
from glm4lite.base.user_folder import chats_folder
from glm4lite.base.whole_file import remove_leftovers, write_whole
from glm4lite_ui.chats import Chat, ChatError
from glm4lite_ui.saved.shared import from_data, to_data

logger = logging.getLogger("glm4lite")

LARGEST = 64 << 20  # bytes of a chat's file; the longest context is a hundredth of it
_BEFORE, _BEHIND = 24, 60  # characters around a word that was found
RESTORABLE = 10  # chats that were deleted, in memory
_ID = re.compile(r"[0-9a-f]{16}")


def data_folder() -> Path:
    """Where the terminal keeps chats too; ChatError where the system knows no place."""
    try:
        return chats_folder()
    except Glm4liteError as error:
        raise ChatError(
            "{problem}; name another folder with --chats or GLM4LITE_CHATS", problem=said_by(error)
        ) from None


@dataclass(frozen=True)
class Summary:
    """What the list shows of a chat. `turns` are those of the path shown; `found` is where a word that was searched
    stands, unless the title holds them all.
    """

    id: str
    title: str
    updated: float
    pinned: bool
    folder: str
    turns: int
    found: str = ""


@dataclass(frozen=True)
class _Entry:
    """A file as it was when it was read; no summary where it is damaged.

    `text` is what was said, `searchable` the same as a search looks through it.
    """

    seen: tuple[int, int, int]
    summary: Summary | None = None
    text: str = ""
    searchable: str = ""


class ChatStore:
    """The saved chats of a folder. Ids are random, so a name from outside never becomes a path."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or data_folder()
        self._index, self._lock = dict[str, _Entry](), threading.Lock()
        self._deleted = dict[str, bytes]()  # oldest first
        self.listeners: list[Callable[[str], None]] = []  # each is told the id of a chat that was saved or deleted
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            with tempfile.TemporaryFile(dir=self.folder):  # a folder that was there may be read-only
                pass
        except OSError as error:
            raise ChatError(
                "{folder}: chats cannot be kept here: {problem}; name another folder with --chats or GLM4LITE_CHATS",
                folder=self.folder,
                problem=error.strerror,
            ) from None
        remove_leftovers(self.folder)
        remove_leftovers(self.folder / "kept")

    def save(self, chat: Chat, said: bool = True) -> None:
        """Writes the chat; with `said` it is the newest of the list from now on. ChatError where it cannot be kept."""
        if said:
            chat.updated = time.time()
        self._write(chat)
        self._changed(chat.id)

    def take_in(self, chat: Chat) -> None:
        """Adds the turns that another program wrote to the chat's file since it was read; the path shown stays."""
        known, last = {turn.id for turn in chat.tree}, chat.turns[-1]
        with suppress(ChatError):
            chat.tree += [turn for turn in self.load(chat.id).tree if turn.id not in known]
        chat.show(last)

    def load(self, chat_id: str) -> Chat:
        """Raises ChatError for a chat that is not there or whose file was damaged."""
        return self._load(chat_id)[0]

    def _load(self, chat_id: str) -> tuple[Chat, bool]:
        """The chat, and whether its file holds its messages."""
        path = self._path(chat_id)
        try:
            data = _json(path)
            return from_data(data, path.stem), "messages" in data
        except FileNotFoundError:
            raise ChatError("this chat is not there any more") from None
        except (OSError, ValueError, RecursionError) as error:
            raise ChatError("{path}: this chat cannot be read: {why}", path=path, why=said_by(error)) from error

    def holds(self, chat_id: str) -> bool:
        """Whether a chat is saved under this id, whatever is given as one."""
        return bool(_ID.fullmatch(chat_id)) and self._path(chat_id).exists()

    def delete(self, chat_id: str) -> None:
        """The disk has it no more; until the program ends or some others were deleted, `restore` brings it back."""
        path = self._path(chat_id)
        with suppress(OSError):
            self._deleted[chat_id] = path.read_bytes()
        while len(self._deleted) > RESTORABLE:
            del self._deleted[next(iter(self._deleted))]
        path.unlink(missing_ok=True)
        self._changed(chat_id)

    def restore(self, chat_id: str) -> None:
        """Brings back a chat that was deleted; ChatError where that is too long ago."""
        if (content := self._deleted.pop(chat_id, None)) is None:
            raise ChatError("this chat is not there any more")
        write_kept(self._path(chat_id), content)
        self._changed(chat_id)

    def summaries(self, query: str = "") -> list[Summary]:
        """Newest first; with a query those that contain all its words, each in any case and as a part of a word too.

        Damaged files are left out, and logged once.
        """
        words = searched(query).split()
        with self._lock:
            self._refresh()
            found = [entry for entry in self._index.values() if _holds_all(entry, words)]
        told = [replace(one.summary, found=_surroundings(one, words)) for one in found if one.summary is not None]
        return sorted(told, key=lambda one: one.updated, reverse=True)

    def find(self, query: str = "") -> list[Chat]:
        """As `summaries`, but the chats themselves, each read from its file."""
        return list(self.every(query))

    def every(self, query: str = "") -> Iterator[Chat]:
        """As `find`, one at a time; what is deleted meanwhile is left out."""
        for summary in self.summaries(query):
            with suppress(ChatError):
                yield self.load(summary.id)

    def add_messages(self) -> None:
        """Gives the files of an older glm4lite what the terminal reads of them; with many it takes seconds."""
        for path in self.folder.glob("*.json"):
            with suppress(ChatError):
                chat, has_messages = self._load(path.stem)
                if not has_messages:
                    self._write(chat)

    def _refresh(self) -> None:
        """Reads what is new or was changed, and forgets what is gone."""
        index = dict[str, _Entry]()
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if not entry.name.endswith(".json"):
                    continue
                try:
                    status = entry.stat()
                except FileNotFoundError:
                    continue
                seen, known = (status.st_mtime_ns, status.st_size, status.st_ino), self._index.get(entry.name)
                index[entry.name] = known if known and known.seen == seen else self._read(entry.name, seen)
        self._index = index

    def _write(self, chat: Chat) -> None:
        text = json.dumps(to_data(chat), ensure_ascii=False, indent=1).encode("utf-8", "replace")
        write_kept(self._path(chat.id), text)

    def _read(self, name: str, seen: tuple[int, int, int]) -> _Entry:
        try:
            chat, _ = self._load(name.removesuffix(".json"))
        except ChatError as error:
            logger.warning("%s", error)
            return _Entry(seen)
        text, turns = _text(chat), len(chat.turns)
        summary = Summary(chat.id, chat.title, chat.updated, chat.pinned, chat.folder, turns)
        return _Entry(seen, summary, text, searched(text))

    def _changed(self, chat_id: str) -> None:
        for tell in self.listeners:
            tell(chat_id)

    def _path(self, chat_id: str) -> Path:
        if not _ID.fullmatch(chat_id):
            raise ChatError("{name} is not the name of a chat", name=one_line(chat_id, 100))
        return self.folder / f"{chat_id}.json"


_THE_CHAT = Sentence("the chat")


def write_kept(path: Path, data: bytes, what: str = _THE_CHAT) -> None:
    """A file of the user's alone, there whole or not at all; ChatError."""
    try:
        write_whole(path, data, private=True)
    except OSError as error:
        raise ChatError(
            "{folder}: {what} could not be saved: {problem}", folder=path.parent, what=what, problem=error.strerror
        ) from error


def _json(path: Path) -> Any:
    """Of a plain file (a pipe would wait for ever); ValueError for what is none that a page could be sent."""
    if not path.exists():
        raise FileNotFoundError
    if not path.is_file() or path.stat().st_size > LARGEST:
        raise ValueError(Sentence("it is no file of at most {size} MiB", size=LARGEST >> 20))
    data = json.loads(path.read_bytes())
    json.dumps(data, ensure_ascii=False).encode()  # refuses half a sign
    return data


def _text(chat: Chat) -> str:
    pieces = [chat.title]
    for turn in chat.tree:
        pieces += [turn.user, *(file.name for file in turn.files)]
        pieces += [part.text for part in turn.parts if part.kind == "text"]
    return "\n".join(pieces)


def searched(text: str) -> str:
    """The form in which texts are compared: without case, and a letter the same however its accents are encoded."""
    return text.casefold() if text.isascii() else unicodedata.normalize("NFKC", text).casefold()


def _holds_all(entry: _Entry, words: Sequence[str]) -> bool:
    return all(word in entry.searchable for word in words)


def _surroundings(entry: _Entry, words: Sequence[str]) -> str:
    """The words around the first one that the title does not hold.

    "" also where the form that is searched has another length, so that places in it are others in the text.
    """
    title = searched(entry.summary.title) if entry.summary else ""
    word = next((word for word in words if word not in title), None)
    if word is None or len(entry.text) != len(entry.searchable):
        return ""
    place = entry.searchable.index(word)
    begin, end = max(place - _BEFORE, 0), place + len(word) + _BEHIND
    more = ("…" if begin else "", "…" if end < len(entry.text) else "")
    return " ".join(entry.text[begin:end].split()).join(more)


@dataclass
class Group:
    """A part of the list: `name` is that of a folder, else empty."""

    kind: Literal["pinned", "folder", "today", "week", "older"]
    name: str = ""
    chats: list[Summary] = field(default_factory=list)


def grouped(summaries: Sequence[Summary], now: float | None = None) -> list[Group]:
    """The groups that hold any: pinned chats, folders by name, then by the user's calendar today, 7 days, older."""
    midnight = datetime.fromtimestamp(time.time() if now is None else now).replace(
        hour=0, minute=0, second=0, microsecond=0
    )
    starts = {"today": midnight.timestamp(), "week": (midnight - timedelta(days=7)).timestamp()}
    folders = sorted({one.folder for one in summaries if one.folder and not one.pinned}, key=searched)
    groups = [Group("pinned"), *(Group("folder", name) for name in folders)]
    groups += [Group("today"), Group("week"), Group("older")]
    placed = {(group.kind, group.name): group.chats for group in groups}
    for one in summaries:
        placed[_place(one, starts)].append(one)
    return [group for group in groups if group.chats]


def _place(one: Summary, starts: dict[str, float]) -> tuple[Any, str]:
    if one.pinned:
        return "pinned", ""
    if one.folder:
        return "folder", one.folder
    return next((kind for kind, start in starts.items() if one.updated >= start), "older"), ""
