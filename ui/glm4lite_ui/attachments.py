"""What a user attaches, as text: any file that holds some, whatever its name ends with.

    read(path, "report.pdf")     # Read(name, text, form="PDF", pages=12)
    read(b"...", "notes.txt")    # Read(..., form="text", encoding="GB18030"), which is "" for UTF-8
    read(path, "photo.png")      # UnreadableError: photo.png cannot be read: it is a picture; the model reads text only

UTF-8 is decoded here; everything else is read in a process of its own with limits (glm4lite/untrusted). The page
attaches by `Runtime.attachment`, which also counts the tokens, one file at a time: one that is refused keeps no other
from being sent.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from glm4lite.base.errors import said_by
from glm4lite.base.sentences import Sentence
from glm4lite.untrusted.apart import UnreadableError, read_apart

LARGEST = 64 << 20  # bytes of a file
_LONGEST_TEXT = 4_000_000  # characters; the longest context, a million tokens, is about as long
_LONGEST_NAME = 120

# How files begin that are no text (or a container of it), and what to say.
_PICTURE = Sentence("it is a picture; the model reads text only")
_SOUND = Sentence("it is sound or film; the model reads text only")
_ARCHIVE = Sentence("it is an archive; unpack it")
_PROGRAM = Sentence("it is a program; the model reads text only")
_OLD_OFFICE = Sentence("it is a file of an old Office; save it as .docx, PDF or CSV")
_NO_TEXT = Sentence("it is no text; the model reads text only")
_BEGINNINGS: tuple[tuple[bytes, Sentence], ...] = (
    (rb"\x89PNG|\xff\xd8\xff|GIF8|BM.{4}\0\0\0\0|II\*\0|MM\0\*|\0\0\x01\0|8BPS|RIFF.{4}WEBP|\xff\x0a", _PICTURE),
    (rb".{4}ftyp(heic|heix|mif1|msf1|avif|avis)|\0\0\0\x0cJXL |\0\0\0\x0cjP", _PICTURE),
    (rb"ID3|OggS|fLaC|RIFF.{4}(WAVE|AVI )|.{4}ftyp|\x1aE\xdf\xa3|FLV\x01|\xff[\xfb\xf3\xf2]|MThd|#!AMR", _SOUND),
    (rb"\x1f\x8b|BZh[1-9]1AY|\xfd7zXZ\0|7z\xbc\xaf|Rar!\x1a|\x28\xb5\x2f\xfd|.{257}ustar", _ARCHIVE),
    (rb"\x7fELF|MZ.{58}|\xfe\xed\xfa[\xce\xcf]|[\xce\xcf]\xfa\xed\xfe|\xca\xfe\xba\xbe|\0asm", _PROGRAM),
    (rb"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", _OLD_OFFICE),
    (rb"SQLite format 3\0|\x93NUMPY|\x89HDF|PAR1|wOF[F2]|\0\x01\0\0\0", _NO_TEXT),
)


_UTF8 = Sentence("")


@dataclass(frozen=True)
class Read:
    """A file's text. `form` is "text", "PDF", "Word" or "notebook"; `encoding`, of a text, is "" for UTF-8."""

    name: str
    text: str
    form: str = "text"
    encoding: Sentence = _UTF8
    pages: int | None = None


def read(source: Path | bytes, name: str) -> Read:
    """Raises UnreadableError in one line that begins with the file's name."""
    shown = shown_name(name)
    try:
        beginning, size = _beginning(source)
        if size > LARGEST:
            raise UnreadableError("it is larger than {size} MiB", size=LARGEST >> 20)
        reader = _reader(beginning, name)
        if reader == "text" and (text := _as_utf8(source)) is not None:
            return Read(shown, text)
        (found,) = read_apart(reader, source)
    except UnreadableError as error:
        raise UnreadableError("{name} cannot be read: {why}", name=shown, why=said_by(error)) from None
    return Read(shown, found["text"], found["form"], Sentence.from_json(found.get("encoding", "")), found.get("pages"))


def shown_name(name: str) -> str:
    """A file's own name without its folders, in letters that change nothing around them, its end kept."""
    last = re.split(r"[/\\]", name)[-1]
    letters = (letter for letter in last if unicodedata.category(letter) not in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp"))
    clean = " ".join("".join(letters).split()) or "file"
    return clean if len(clean) <= _LONGEST_NAME else f"{clean[: _LONGEST_NAME - 21]}…{clean[-20:]}"


def _beginning(source: Path | bytes) -> tuple[bytes, int]:
    if isinstance(source, bytes):
        return source[:1024], len(source)
    try:
        with source.open("rb") as file:
            return file.read(1024), source.stat().st_size
    except OSError as error:
        raise UnreadableError("the system does not let it be read ({problem})", problem=error.strerror) from None


def _reader(beginning: bytes, name: str) -> str:
    """By what it begins with; its name tells a notebook from other JSON, nothing else."""
    if not beginning:
        raise UnreadableError("it is empty")
    if b"%PDF-" in beginning:
        return "pdf"
    if beginning.startswith(b"PK\3\4") or beginning.startswith(b"PK\5\6"):
        return "office"
    for begins, said in _BEGINNINGS:
        if re.match(begins, beginning, re.DOTALL):
            raise UnreadableError(said)
    return "notebook" if name.lower().endswith(".ipynb") else "text"


def _as_utf8(source: Path | bytes) -> str | None:
    data = source if isinstance(source, bytes) else source.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None
    if "\0" in text:
        return None
    if not text.strip():
        raise UnreadableError("it holds no text")
    if len(text) > _LONGEST_TEXT:
        raise UnreadableError("it holds more than {count} characters, which no context takes", count=_LONGEST_TEXT)
    return text
