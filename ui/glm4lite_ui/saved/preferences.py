"""What the user chose for all chats, and what is typed but not sent: beside the chats, in their folder.

    preferences = Preferences(store.folder)
    preferences.use_for_new_chats(chat.settings)     # what a new chat starts with
    preferences.keep_preset("Translator", chat.settings)
    chat.settings = replace(preferences.presets["Translator"], always=chat.settings.always)
    drafts = Drafts(store.folder)
    drafts.keep(chat_id, Draft("half a question"))   # nothing in it: it is removed
    drafts.of(chat_id).text

What was allowed for good in a chat stays with that chat: no preset and no new chat takes it along.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from pydantic import TypeAdapter

from glm4lite.base.errors import Glm4liteError
from glm4lite_ui.chats import Settings
from glm4lite_ui.saved.kept import keep, read_kept

logger = logging.getLogger("glm4lite")

MOST_PRESETS = 200
LONGEST_NAME = 60
LONGEST_DRAFT = 1_000_000  # characters
_KEPT_S = 90 * 86400.0  # a draft of a chat that was never begun
_DRAFT_FILE = re.compile(r"[0-9a-f]{16}\.draft")


@dataclass
class _Chosen:
    """The content of preferences.json."""

    new_chats: Settings = field(default_factory=Settings)
    presets: dict[str, Settings] = field(default_factory=dict)


@dataclass
class Draft:
    """`settings` are those of a chat that has no message yet, and so is not saved."""

    text: str = ""
    settings: Settings | None = None


class Preferences:
    """The settings of new chats, and named ones. Any window may change them; each change is on the disk at once."""

    def __init__(self, folder: Path) -> None:
        self._path, self._lock = folder / "kept" / "preferences.json", threading.Lock()

    @property
    def new_chat(self) -> Settings:
        """What a new chat starts with."""
        return self._read().new_chats

    @property
    def presets(self) -> dict[str, Settings]:
        """By name, in alphabetical order: system prompt, sampling, tools."""
        return dict(sorted(self._read().presets.items(), key=lambda item: item[0].casefold()))

    def use_for_new_chats(self, settings: Settings) -> None:
        """New chats start with these from now on; Settings() is the model's own again."""
        with self._lock:
            self._write(replace(self._read(strict=True), new_chats=_without_permissions(settings)))

    def keep_preset(self, name: str, settings: Settings) -> None:
        """Keeps it under this name, in place of one that has it. Glm4liteError for a name that cannot be shown."""
        name = " ".join(name.split())
        if not name or len(name) > LONGEST_NAME:
            raise Glm4liteError(f"a preset needs a name of at most {LONGEST_NAME} characters")
        with self._lock:
            chosen = self._read(strict=True)
            if len(chosen.presets) >= MOST_PRESETS and name not in chosen.presets:
                raise Glm4liteError(f"there are {MOST_PRESETS} presets already; delete one")
            self._write(replace(chosen, presets=chosen.presets | {name: _without_permissions(settings)}))

    def delete_preset(self, name: str) -> None:
        with self._lock:
            chosen = self._read(strict=True)
            kept = {other: settings for other, settings in chosen.presets.items() if other != name}
            self._write(replace(chosen, presets=kept))

    def _read(self, strict: bool = False) -> _Chosen:
        """What is kept; nothing where the file is damaged, which `strict` makes an error: it would be written over."""
        try:
            return read_kept(self._path, _CHOSEN)
        except FileNotFoundError:
            return _Chosen()
        except ValueError as error:
            said = f"{self._path} cannot be read ({error}); move it away"
            if strict:
                raise Glm4liteError(said) from None
            logger.warning("%s", said)
            return _Chosen()

    def _write(self, chosen: _Chosen) -> None:
        keep(self._path, chosen)


class Drafts:
    """What was typed in each chat and not sent."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "kept"
        for file in self._folder.glob("*.draft"):
            if file.stat().st_mtime < time.time() - _KEPT_S:
                file.unlink(missing_ok=True)

    def of(self, chat_id: str) -> Draft:
        """An empty one where there is none, or none that can be read."""
        path = self._folder / f"{chat_id}.draft"
        try:
            return read_kept(path, _DRAFT) if _DRAFT_FILE.fullmatch(path.name) else Draft()
        except FileNotFoundError:
            return Draft()
        except ValueError as error:
            logger.warning("%s cannot be read (%s)", path, error)
            return Draft()

    def keep(self, chat_id: str, draft: Draft) -> None:
        """Glm4liteError for a text that is too long to be kept, or where the chat's id is none."""
        path = self._folder / f"{chat_id}.draft"
        if not _DRAFT_FILE.fullmatch(path.name):
            raise Glm4liteError("this is not the name of a chat")
        if len(draft.text) > LONGEST_DRAFT:
            raise Glm4liteError(f"a text of more than {LONGEST_DRAFT:,} characters is not kept before it is sent")
        if draft == Draft():
            path.unlink(missing_ok=True)
        else:
            keep(path, draft)


_CHOSEN, _DRAFT = TypeAdapter(_Chosen), TypeAdapter(Draft)


def _without_permissions(settings: Settings) -> Settings:
    copied = TypeAdapter(Settings).validate_python(asdict(settings))
    return replace(copied, always=[])
