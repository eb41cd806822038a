"""Bytes of a text file whose encoding nobody says."""

from __future__ import annotations

import re
import unicodedata

import charset_normalizer

# What is looked for in bytes that are not UTF-8, and how the user is told.
_ENCODINGS = {
    "gb18030": "GB18030", "big5": "Big5", "cp932": "Shift-JIS", "euc_jp": "EUC-JP", "cp949": "EUC-KR",
    "cp1252": "Windows-1252", "cp1251": "Windows-1251", "koi8_r": "KOI8-R", "latin_1": "Latin-1",
}  # fmt: skip
_MARKS = {
    b"\xff\xfe\0\0": "utf-32", b"\0\0\xfe\xff": "utf-32", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16",
    b"\xef\xbb\xbf": "utf-8-sig",
}  # fmt: skip
_SAMPLE = 64 << 10  # bytes that are looked at to tell an encoding
_SPACE = "\t\n\r\f\v\x1b\b"  # a log may hold a terminal's colours


def decoded(data: bytes) -> tuple[str, str]:
    """The text, and how the user is told its encoding: "" for UTF-8. ValueError says why there is none."""
    text, encoding = _decoded(data)
    if not _is_text(text):
        raise ValueError("it is no text")
    return text, encoding


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
            raise ValueError("it is no text") from None
        sample = sample[: sample.rfind(b"\n") + 1] or sample if len(data) > _SAMPLE else sample
        guess = _guessed(sample)
        if guess is None:
            raise ValueError("its encoding is not known; save it as UTF-8") from None
        return _mostly(data, guess, _ENCODINGS[guess])


def _guessed(sample: bytes) -> str | None:
    if (found := _east_asian(sample)) is not None:
        return found
    best = charset_normalizer.from_bytes(sample, cp_isolation=list(_ENCODINGS)).best()
    return None if best is None else best.encoding


def _mostly(data: bytes, encoding: str, name: str) -> tuple[str, str]:
    """Decoded; a few bytes that are damaged (a file cut in the middle of a letter, say) are told, many are refused."""
    try:
        return data.decode(encoding), name
    except UnicodeDecodeError:
        text = data.decode(encoding, "replace")
    lost, letters = text.count("\ufffd"), sum(map(str.isascii, text))
    if lost * 20 > len(text) - letters:
        raise ValueError(f"it is no text in {name or 'UTF-8'}")
    return text, f"{name or 'UTF-8'}, {lost} unreadable"


def _east_asian(sample: bytes) -> str | None:
    """GB18030 or Big5, where nearly all letters are of the standard's common ones; EUC-JP, where many are kana.

    Statistics over a language, as charset-normalizer has them, tell short lists of words badly; but the 3,755 common
    letters of GB 2312 and the 5,401 of Big5 each lie in rows of their own, which other encodings hardly keep to.
    """
    pairs = [
        (found[0][0], found[0][1])
        for found in re.finditer(rb"[\x81-\xfe][\x40-\xfe]|[^\x00-\x7f]", sample)
        if len(found[0]) == 2
    ]
    beside = len(re.findall(rb"(?:[\x81-\xfe][\x40-\xfe]){2}", sample))
    if not pairs or beside * 4 < len(pairs):
        return None
    kana = sum(lead in (0xA4, 0xA5) and trail >= 0xA1 for lead, trail in pairs)
    if kana >= 0.25 * len(pairs) and _decodes(sample, "euc_jp"):
        return "euc_jp"
    rows = [(lead, trail) for lead, trail in pairs if not 0xA1 <= lead <= 0xA3]
    common = sum(0xB0 <= lead <= 0xD7 and trail >= 0xA1 for lead, trail in rows)
    late = sum(lead > 0xC8 for lead, _ in rows)  # Korean's syllables end there
    if rows and common >= 0.9 * len(rows) and late >= 0.05 * len(rows) and _decodes(sample, "gb18030"):
        return "gb18030"
    common = sum(0xA4 <= lead <= 0xC6 for lead, _ in rows)
    low = sum(trail < 0x7F for _, trail in rows)
    if rows and common >= 0.9 * len(rows) and low >= 0.15 * len(rows) and _decodes(sample, "big5"):
        return "big5"
    return None


def _decodes(sample: bytes, encoding: str) -> bool:
    try:
        sample.decode(encoding)
    except UnicodeDecodeError as error:
        return error.start > len(sample) - 4  # the sample ends within a letter
    return True


def _is_text(text: str) -> bool:
    """Whether hardly any of it is a control character or a number that no letter has."""
    sample = text[:_SAMPLE]
    strange = sum(
        unicodedata.category(letter) in ("Cc", "Cn", "Co", "Cs") and letter not in _SPACE for letter in sample
    )
    return strange * 100 <= len(sample) and "\0" not in text
