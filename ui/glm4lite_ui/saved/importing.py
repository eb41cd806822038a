"""Chats from a file: our own exports, ChatGPT's, Open WebUI's. Read apart (untrusted/archives.py), saved here.

    came = import_chats(store, path, "conversations.json")
    came.chats, came.skipped, came.left_out     # Summaries; (title, why); {"pictures and files": 3}
    str(came)                                   # Imported 12 chats. Skipped 1: "Hi": it is here already. Left out: ...

A chat that was imported once is known again and left as it is, whatever happened in it since.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from glm4lite.base.errors import Glm4liteError
from glm4lite_ui.chats import Chat, read_chat
from glm4lite_ui.saved.store import ChatStore
from glm4lite_ui.untrusted.apart import Limits, UnreadableError, read_apart

LARGEST = 256 << 20  # bytes of a file
MOST_CHATS = 20_000
_LIMITS = Limits(seconds=300, memory=2 << 30, line=64 << 20)


@dataclass
class Imported:
    """`chats` holds ids, `skipped` titles with the reason, `failure` why the file was not read to its end."""

    chats: list[str] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    left_out: dict[str, int] = field(default_factory=dict)
    failure: str = ""

    def __str__(self) -> str:
        count = len(self.chats)
        said = [f"Imported {count:,} chat{'' if count == 1 else 's'}."]
        if self.skipped:
            title, why = self.skipped[0]
            more = f", and {len(self.skipped) - 1:,} more" if len(self.skipped) > 1 else ""
            said.append(f'Skipped {len(self.skipped):,}: "{title}": {why}{more}.')
        if left_out := ", ".join(f"{what} ({number:,})" for what, number in self.left_out.items() if number):
            said.append(f"Left out: {left_out}.")
        return " ".join([*said, *([f"Then: {self.failure}."] if self.failure else [])])


def import_chats(store: ChatStore, path: Path, name: str) -> Imported:
    """Saves every chat of the file `name`, which lies at `path`, that is not here yet.

    Raises:
        Glm4liteError: not one chat could be read; one line that begins with the file's name.
    """
    came = Imported()
    try:
        if path.stat().st_size > LARGEST:
            raise UnreadableError(f"it is larger than {LARGEST >> 20} MiB")
        for said in read_apart("chats", path, _LIMITS):
            came.left_out |= said.get("left_out", {})
            if "skipped" in said:
                came.skipped.append((str(said["skipped"]), str(said["why"])))
            elif "chat" in said:
                _take(store, read_chat(said["chat"]), came)
            if len(came.chats) + len(came.skipped) > MOST_CHATS:
                raise UnreadableError(f"more than {MOST_CHATS:,} chats are not imported at once")
    except (Glm4liteError, OSError, ValueError) as error:
        if not came.chats and not came.skipped:
            raise Glm4liteError(f"{name} cannot be imported: {error}") from None
        came.failure = str(error)
    return came


def _take(store: ChatStore, chat: Chat, came: Imported) -> None:
    if store.holds(chat.id):
        came.skipped.append((chat.title, "it is here already"))
    else:
        store.save(chat, said=False)
        came.chats.append(chat.id)
