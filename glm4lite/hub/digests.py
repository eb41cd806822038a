"""Digests of files: "sha256:<hex>", or "git:<hex>" for the id that git gives a small file."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, BinaryIO

_BLOCK_BYTES = 4 << 20
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SHA1 = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Damage:
    """The digest a file has, and the one it should have."""

    found: str
    expected: str

    def __str__(self) -> str:
        return f"{self.found} instead of {self.expected}"


def digest_of(tag: str) -> frozenset[str]:
    """What a file's content hashes to by its entity tag, as the Hub gives them; nothing where the tag is no hash."""
    kinds = ((_SHA256, "sha256"), (_SHA1, "git"))
    return frozenset(f"{kind}:{tag}" for pattern, kind in kinds if pattern.fullmatch(tag))


class Digests:
    """The digests of one file, of the kinds that are asked for, read on as the file grows.

    Example::

        digests = Digests({"sha256:..."})
        digests.begin(size)
        while digests.read_from(file, size):
            ...
        digests.compared({"sha256:..."})        # None, or the damage
    """

    def __init__(self, kinds: Iterable[str]) -> None:
        self._kinds = {one.partition(":")[0] for one in kinds}
        self._hashes: dict[str, Any] = {}
        self._buffer = memoryview(b"")
        self.position = 0

    def begin(self, size: int) -> None:
        """Git's ids begin with the file's size, so that has to be known."""
        if self._hashes:
            return
        if "sha256" in self._kinds:
            self._hashes["sha256"] = hashlib.sha256()
        if "git" in self._kinds:
            self._hashes["git"] = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
        self._buffer = memoryview(bytearray(min(_BLOCK_BYTES, max(1, size))))

    def read_from(self, file: BinaryIO, stop: int) -> int:
        """Reads one block more of an unbuffered file, not beyond `stop`; how many bytes it was. OSError."""
        wanted = self._buffer[: max(0, stop - self.position)]
        if not wanted:
            return 0
        file.seek(self.position)
        count: int = file.readinto(wanted)  # type: ignore[attr-defined]  # files that are not buffered have it
        for one in self._hashes.values():
            one.update(wanted[:count])
        self.position += count
        return count

    def found(self) -> frozenset[str]:
        return frozenset(f"{kind}:{one.hexdigest()}" for kind, one in self._hashes.items())

    def compared(self, expected: frozenset[str]) -> Damage | None:
        """None where one of the digests is among those expected."""
        found = self.found()
        if found & expected:
            return None
        kind = min(expected).partition(":")[0]
        return Damage(next(one for one in found if one.startswith(kind)), min(expected))
