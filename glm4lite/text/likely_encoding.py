"""Which of the encodings that files come in makes the likeliest text of some bytes.

    likeliest("北京".encode("gbk"))      # Guess(encoding="gb18030", name="GB18030", sure=True)
    likeliest(b"\\x81\\x20" * 40)          # None: it is text in none of them

Each way to read the bytes gets a sum of logarithms: how common its letters are in the language that the encoding is
for, and, of alphabets, how they stand beside each other and where capitals are. Libraries look for what a language
repeats, which takes some lines; two Chinese letters are four bytes, each of which is a letter of Russian and French,
too, and that they are common letters is all that tells. `sure` says that no other reading is near.
"""

from __future__ import annotations

import codecs
import functools
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from glm4lite.text.common_letters import CYRILLIC, KANJI, LATIN, SIMPLIFIED, SYLLABLES, TRADITIONAL

SAMPLE = 4 << 10  # bytes that are looked at
_NEAR = 3.0  # a reading that is not e^3 times as likely as the next is called a guess
_USUAL = -5.0  # of a byte beyond ASCII: less is called a guess
_STRANGE = -5.7  # the same: less is a text in none of the languages
_LEAST = 12  # of these bytes for either verdict; a short text may be of rare letters

# Natural logarithms of how often a letter is met, chosen by hand after counts and tried on lists of words.
_BY_RANK = ((100, -5.5), (400, -7.0), (2000, -8.4))  # of a list that begins with the commonest
_ASCII, _DAMAGED, _CAPITAL, _AMID = -3.2, -30.0, -1.0, -5.0
_MARKS = dict.fromkeys("，。、；：？！“”‘’（）《》【】—…·「」『』〈〉　～", -6.0)
_SIGNS = dict.fromkeys("’“”–—«»°€£§©®…‘·´½²³¿¡º№\xa0", -5.0)
_WHOLE = range(0xA1, 0xFF)


@dataclass(frozen=True)
class Guess:
    """Python's name of the encoding, and the one for the user."""

    encoding: str
    name: str
    sure: bool


@dataclass(frozen=True)
class _Reading:
    """`letters` have logarithms; of another letter `rest` for each two bytes. `usual`: how often a file is in it."""

    encoding: str
    name: str
    usual: float
    letters: Callable[[], Mapping[str, float]]
    rest: float
    alphabet: str = ""

    def likelihood(self, sample: bytes, whole: bool) -> float:
        """Of a sample that may end within a letter, unless it is the whole."""
        text = codecs.getincrementaldecoder(self.encoding)("replace").decode(sample, whole)
        found = Counter(text)
        common = self.letters()
        total = self.usual + (self._in_words(text, common) if self.alphabet else 0.0)
        for letter, times in found.items():
            total += times * (_ASCII if letter.isascii() else common.get(letter.lower()) or self._rare(letter))
        return total

    def _rare(self, letter: str) -> float:
        return _DAMAGED if letter == "\ufffd" else self.rest * len(letter.encode(self.encoding)) / 2

    def _in_words(self, text: str, common: Mapping[str, float]) -> float:
        """What is odd about words: letters of two alphabets, accents side by side, capitals amid them."""
        total = 0.0
        for word in re.findall(r"[^\W\d_]+", text):
            if word.isascii():
                continue
            borders = len(re.findall(r"[A-Za-z](?=[^A-Za-z])|[^A-Za-z](?=[A-Za-z])", word))
            if self.alphabet == "Cyrillic":
                total += _AMID * borders
            else:
                total -= 4.0 * len(re.findall(r"[^\x00-\x7f](?=[^\x00-\x7f])", word)) + (0.0 if borders else 1.5)
            if not word.islower():
                total += sum(_CAPITAL for letter in word if letter.isupper() and not letter.isascii())
                total += 0.0 if word.isupper() else sum(_AMID for letter in word[1:] if letter.isupper())
        return total


def _rows(encoding: str, first: int, last: int, trails: range = _WHOLE) -> str:
    """The letters of a standard's rows, by their first byte."""
    pairs = (bytes((lead, trail)) for lead in range(first, last + 1) for trail in trails)
    return "".join(pair.decode(encoding, "ignore") for pair in pairs)


def _ranked(letters: str) -> dict[str, float]:
    return {letter: next(value for most, value in _BY_RANK if place < most) for place, letter in enumerate(letters)}


@functools.cache
def _simplified() -> dict[str, float]:
    first, second = _rows("gb18030", 0xB0, 0xD7), _rows("gb18030", 0xD8, 0xF7)  # GB 2312: common letters, then others
    found = dict.fromkeys(_rows("gb18030", 0xA1, 0xA9), -9.5) | dict.fromkeys(second, -13.0)
    return found | dict.fromkeys(first, -10.3) | _MARKS | _ranked(SIMPLIFIED)


@functools.cache
def _traditional() -> dict[str, float]:
    first = _rows("big5", 0xA4, 0xC6, range(0x40, 0xFF))
    return dict.fromkeys(_rows("big5", 0xA1, 0xA3), -10.0) | dict.fromkeys(first, -10.8) | _MARKS | _ranked(TRADITIONAL)


@functools.cache
def _japanese() -> dict[str, float]:
    kanji, others = _rows("euc_jp", 0xB0, 0xCF), _rows("euc_jp", 0xD0, 0xF4)  # JIS X 0208: common ones, then others
    hiragana, katakana = _rows("euc_jp", 0xA4, 0xA4), _rows("euc_jp", 0xA5, 0xA5) + "ー"
    found = dict.fromkeys(others, -15.0) | dict.fromkeys(kanji, -11.0) | dict.fromkeys(KANJI, -7.6) | _MARKS
    narrow = "".join(map(chr, range(0xFF61, 0xFFA0)))
    return found | dict.fromkeys(hiragana, -5.0) | dict.fromkeys(katakana, -6.0) | dict.fromkeys(narrow, -8.5)


@functools.cache
def _korean() -> dict[str, float]:
    syllables = dict.fromkeys(_rows("euc_kr", 0xB0, 0xC8), -9.4)
    return syllables | dict.fromkeys(_MARKS, -9.0) | dict.fromkeys(SYLLABLES, -5.6)


@functools.cache
def _russian() -> dict[str, float]:
    return _SIGNS | {letter: -2.2 - 0.1 * place for place, letter in enumerate(CYRILLIC)}


@functools.cache
def _western() -> dict[str, float]:
    return _SIGNS | {letter: -2.5 - 0.07 * place for place, letter in enumerate(LATIN)}


_READINGS = (
    _Reading("gb18030", "GB18030", 0.0, _simplified, -17.0),
    _Reading("big5", "Big5", -2.5, _traditional, -15.0),
    _Reading("cp932", "Shift-JIS", -2.0, _japanese, -18.0),
    _Reading("euc_jp", "EUC-JP", -5.0, _japanese, -18.0),
    _Reading("cp949", "EUC-KR", -4.0, _korean, -15.5),
    _Reading("cp1252", "Windows-1252", -1.0, _western, -17.0, "Latin"),
    _Reading("cp1251", "Windows-1251", -3.0, _russian, -17.0, "Cyrillic"),
    _Reading("koi8_r", "KOI8-R", -5.5, _russian, -17.0, "Cyrillic"),
)


def likeliest(data: bytes) -> Guess | None:
    """The encoding of bytes of which some are beyond ASCII; None where they are text in none of those known here."""
    found = re.search(rb"[^\x00-\x7f]", data)
    begins = data.rfind(b"\n", 0, found.start() if found else 0) + 1
    sample = data[begins : begins + SAMPLE]
    whole = begins + SAMPLE >= len(data)
    likely = sorted(((one.likelihood(sample, whole), one) for one in _READINGS), key=lambda pair: pair[0], reverse=True)
    (best, reading), (next_best, _) = likely[:2]
    beyond = len(sample) - len(sample.decode("ascii", "ignore"))
    in_ascii = sum(map(str.isascii, sample.decode(reading.encoding, "ignore")))
    of_each = (best - reading.usual - _ASCII * in_ascii) / max(beyond, 1)
    if beyond >= _LEAST and of_each < _STRANGE:
        return None
    return Guess(reading.encoding, reading.name, best - next_best > _NEAR and (beyond < _LEAST or of_each > _USUAL))
