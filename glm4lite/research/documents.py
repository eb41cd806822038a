"""Bytes of a file or a page -> its text: UTF-8 here, everything else in a process with limits (glm4lite/untrusted)."""

from __future__ import annotations

import codecs
import re
from contextlib import suppress
from dataclasses import dataclass

from glm4lite.base.errors import one_line, said_by
from glm4lite.base.extras import require
from glm4lite.research.source import SourceError
from glm4lite.text.encodings import named
from glm4lite.untrusted.apart import Limits, UnreadableError, read_apart

KINDS = {
    **dict.fromkeys((".md", ".markdown", ".txt", ".text", ".rst", ".adoc", ".org", ".tex", ".csv", ".tsv"), "text"),
    **dict.fromkeys((".html", ".htm", ".xhtml"), "html"),
    ".pdf": "pdf",
    ".docx": "office",
    ".ipynb": "notebook",
}
"""Which reader a file of a folder needs, by the end of its name; other files are none that research reads."""

MOST_TEXT = 2_000_000
"""Characters of one document; the longest context of GLM-4, a million tokens, is more than a model reads of one."""

_PACKAGES = {"pdf": "pypdf", "html": "justhtml"}
_SECONDS = {"html": 30.0}  # 4 MiB take 8 s; with the time to fetch it, less than a tool may take
_LONGEST_READING = 60.0
_HEADING = re.compile(r"^ {0,3}#{1,2}[ \t]+(.+?)[ \t#]*$", re.MULTILINE)
_LONGEST_TITLE = 200


@dataclass(frozen=True)
class Document:
    """A text with its title, "" where it names none; `note` says what of it is missing."""

    title: str
    text: str
    note: str = ""


def read_document(data: bytes, kind: str) -> Document:
    """kind: a value of KINDS. Raises SourceError with the reason, which does not name the document.

    MissingPackageError where a package that reads this kind is not installed.
    """
    if kind == "text":
        with suppress(UnicodeDecodeError):
            return _document(data.decode("utf-8-sig"))
    if kind in _PACKAGES:
        require(f"reading {kind.upper()}", _PACKAGES[kind], extra="documents")
    try:
        found = next(read_apart(kind, data, Limits(_SECONDS.get(kind, _LONGEST_READING))))
    except (UnreadableError, StopIteration) as error:
        raise SourceError(f"it cannot be read: {said_by(error)}") from None
    return _document(found["text"], found.get("title", ""), whole=found.get("whole", True))


def of_charset(data: bytes, charset: str) -> bytes:
    """A page in the encoding that its server names, as UTF-8 with a mark; as it is where there is none of that name.

    A mark is above what the page says of itself, as the server's word is.
    """
    text = named(data, charset)
    return data if text is None else codecs.BOM_UTF8 + text.encode("utf-8", "replace")


def _document(text: str, title: str = "", whole: bool = True) -> Document:
    clean = text.replace("\r\n", "\n").replace("\0", "\ufffd")
    if not clean.strip():
        raise SourceError("it cannot be read: it holds no text")
    heading = _HEADING.search(clean, 0, 4000)
    named = one_line(title or (heading[1] if heading else ""), _LONGEST_TITLE)
    whole = whole and len(clean) <= MOST_TEXT
    return Document(named, clean[:MOST_TEXT], "" if whole else "only the beginning of it was read")
