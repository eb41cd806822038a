"""The text of a file a user names, whatever its encoding, and how a message quotes it."""

from __future__ import annotations

import codecs
from dataclasses import dataclass
from pathlib import Path

from glm4lite.errors import Glm4liteError, one_line
from glm4lite.weights.files import open_file

MAX_BYTES = 2 << 20
"""More than the context of any model holds."""

# Longer marks first: UTF-32's begins with UTF-16's.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


# What a file without a mark is likely to be, where it is neither UTF-8 nor Chinese; in a short text any could be any.
_OLDER = ["big5", "cp932", "euc_jp", "cp949", "cp1252", "cp1251", "koi8_r", "gb18030"]


class TextFileError(Glm4liteError):
    """A file is missing, too large, or holds no text."""


@dataclass(frozen=True)
class TextFile:
    """A file's text with lines that end in \\n; `encoding` is what it was read as."""

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
    decoded = decode(data)
    if decoded is None:
        raise TextFileError(f"{name} is no text: its bytes fit no encoding of text")
    text, encoding = decoded
    return TextFile(path.name, text.replace("\r\n", "\n"), encoding)


def decode(data: bytes) -> tuple[str, str] | None:
    """(text, encoding) by the mark at the start, as UTF-8, or as a detector finds it; None where it is binary."""
    for mark, encoding in _MARKS:
        if data.startswith(mark):
            return _as(data, encoding)
    found = _as(data, "utf-8")
    if found or not data:
        return found
    return _as(data, "utf-16-le" if b"\0" in data[1::2] else "utf-16-be") if b"\0" in data else _detected(data)


def _as(data: bytes, encoding: str) -> tuple[str, str] | None:
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError:
        return None
    binary = any(sign < " " and sign not in "\t\n\r\f\x1b" for sign in text)
    return None if binary else (text, encoding.removesuffix("-sig"))


def _detected(data: bytes) -> tuple[str, str] | None:
    """Of an older encoding: Chinese first, as GLM's users have it, where the bytes make common Chinese characters."""
    from charset_normalizer import from_bytes

    chinese = _as(data, "gb18030")
    if chinese and _is_common_chinese(chinese[0]):
        return chinese
    best = from_bytes(data, cp_isolation=_OLDER).best()
    return None if best is None else _as(data, best.encoding)


def _is_common_chinese(text: str) -> bool:
    """Whether what is not ASCII is mostly of GB 2312's first level, its 3755 commonest characters, or punctuation."""
    signs = [sign for sign in text if sign > "\x7f"]
    return sum(_is_common(sign) for sign in signs) > 0.9 * len(signs)


def _is_common(sign: str) -> bool:
    try:
        lead = sign.encode("gb2312")[0]
    except UnicodeEncodeError:
        return False
    return 0xB0 <= lead <= 0xD7 or lead in (0xA1, 0xA3)
