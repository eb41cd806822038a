"""Bytes of a text whose encoding nobody says, or a web page or its server does."""

from __future__ import annotations

import codecs
import unicodedata

from glm4lite.base.sentences import Sentence
from glm4lite.text.likely_encoding import likeliest

_MARKS = {
    b"\xff\xfe\0\0": "utf-32", b"\0\0\xfe\xff": "utf-32", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16",
    b"\xef\xbb\xbf": "utf-8-sig",
}  # fmt: skip
# What a label means on the web where that is more than in Python (WHATWG, Encoding Standard), by Python's names.
_ON_THE_WEB = {
    "ascii": "cp1252", "iso8859-1": "cp1252", "gb2312": "gb18030", "gbk": "gb18030", "big5": "big5hkscs",
    "shift_jis": "cp932", "euc_kr": "cp949", "utf-16": "utf-8", "utf-16-le": "utf-8", "utf-16-be": "utf-8",
}  # fmt: skip
_NOT_ON_THE_WEB = ("idna", "punycode", "unicode-escape", "raw-unicode-escape", "utf-7")  # some take quadratic time
_SAMPLE = 64 << 10  # bytes that are looked at to tell an encoding
_SPACE = "\t\n\r\f\v\x1b\b"  # a log may hold a terminal's colours


def decoded(data: bytes) -> tuple[str, Sentence]:
    """The text, and how the user is told its encoding: "" for UTF-8. ValueError says why there is none."""
    text, encoding = _decoded(data)
    if not _is_text(text):
        raise ValueError(Sentence("it is no text"))
    return text, Sentence.from_json(encoding)


def named(data: bytes, label: str) -> str | None:
    """The text in the encoding that a page, or its server, names; None where the web has none of that name.

    A mark at the beginning is above the name. UTF-16 without one is what a page in UTF-8 says by mistake.
    """
    try:
        known = codecs.lookup(label.strip()).name
        if any(data.startswith(mark) for mark in _MARKS) or known in _NOT_ON_THE_WEB:
            return None
        return data.decode(_ON_THE_WEB.get(known, known), "replace")
    except (LookupError, ValueError):
        return None


def _decoded(data: bytes) -> tuple[str, str]:
    for mark, encoding in _MARKS.items():
        if data.startswith(mark):
            name = "" if encoding == "utf-8-sig" else encoding.upper()
            return _mostly(data, encoding, name)
    if b"\0" in data:  # which no other encoding has
        name = "utf-16-le" if data[1::2].count(0) >= data[::2].count(0) else "utf-16-be"
        return _mostly(data, name, "UTF-16")
    try:
        return _mostly(data, "utf-8", "")
    except ValueError:  # most of its letters are not UTF-8
        sample = data[:_SAMPLE]
        if sum(byte < 32 and chr(byte) not in _SPACE for byte in sample) * 100 > len(sample):
            raise ValueError(Sentence("it is no text")) from None
        guess = likeliest(data)
        if guess is None:
            raise ValueError(Sentence("its encoding is not known; save it as UTF-8")) from None
        text, name = _mostly(data, guess.encoding, guess.name)
        return text, name if guess.sure else Sentence("{encoding}, a guess", encoding=name)


def _mostly(data: bytes, encoding: str, name: str) -> tuple[str, str]:
    """Decoded; a few bytes that are damaged (a file cut in the middle of a letter, say) are told, many are refused."""
    try:
        return data.decode(encoding), name
    except UnicodeDecodeError:
        text = data.decode(encoding, "replace")
    lost, letters = text.count("\ufffd"), sum(map(str.isascii, text))
    if lost * 20 > len(text) - letters:
        raise ValueError(Sentence("it is no text in {encoding}", encoding=name or "UTF-8"))
    return text, Sentence("{encoding}, {count} unreadable", encoding=name or "UTF-8", count=lost)


def _is_text(text: str) -> bool:
    """Whether hardly any of it is a control character or a number that no letter has."""
    sample = text[:_SAMPLE]
    strange = sum(
        unicodedata.category(letter) in ("Cc", "Cn", "Co", "Cs") and letter not in _SPACE for letter in sample
    )
    return strange * 100 <= len(sample) and "\0" not in text
