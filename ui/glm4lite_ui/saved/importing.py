"""Chats from a file: our own exports, ChatGPT's, Open WebUI's. Read apart (untrusted/archives.py), saved here.

    came = import_chats(store, path, "conversations.json")
    came.chats, came.skipped, came.left_out     # Summaries; (title, why); {"pictures and files": 3}
    came.said()                                 # [Imported 12 chats., Skipped 1: "Hi": it is here already., ...]

A chat that was imported once is known again and left as it is, whatever happened in it since.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from glm4lite.base.errors import Glm4liteError, said_by
from glm4lite.base.sentences import Sentence
from glm4lite.untrusted.apart import Limits, UnreadableError, read_apart
from glm4lite_ui.chats import Chat, read_chat
from glm4lite_ui.saved.store import ChatStore

LARGEST = 256 << 20  # bytes of a file
MOST_CHATS = 20_000
_LIMITS = Limits(seconds=300, memory=2 << 30, line=64 << 20)


@dataclass
class Imported:
    """`chats` holds ids, `skipped` titles with the reason, `failure` why the file was not read to its end."""

    chats: list[str] = field(default_factory=list)
    skipped: list[tuple[str, Sentence]] = field(default_factory=list)
    left_out: dict[str, int] = field(default_factory=dict)
    failure: Sentence | None = None

    def said(self) -> list[Sentence]:
        """What the user is told, a sentence each."""
        said = [
            Sentence("Imported 1 chat.")
            if len(self.chats) == 1
            else Sentence("Imported {count} chats.", count=len(self.chats))
        ]
        if self.skipped:
            (title, why), more = self.skipped[0], len(self.skipped) - 1
            one = Sentence('Skipped 1: "{title}": {why}.', title=title, why=why)
            all_of_them = {"count": more + 1, "title": title, "why": why, "more": more}
            said.append(Sentence('Skipped {count}: "{title}": {why}, and {more} more.', **all_of_them) if more else one)
        left_out = [
            Sentence("{what} ({count})", what=Sentence(what), count=n) for what, n in self.left_out.items() if n
        ]
        if left_out:
            said.append(Sentence("Left out: {things}.", things=left_out))
        return [*said, *([Sentence("Then: {why}.", why=self.failure)] if self.failure else [])]


def import_chats(store: ChatStore, path: Path, name: str) -> Imported:
    """Saves every chat of the file `name`, which lies at `path`, that is not here yet.

    Raises:
        Glm4liteError: not one chat could be read; one line that begins with the file's name.
    """
    came = Imported()
    try:
        if path.stat().st_size > LARGEST:
            raise UnreadableError("it is larger than {size} MiB", size=LARGEST >> 20)
        for said in read_apart("glm4lite_ui.untrusted.archives:read_chats", path, _LIMITS):
            came.left_out |= said.get("left_out", {})
            if "skipped" in said:
                came.skipped.append((str(said["skipped"]), Sentence.from_json(said["why"])))
            elif "chat" in said:
                _take(store, read_chat(said["chat"]), came)
            if len(came.chats) + len(came.skipped) > MOST_CHATS:
                raise UnreadableError("more than {count} chats are not imported at once", count=MOST_CHATS)
    except (Glm4liteError, OSError, ValueError) as error:
        if not came.chats and not came.skipped:
            raise Glm4liteError("{name} cannot be imported: {why}", name=name, why=said_by(error)) from None
        came.failure = said_by(error)
    return came


def _take(store: ChatStore, chat: Chat, came: Imported) -> None:
    if store.holds(chat.id):
        came.skipped.append((chat.title, Sentence("it is here already")))
    else:
        store.save(chat, said=False)
        came.chats.append(chat.id)
