"""Sizes in bytes, as people read and write them."""

import math
import re

from glm4lite.base.errors import ConfigError

_SIZE = re.compile(r"(\d{1,9}(?:\.\d{0,9})?)\s*(?:([KMGT])(iB|B)?)?", re.ASCII | re.IGNORECASE)


def parse_size(text: str) -> int:
    """Bytes of a size as people write it: "8GiB", "8G" (the same), "8GB" (8 * 10**9), "512MiB", "1.5 GiB", "0".

    Raises:
        ConfigError: it is something else.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ConfigError(f"{text[:100]!r} is not a size; give one such as 8GiB, 8GB or 512MiB")
    number, unit, kind = float(match[1]), (match[2] or "").upper(), (match[3] or "").lower()
    if number and not unit:
        raise ConfigError(f"{text[:100]!r} has no unit; give a size such as {match[1]}GiB or 512MiB")
    return int(number * (1000 if kind == "b" else 1024) ** (" KMGT".index(unit or " ")))


def readable(count: int) -> str:
    """A size in bytes, for a message: "1.2 GiB", "340 KiB"."""
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 1024:.0f} KiB"


def enough(count: int) -> str:
    """A size that a user may give as a budget and that suffices for `count` bytes: "1.3GiB", "341MiB"."""
    if count >= 1 << 30:
        return f"{math.ceil(count / (1 << 30) * 10) / 10:.1f}GiB"
    return f"{math.ceil(count / (1 << 20))}MiB"
