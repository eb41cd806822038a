"""What was typed before, kept in a file of the user's data folder: for this user alone, and bounded.

It holds what was typed at the prompt and nothing else: no answers, no tools' arguments or results, no pasted documents
(long entries are left out), nothing that begins with a space.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

from prompt_toolkit.history import FileHistory

from glm4lite.base.user_folder import make_private

MOST_BYTES = 1 << 20
LONGEST = 8 << 10  # bytes of an entry


class PrivateHistory(FileHistory):
    """prompt_toolkit's file format, so that an entry of several lines stays one."""

    def __init__(self, file: Path) -> None:
        """Makes the file, and shortens one that has grown beyond MOST_BYTES to its newer half. Raises OSError."""
        make_private(file.parent)
        with open(file, "ab", opener=_private) as opened:
            if hasattr(os, "fchmod"):
                os.fchmod(opened.fileno(), 0o600)  # one that was there may be open to others
            size = opened.tell()
        if size > MOST_BYTES:
            _shorten(file)
        super().__init__(str(file))

    def store_string(self, string: str) -> None:
        """A disk that is full costs the entry, not the chat."""
        if string.startswith(" ") or len(string.encode("utf-8", "replace")) > LONGEST:
            return
        try:
            super().store_string(string.encode("utf-8", "replace").decode())
        except OSError:
            return

    def load_history_strings(self) -> Iterable[str]:
        """Newest first; none where the file cannot be read any more."""
        try:
            return list(super().load_history_strings())
        except OSError:
            return []


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _shorten(file: Path) -> None:
    """Entries begin with an empty line and a comment."""
    data = file.read_bytes()[-MOST_BYTES // 2 :]
    kept = data[max(data.find(b"\n# "), 0) :]
    with tempfile.NamedTemporaryFile(dir=file.parent, prefix="history-", delete=False) as part:
        part.write(kept)
    os.replace(part.name, file)
