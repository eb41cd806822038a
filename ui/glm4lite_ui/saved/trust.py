"""What the user said about asking before a tool runs, for all chats: by tool, or for all tools of an MCP server.

A word holds for what it was said of: a server that is started otherwise, or a function of another file, is another one,
whatever it is called (`of`). A file that cannot be read allows nothing.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter

from glm4lite.base.errors import Glm4liteError
from glm4lite_ui.saved.kept import keep, read_kept

logger = logging.getLogger("glm4lite")
Word = Literal["ask", "allow", ""]  # the last: as the tool's own rule, or its server's, says


@dataclass(frozen=True)
class _Said:
    word: Word
    of: str


@dataclass
class _Trusted:
    """The content of trust.json: by a tool's full name, or a server's origin."""

    said: dict[str, _Said] = field(default_factory=dict)


_TRUSTED = TypeAdapter(_Trusted)


class Trust:
    """Read anew whenever it is asked, so that a word that was taken back holds at once, in every program."""

    def __init__(self, path: Path) -> None:
        self.path, self._lock = path, threading.Lock()

    def word(self, name: str, of: str) -> Word:
        """What was said about this tool or server; "" where nothing was."""
        said = self._read().said.get(name)
        return said.word if said is not None and said.of == of else ""

    def say(self, name: str, of: str, word: Word) -> None:
        """Keeps it; "" takes back what was said. Raises Glm4liteError where it cannot be kept."""
        with self._lock:
            said = {other: kept for other, kept in self._read(strict=True).said.items() if other != name}
            self._write(said | ({name: _Said(word, of)} if word else {}))

    def forget(self, origin: str) -> None:
        """All that was said of a server and its tools."""
        with self._lock:
            said = self._read(strict=True).said
            left = {name: kept for name, kept in said.items() if name != origin and not name.endswith(f" ({origin})")}
            if left != said:
                self._write(left)

    def _write(self, said: dict[str, _Said]) -> None:
        keep(self.path, replace(_Trusted(), said=said))

    def _read(self, strict: bool = False) -> _Trusted:
        try:
            return read_kept(self.path, _TRUSTED)
        except FileNotFoundError:
            return _Trusted()
        except ValueError as error:
            problem = f"{self.path} cannot be read ({error}); move it away"
            if strict:
                raise Glm4liteError(problem) from None
            logger.warning("%s", problem)
            return _Trusted(said={})
