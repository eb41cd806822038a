"""The text of a file a user names, whatever its encoding, and how a message quotes it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from glm4lite.base.errors import Glm4liteError, one_line
from glm4lite.base.files import open_file

MAX_BYTES = 2 << 20
"""More than the context of any model holds."""


class TextFileError(Glm4liteError):
    """A file is missing, too large, or holds no text."""


@dataclass(frozen=True)
class TextFile:
    """A file's text with lines that end in \\n; `encoding` is how the user is told it, "" for UTF-8."""

    name: str
    text: str
    encoding: str

    def quoted(self) -> str:
        """As a message shows it to a model: under its name, in a fence longer than those it holds."""
        fence = "```"
        while fence in self.text:
            fence += "`"
        return f"File {self.name}:\n{fence}\n{self.text}\n{fence}"


def read_text_file(path: Path, most: int = MAX_BYTES) -> TextFile:
    """Reads a plain file of at most `most` bytes.

    Raises:
        TextFileError: one line: it is missing, no plain file, too large, or its bytes are no text.
    """
    name = one_line(path)
    try:
        with open_file(path) as file:
            data = file.read(most + 1)
    except OSError as error:
        raise TextFileError(f"{name} cannot be read: {error.strerror or one_line(error)}") from None
    except ValueError as error:  # a name with a NUL
        raise TextFileError(f"{name} cannot be read: {one_line(error)}") from None
    if len(data) > most:
        raise TextFileError(f"{name} is larger than {most / (1 << 20):g} MiB, which no model's context takes")
    from glm4lite.text.encodings import decoded

    try:
        text, encoding = decoded(data)
    except ValueError as error:
        raise TextFileError(f"{name} cannot be used: {error}") from None
    return TextFile(path.name, text.replace("\r\n", "\n"), encoding)
