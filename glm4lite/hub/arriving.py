"""A file that is arriving: what of it is here, noted so that a later run goes on with it, and its digests so far.

It lies under an unfinished name, as long as it will be, with a journal beside it: a line of JSON (the size, and the
entity tag that the server gave), then one line `first end` for each stretch that is here. A stretch is noted after it
was synced, so that neither a killed process nor a power cut leaves a note of bytes that are not there (of a file that
is dropped in a moment: no killed process).
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from glm4lite.hub.digests import Damage, Digests

PART = 16 << 20
"""Bytes that one request asks for, and that a connection may have to fetch again after the process was killed."""

UNFINISHED = ".glm4lite.incomplete"
JOURNAL = ".glm4lite.parts"


@dataclass
class Stretch:
    """Bytes `began` to `stop` of a file (None: to its end), which one connection is fetching; it has come to `at`."""

    began: int
    at: int
    stop: int | None


class Arriving:
    """One unfinished file.

    target: the name that it will have. size: 0 where it is not known yet. digests: those that it may have (none: it
    cannot be verified). part: bytes that are asked for at once. synced: what is noted outlives a
    power cut too, and not only the process.
    """

    def __init__(self, target: Path, size: int, digests: frozenset[str], part: int = PART, synced: bool = True) -> None:
        self.path, self._journal = unfinished(target), journal(target)
        self.size, self.validator, self._part = size, "", part
        self._synced = synced
        self.digests = digests
        self.ranged: bool | None = None
        """Whether the server sends parts; None as long as nobody asked."""
        self._here: list[tuple[int, int]] = []
        self._taken: list[Stretch] = []
        self._discarded = False
        self._ended = False  # of a file whose size was not known
        self._lock, self._hashing = threading.Lock(), threading.Lock()
        self._hashed = Digests(digests)

    def open(self) -> int:
        """Makes the file, or finds what an earlier run left of it, of which it returns the bytes. OSError."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        found = _read_journal(self._journal)
        if found is not None and self.path.exists() and self.size in (0, found.size):
            self.size, self.validator, self._here = found.size, found.validator, found.stretches
        else:
            self.path.unlink(missing_ok=True)
            self._journal.unlink(missing_ok=True)
            self.path.touch()
        return self.arrived

    @property
    def arrived(self) -> int:
        """Bytes that are here and noted."""
        return sum(stop - start for start, stop in self._here)

    @property
    def complete(self) -> bool:
        with self._lock:
            return not self._taken and self.arrived == self.size and (self.size > 0 or self._ended)

    def differs(self, size: int | None, validator: str) -> bool:
        """Whether an answer is of another file than the one that was begun."""
        other = bool(validator and self.validator and validator != self.validator)
        return other or (size is not None and self.size not in (0, size))

    def settle(self, size: int | None, validator: str, ranged: bool) -> None:
        """What the first answer tells: it is taken for true from then on. OSError.

        size: None where the server does not say, and the end of its answer is the file's.
        """
        with self._lock:
            self.size, self.validator, self.ranged = size or self.size, validator or self.validator, ranged
            if size is not None and ranged:
                os.truncate(self.path, size)

    def take(self, room: int | None = None) -> Stretch | None:
        """What is to be fetched next; None where all of it is here or being fetched.

        room: how many bytes of the file may be here, or being fetched, with this stretch.
        """
        with self._lock:
            reserved = self.arrived + sum((one.stop or self.size) - one.began for one in self._taken)
            if room is not None and min(reserved + self._part, self.size or reserved + self._part) > room:
                return None
            if self.ranged is None and self._taken:  # whether parts are sent is being asked
                return None
            if not self.size:
                return None if self._taken or self._ended else self._given(0, None)
            position = 0
            for start, stop in sorted([*self._here, *((one.began, one.stop or self.size) for one in self._taken)]):
                if start > position:
                    break
                position = max(position, stop)
            else:
                start = self.size
            if position >= self.size:
                return None
            return self._given(position, min(position + self._part, start))

    def _given(self, start: int, stop: int | None) -> Stretch:
        self._taken.append(Stretch(start, start, stop))
        return self._taken[-1]

    def begin_again(self, stretch: Stretch) -> int:
        """The server sends no parts, or another file than before: from the first byte, all of it. OSError.

        Returns how many bytes are lost.
        """
        with self._lock:
            lost = self.arrived + stretch.at - stretch.began
            self._here = []
            self._hashed = Digests(self.digests)
            stretch.began, stretch.at, stretch.stop = 0, 0, self.size or None
            self._journal.unlink(missing_ok=True)
            os.truncate(self.path, 0)
            return lost

    def note(self, stretch: Stretch, ended: bool) -> None:
        """Nobody fetches the stretch any more; what arrived of it is put on the disk and in the journal.

        ended: all of it arrived. OSError.
        """
        if stretch.at > stretch.began and self._synced:
            with suppress(FileNotFoundError), self.path.open("rb+") as file:  # another connection discarded it
                os.fsync(file.fileno())
        with self._lock:
            self._taken.remove(stretch)
            if self._discarded:
                return
            if ended and not self.size:  # it was not known, or it is nothing: the answer's end was the file's
                self.size, self._ended = stretch.at, True
            if self.size and stretch.at > stretch.began:
                self._here = _merged([*self._here, (stretch.began, stretch.at)])
                new = not self._journal.exists()
                with self._journal.open("a", encoding="ascii") as notes:
                    if new:
                        notes.write(json.dumps({"size": self.size, "validator": self.validator}) + "\n")
                    notes.write(f"{stretch.began} {stretch.at}\n")

    def hash_on(self, poll: Callable[[], None]) -> None:
        """Reads on with the digests as far as the file is here without a gap, unless another thread is at it."""
        if self.size and self._hashing.acquire(blocking=False):
            try:
                self._hash_on(poll)
            finally:
                self._hashing.release()

    def _hash_on(self, poll: Callable[[], None]) -> None:
        if not self.digests:
            return
        self._hashed.begin(self.size)
        with self.path.open("rb", buffering=0) as file:
            while self._hashed.read_from(file, self._here[0][1] if self._here and not self._here[0][0] else 0):
                poll()

    def damage(self, poll: Callable[[], None]) -> Damage | None:
        """Of a complete file: in what it differs from what it should be."""
        if not self.digests:
            return None
        with self._hashing:
            self._hash_on(poll)
        return self._hashed.compared(self.digests)

    def publish(self, target: Path) -> None:
        """Gives the file its name. OSError."""
        os.replace(self.path, target)
        self._journal.unlink(missing_ok=True)

    def discard(self) -> None:
        """Removes what is here; connections that are still fetching note nothing more."""
        with self._lock:
            self._discarded = True
            for path in (self.path, self._journal):
                with suppress(OSError):
                    path.unlink()


def unfinished(target: Path) -> Path:
    return target.with_name(target.name + UNFINISHED)


def journal(target: Path) -> Path:
    return target.with_name(target.name + JOURNAL)


def arrived_of(target: Path) -> int:
    """Bytes that an earlier run left of a file, and that need not be fetched again."""
    found = _read_journal(journal(target))
    return sum(stop - start for start, stop in found.stretches) if found and unfinished(target).exists() else 0


@dataclass(frozen=True)
class _Journal:
    size: int
    validator: str
    stretches: list[tuple[int, int]]


def _read_journal(path: Path) -> _Journal | None:
    """None where there is none, or it is none; a line that was cut is left out."""
    try:
        head, *lines = path.read_text(encoding="ascii").split("\n")
        told = json.loads(head)
        size, validator = int(told["size"]), str(told["validator"])
        pairs = [line.split(" ") for line in lines[:-1]]
        found = [(int(start), int(stop)) for start, stop in pairs]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    if any(not 0 <= start < stop <= size for start, stop in found):
        return None
    return _Journal(size, validator, _merged(found))


def _merged(stretches: list[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for start, stop in sorted(stretches):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(stop, merged[-1][1])
        else:
            merged.append((start, stop))
    return merged


def written_at(path: Path, position: int) -> BinaryIO:
    """The file, to be written from `position` on, past no buffer. OSError."""
    file = path.open("rb+", buffering=0)
    file.seek(position)
    return file
