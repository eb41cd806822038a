"""Conversations that `/save` keeps and `/load` brings back: one JSON file each, where the page keeps its chats too.

    {"format": 2, "id": "8f3a…", "title": "Trip", "created": 1.8e9, "updated": 1.8e9, "model": "nano",
     "settings": {"system": "", "temperature": 0.7}, "messages": [{"role": "user", "content": "Hi"}, …],
     "cut": {"text": "Hel", "thinking": ""}}

`messages` are OpenAI's, so that other programs can read them, too. The page keeps more beside them, such as versions of
an answer: all of that stays in a file that is written again, and what is new comes to it when the page reads the file.
`cut` is there where the last answer ended in the middle, and can go on.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import secrets
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from glm4lite.base.errors import Glm4liteError, one_line, shown
from glm4lite.base.files import read_json
from glm4lite.base.user_folder import chats_folder, make_private, user_folder
from glm4lite.base.whole_file import write_whole
from glm4lite.cli.chat.settings import SAMPLING
from glm4lite.text.messages import Message
from glm4lite.text.template import Begun

FORMAT = 2
_OLDER_FORMAT = "glm4lite conversation"
LONGEST_TITLE = 120
MOST_LISTED = 30
_ID = re.compile(r"[0-9a-f]{16}")


class SavedError(Glm4liteError):
    """A conversation cannot be saved or brought back."""


@dataclass
class Saved:
    """A conversation: the messages with the system prompt, the sampling that was chosen, the model's name.

    `cut` is what was said of the last answer, where it ended in the middle.

    `in_our_form`: whether its file may be written again; that of another program holds what would be lost.
    """

    messages: list[Message]
    settings: dict[str, Any] = field(default_factory=dict)
    model: str = ""
    title: str = ""
    in_our_form: bool = True
    cut: Begun | None = None


def titles() -> list[str]:
    """Of the kept conversations, the newest first."""
    return [title for title, _ in _kept()]


def listed() -> str:
    """The newest titles, a line each."""
    known = titles()
    more = [f"(and {len(known) - MOST_LISTED} more)"] if len(known) > MOST_LISTED else []
    return "\n".join(known[:MOST_LISTED] + more)


def find(name: str) -> Path:
    """The file of this title, the newest where several have it; else the path that the name is. SavedError."""
    found = next((path for title, path in _kept() if title == name), None)
    if found is None and not is_path(name):
        raise SavedError(f"{shown(name)} is not saved; /load alone lists what is")
    return found or Path(name).expanduser()


def place_for(name: str, own: Path | None) -> Path:
    """Where to keep a conversation under this name; `own` is where it lies. SavedError where another has the name."""
    if is_path(name):
        return Path(name).expanduser()
    if not name.isprintable() or len(name) > LONGEST_TITLE or not any(map(str.isalnum, name)):
        raise SavedError(
            f"{shown(name)} is no name for a conversation; use a line of at most {LONGEST_TITLE} characters, or a path"
        )
    taken = next((path for title, path in _kept() if title == name), None)
    if taken is not None and taken != own:
        raise SavedError(f"another conversation is called {name}; take another name")
    return taken or chats_folder() / f"{secrets.token_hex(8)}.json"


def is_path(name: str) -> bool:
    """Whether a name is that of a file, which is kept where the user says."""
    return "/" in name or os.sep in name or name.endswith(".json")


def save(path: Path, saved: Saved, overwrite: bool = False) -> str:
    """Returns the title it has. Raises SavedError where something else lies there, or nothing can be written."""
    if path.exists() and not overwrite:
        raise SavedError(f"{path} is there already; take another name or delete it")
    now = time.time()
    chat_id = path.stem if _ID.fullmatch(path.stem) else secrets.token_hex(8)
    data: dict[str, Any] = {"format": FORMAT, "id": chat_id, "title": saved.title or path.stem, "created": now}
    data |= read_json(path, SavedError) if path.exists() else {}
    system = next((message.content for message in saved.messages if message.role == "system"), "")
    settings: Any = data.get("settings")
    chosen = {name: saved.settings.get(name) for name in SAMPLING} | {"system": system}
    chosen = settings | chosen if isinstance(settings, dict) else chosen
    data |= {"updated": now, "model": saved.model, "settings": chosen}
    data["messages"] = [message.to_dict() for message in saved.messages]
    data["cut"] = asdict(saved.cut) if saved.cut else None
    text = json.dumps(data, ensure_ascii=False, indent=1).encode("utf-8", "replace")
    try:
        if path.parent == chats_folder():
            make_private(path.parent)
        write_whole(path, text, private=True)
    except OSError as error:
        raise SavedError(f"{path} cannot be written: {error.strerror or one_line(error)}") from None
    return _title(data)


def load(path: Path) -> Saved:
    """What the terminal or the page saved or exported. Raises SavedError for what is missing, or holds no messages."""
    if not path.exists():
        raise SavedError(f"{path} does not exist")
    try:
        data = read_json(path, SavedError)
    except SavedError as error:
        raise SavedError(str(error).partition(";")[0]) from None  # what follows is advice about a model's files
    messages, settings = data.get("messages"), data.get("settings", {})
    if not isinstance(messages, list) or not isinstance(settings, dict):
        raise SavedError(f"{path} holds no list of messages, or no object of settings")
    known = {name: settings[name] for name in SAMPLING if settings.get(name) is not None}
    try:
        said = [Message.from_dict(message) for message in messages]
    except Glm4liteError as error:
        raise SavedError(f"{path}: {error}") from None
    in_our_form = isinstance(data.get("format"), int)
    cut = Begun.of(data.get("cut"), said)
    return Saved(said, known, str(data.get("model", "")), _title(data) or path.stem, in_our_form, cut)


def take_over_older() -> None:
    """Moves what `/save` of an older glm4lite kept elsewhere, a file a title, to where conversations are kept now."""
    for path in (user_folder() / "conversations").glob("*.json"):
        try:
            found, data, when = load(path), read_json(path, SavedError), path.stat().st_mtime
        except (SavedError, OSError):
            continue
        if data.get("format") != _OLDER_FORMAT:
            continue
        # The same name in whichever program is the first to move it.
        place = chats_folder() / f"{hashlib.sha256(path.name.encode()).hexdigest()[:16]}.json"
        system = next((message.content for message in found.messages if message.role == "system"), "")
        kept = {"format": FORMAT, "id": place.stem, "title": path.stem, "created": when, "updated": when}
        kept |= {"model": found.model, "settings": found.settings | {"system": system}, "messages": data["messages"]}
        with suppress(OSError):
            make_private(place.parent)
            write_whole(place, json.dumps(kept, ensure_ascii=False, indent=1).encode("utf-8", "replace"), private=True)
            path.unlink()


def _kept() -> list[tuple[str, Path]]:
    """(title, file) of what lies where chats are kept, the newest first; files that cannot be read are left out."""
    found = list[tuple[float, str, Path]]()
    try:
        take_over_older()
        paths = [path for path in chats_folder().glob("*.json") if _ID.fullmatch(path.stem)]
    except (OSError, Glm4liteError):
        return []
    for path in paths:
        with suppress(OSError):
            status = path.stat()
            if head := _head(path, status.st_mtime_ns, status.st_size):
                found.append((*head, path))
    return [(title, path) for _, title, path in sorted(found, reverse=True)]


@functools.lru_cache(4096)
def _head(path: Path, time_ns: int, size: int) -> tuple[float, str] | None:
    """The time and the title in a file as it is now, None where it has none; read once, not at each key."""
    try:
        data = read_json(path, SavedError)
    except SavedError:
        return None
    updated, title = data.get("updated"), _title(data)
    if not isinstance(updated, int | float) or not isinstance(data.get("messages"), list) or not title:
        return None
    return float(updated), title


def _title(data: dict[str, Any]) -> str:
    title = data.get("title")
    return one_line(title) if isinstance(title, str) else ""
