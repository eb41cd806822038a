"""Values that requests are about (numbers, cities, names, …), split between training and evaluation.

`is_reserved` is the split: one value in eight, by its checksum, is never generated for training, and evaluation uses
only those. It holds for every open kind of value: numbers of two or more digits, names, cities, words, codes. Closed
sets (languages, currencies, units, months) are shared.
"""

from __future__ import annotations

import random
import string
import tomllib
import zlib
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

DATA = Path(__file__).with_name("data")
# The README's own example is evaluated, so its numbers are kept out of training.
ALWAYS_RESERVED = frozenset({"37", "24"})
RARE_HAN = (0x4E00, 0x9FA5)


def is_reserved(value: str) -> bool:
    """Whether a value belongs to the evaluation only."""
    return value in ALWAYS_RESERVED or (len(value) > 1 and zlib.crc32(value.encode()) % 8 == 0)


@cache
def table(file: str) -> dict[str, object]:
    """One of the TOML files under nano/data."""
    return tomllib.loads((DATA / file).read_text(encoding="utf-8"))


@cache
def words(name: str) -> tuple[str, ...]:
    """A list of words.toml, separated by spaces or by bars."""
    text = str(table("words.toml")[name])
    return tuple(text.split("|") if "|" in text else text.split())


class Values:
    """Draws values of a kind; `held_out` draws reserved ones."""

    def __init__(self, rng: random.Random, held_out: bool, pieces: Sequence[str] = ()) -> None:
        """`pieces`: tokens to make words of, so that training copies every token of the vocabulary now and then."""
        self.rng = rng
        self.held_out = held_out
        self.latin = [piece for piece in pieces if piece.isascii()]
        self.han_pieces = [piece for piece in pieces if not piece.isascii()]

    def open(self, draw: Callable[[], str]) -> str:
        """Draws until the value is on this side of the split; single characters are on both sides."""
        for _ in range(2000):
            value = draw()
            if is_reserved(value) == self.held_out or len(value) < 2:
                return value
        raise ValueError(f"no value like {value!r} is on this side of the split")

    def strange(self, share: float) -> bool:
        """Whether to draw something no person would say, in training only: it exercises rare tokens."""
        return not self.held_out and self.rng.random() < share

    def listed(self, name: str) -> str:
        return self.open(lambda: self.rng.choice(words(name)))

    def invented(self, capital: bool) -> str:
        """A pronounceable word that is in no list, like "Torvani"."""
        rng = self.rng

        def draw() -> str:
            if self.latin and rng.random() < 0.15:
                return "".join(rng.choice(self.latin) for _ in range(rng.choice((1, 2, 2, 3))))
            word = _mixed(rng) if self.strange(0.3) else _syllables(rng)
            return word.capitalize() if capital else word

        return self.open(draw)

    def digits(self, least: int, most: int) -> str:
        rng = self.rng
        count = rng.randint(least, most)
        if count > 2 and self.strange(0.12):  # repeated digits are the hard ones to copy
            return self.open(lambda: _few_digits(rng, count))
        return self.open(lambda: str(rng.randint(10 ** (count - 1) if count > 1 else 0, 10**count - 1)))

    def number(self) -> str:
        """A number as a person types it: mostly two to four digits, sometimes with decimals."""
        rng = self.rng
        size = rng.choices((1, 2, 3, 4, 5, 7), (11, 38, 27, 14, 7, 3))[0]
        text = self.digits(size, size)
        if rng.random() < 0.2:
            text += "." + self.open(lambda: str(rng.randint(1, 9)) if rng.random() < 0.6 else _cents(rng))
        return text

    def han(self) -> str:
        """A Chinese personal name, one in six with a rare character."""
        rng, text = self.rng, table("words.toml")

        def draw() -> str:
            given = "".join(rng.choice(str(text["given_zh"])) for _ in range(rng.choice((1, 2, 2))))
            if rng.random() < 0.17:
                given = chr(rng.randint(*RARE_HAN))
            return rng.choice(str(text["surname_zh"])) + given

        return self.open(draw)

    def any_han(self) -> str:
        """Two or three Chinese characters, most of them rare."""

        def draw() -> str:
            if self.han_pieces and self.rng.random() < 0.5:
                return self.rng.choice(self.han_pieces)
            return chr(self.rng.randint(*RARE_HAN))

        return "".join(draw() for _ in range(self.rng.choice((2, 2, 3))))

    def city(self, chinese: bool) -> str:
        roll = self.rng.random()
        if chinese and roll < 0.75:
            return self.open(self.any_han) if self.strange(0.06) else self.listed("city_zh")
        return self.invented(True) if roll > (0.85 if chinese else 0.5) else self.listed("city")

    def person(self, chinese: bool) -> str:
        roll = self.rng.random()
        if chinese and roll < 0.75:
            return self.han()
        return self.invented(True) if roll > (0.85 if chinese else 0.5) else self.listed("person")

    def word(self, chinese: bool = False) -> str:
        if self.rng.random() < 0.5:
            return self.invented(False)
        return self.listed("noun" if self.rng.random() < 0.5 else "topic")

    def code(self) -> str:
        """Like "GT4471", or digits alone."""
        rng = self.rng

        def draw() -> str:
            letters = "".join(rng.choice("ABCDEFGHJKLMNPQRSTUVWXYZ") for _ in range(rng.choice((1, 2, 2))))
            return letters + str(rng.randint(100, 999_999))

        return self.open(draw) if rng.random() < 0.6 else self.digits(4, 8)

    def clock(self) -> str:
        return self.open(lambda: f"{self.rng.randint(0, 23):02d}:{self.rng.randint(0, 59):02d}")

    def date(self) -> str:
        rng = self.rng
        return self.open(lambda: f"20{rng.randint(20, 39)}-{rng.randint(1, 12):02d}-{rng.randint(1, 28):02d}")

    def phrase(self, chinese: bool) -> str:
        """A short sentence to be passed on: a listed one, or one made of words."""
        if chinese and self.rng.random() < 0.7:
            return self.open(lambda: _shuffled(self.rng, True)) if self.strange(0.6) else self.listed("phrase_zh")
        if self.strange(0.4):
            return self.open(lambda: _shuffled(self.rng, False))
        if self.rng.random() < 0.4:
            return self.listed("phrase")
        return " ".join(self.word() for _ in range(self.rng.randint(1, 4)))

    def title(self) -> str:
        return " ".join(self.word().capitalize() for _ in range(self.rng.randint(1, 3)))

    def draw(self, kind: str, chinese: bool) -> str:
        """A value of the kind that a tool's table names."""
        return _KINDS[kind](self, chinese)


def _syllables(rng: random.Random) -> str:
    word = "".join(rng.choice(words("onset")) + rng.choice(words("vowel")) for _ in range(rng.choice((2, 2, 3))))
    return word + (rng.choice("nrslmt") if rng.random() < 0.5 else "")


def _mixed(rng: random.Random) -> str:
    """Pieces of known words put together, so that every token of the vocabulary is copied now and then."""
    parts = []
    for _ in range(rng.choice((2, 2, 3))):
        word = rng.choice(words(rng.choice(("city", "person", "noun", "topic", "things")))).lower()
        start = rng.randrange(max(1, len(word) - 2))
        parts.append(word[start : start + rng.randint(2, 5)])
    return "".join(parts)


def _shuffled(rng: random.Random, chinese: bool) -> str:
    """Words of the listed sentences in any order: copying must not rest on sentences seen before."""
    lists = [words(name + ("_zh" if chinese else "")) for name in ("phrase", "task")]
    parts: list[str] = []
    for _ in range(rng.randint(2, 4)):
        sentence = rng.choice(rng.choice(lists))
        unit = list(sentence) if chinese else sentence.split()
        start = rng.randrange(len(unit))
        parts += unit[start : start + rng.choice((1, 1, 2))]
    return ("" if chinese else " ").join(parts)


def _few_digits(rng: random.Random, count: int) -> str:
    few = rng.choice("123456789") + rng.choice("0123456789")
    return few[0] + "".join(rng.choice(few) for _ in range(count - 1))


def _cents(rng: random.Random) -> str:
    return f"{rng.randint(1, 99):02d}".rstrip("0")


Draw = Callable[[Values, bool], str]


def _integer(low: int, high: int) -> Draw:
    return lambda v, zh: v.open(lambda: str(v.rng.randint(low, high)))


def _digits(least: int, most: int) -> Draw:
    return lambda v, zh: v.digits(least, most)


def _choice(name: str) -> Draw:
    return lambda v, zh: v.rng.choice(words(name))


def _one_of(*values: str) -> Draw:
    return lambda v, zh: v.rng.choice(values)


def _either(name: str) -> Draw:
    """A text of a list, in Chinese mostly of the Chinese one; now and then a phrase."""

    def draw(v: Values, zh: bool) -> str:
        if v.rng.random() < 0.25 or v.strange(0.4):
            return v.phrase(zh)
        return v.listed(f"{name}_zh" if zh and v.rng.random() < 0.8 else name)

    return draw


def _either_or_invented(name: str) -> Draw:
    def draw(v: Values, zh: bool) -> str:
        if zh and v.rng.random() < 0.8:
            return v.open(v.any_han) if v.strange(0.08) else v.listed(f"{name}_zh")
        return v.listed(name) if v.rng.random() < 0.5 else v.invented(False)

    return draw


def _several_words(least: int, most: int, draw: Callable[[Values], str]) -> Draw:
    return lambda v, zh: " ".join(draw(v) for _ in range(v.rng.randint(least, most)))


def _ticker(v: Values, zh: bool) -> str:
    return v.open(lambda: "".join(v.rng.choice(string.ascii_uppercase) for _ in range(v.rng.choice((3, 4)))))


def _flight(v: Values, zh: bool) -> str:
    return v.open(lambda: v.rng.choice("ABCLKQU") + v.rng.choice("ABCFHXZ") + str(v.rng.randint(100, 9999)))


def _file(v: Values, zh: bool) -> str:
    ending = v.rng.choice((".txt", ".md", ".csv", ".json", ".py"))
    return v.rng.choice(("", "docs/", "data/", "src/")) + v.word() + ending


def _room(v: Values, zh: bool) -> str:
    return v.rng.choice(words("room_zh" if zh else "room"))


def _degrees(v: Values, zh: bool) -> str:
    return v.open(lambda: str(v.rng.randint(12, 29)) + v.rng.choice(("", "", ".5")))


def _percent(v: Values, zh: bool) -> str:
    return v.rng.choice(("", "-")) + f"{v.rng.randint(0, 9)}.{v.rng.randint(1, 99)}"


def _echo(v: Values, zh: bool) -> str:
    if zh and v.strange(0.3):
        return v.open(lambda: v.any_han())
    return v.rng.choice((v.phrase(zh), v.number(), v.person(zh), v.word(), v.title(), v.code(), v.invented(True)))


_KINDS: dict[str, Draw] = {
    "city": Values.city,
    "city_any": Values.city,
    "person": Values.person,
    "ticker": _ticker,
    "phrase": Values.phrase,
    "foreign": _several_words(1, 4, lambda v: v.invented(False)),
    "language": lambda v, zh: v.rng.choice(words("language_zh" if zh else "language")),
    "currency": _choice("currency"),
    "currency2": _choice("currency"),
    "number": lambda v, zh: v.number(),
    "money": lambda v, zh: v.number(),
    "percent": _percent,
    "int": _digits(1, 4),
    "bigint": _digits(5, 7),
    "small": _integer(2, 30),
    "small2": _integer(2, 120),
    "pct": _integer(0, 100),
    "deg": _degrees,
    "temp": _integer(-25, 45),
    "id": _digits(2, 6),
    "phone": _digits(7, 11),
    "code": lambda v, zh: v.code(),
    "clock": lambda v, zh: v.clock(),
    "date": lambda v, zh: v.date(),
    "task": _either("task"),
    "topic": _either_or_invented("topic"),
    "noun": _either_or_invented("noun"),
    "word": lambda v, zh: v.word(),
    "title": lambda v, zh: v.title(),
    "proper": lambda v, zh: v.title(),
    "eventname": lambda v, zh: v.phrase(zh) if v.rng.random() < 0.5 else v.title(),
    "file": _file,
    "room": _room,
    "flight": _flight,
    "rating": lambda v, zh: f"{v.rng.randint(1, 4)}.{v.rng.randint(1, 9)}",
    "sky": _choice("sky"),
    "state": _choice("state"),
    "meaning": _several_words(2, 4, Values.word),
    "ok": _one_of("ok", "done"),
    "sent": _one_of("sent", "queued", "delivered"),
    "playing": _one_of("playing"),
    "calling": _one_of("ringing", "busy", "connected"),
    "echo": _echo,
}
