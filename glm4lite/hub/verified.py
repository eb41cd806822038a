"""Whether files of the Hub's cache hold what the Hub says they hold.

Each is hashed once: a note beside the repo's folder in the cache says which digest a file had and by what the system
tells that it is still the same (size, time of change, inode), so that the 18 to 65 GB of a model are not read again at
each start. A digest is "sha256:<hex>", or "git:<hex>" for the id that git gives a small file.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glm4lite.base.errors import HubError

NOTES = ".glm4lite-verified.json"

_BLOCK_BYTES = 4 << 20


@dataclass(frozen=True)
class Damage:
    """The digest a file has, and the one it should have."""

    found: str
    expected: str


class Verifier:
    """Compares the files of one folder of the cache, `<repo>/snapshots/<commit>`, with what they should be.

    kept: the `<repo>` of that, where the notes lie.

    Example::

        expected = {"config.json": frozenset({"git:5f70bf18a086007016e948b04aed3b82103a36be"})}
        Verifier(folder, folder.parents[1]).damaged(expected, report)
    """

    def __init__(self, folder: Path, kept: Path) -> None:
        self._folder = folder
        self._notes_path = kept / NOTES
        self._notes = _read_notes(self._notes_path)

    def can_remember(self) -> bool:
        """A cache that cannot be written was filled by another user: to hash it at each start is too much."""
        return os.access(self._notes_path.parent, os.W_OK)

    def damaged(self, expected: Mapping[str, frozenset[str]], report: Callable[[int, int], None]) -> dict[str, Damage]:
        """The files whose digest is none of those expected; `report` hears bytes hashed, and of how many.

        Raises:
            HubError: a file cannot be read.
        """
        unknown = [name for name, digests in expected.items() if digests and not self._noted(name) & digests]
        total = sum(_size(self._folder / name) for name in unknown)
        done, wrong = 0, dict[str, Damage]()
        for name in unknown:
            hashes = _Hashes(self._folder / name, expected[name])
            for count in hashes.read():
                done += count
                report(done, total)
            found = hashes.digests()
            if found & expected[name]:
                self._note(name, found & expected[name], hashes.state)
            else:
                kind = min(expected[name]).partition(":")[0]
                wrong[name] = Damage(next(d for d in found if d.startswith(kind)), min(expected[name]))
        return wrong

    def _noted(self, name: str) -> set[str]:
        """The digests that the file is known to have."""
        note = self._notes.get(self._key(name))
        state = _state(self._folder / name)
        return set(note["digests"]) if note is not None and state is not None and note["state"] == state else set()

    def _note(self, name: str, digests: frozenset[str], state: list[int] | None) -> None:
        self._notes[self._key(name)] = {"state": state, "digests": sorted(digests)}
        _write_notes(self._notes_path, self._notes)

    def _key(self, name: str) -> str:
        """Links of several commits may lead to one file."""
        real = os.path.realpath(self._folder / name)
        return os.path.relpath(real, os.path.realpath(self._notes_path.parent))


class _Hashes:
    """The digests of one file, of the kinds that are asked for."""

    def __init__(self, path: Path, kinds: frozenset[str]) -> None:
        self._path = path
        self.state = _state(path)
        self._hashes: dict[str, Any] = {}
        if any(kind.startswith("sha256:") for kind in kinds):
            self._hashes["sha256"] = hashlib.sha256()
        if any(kind.startswith("git:") for kind in kinds):
            self._hashes["git"] = hashlib.sha1(b"blob %d\0" % _size(path), usedforsecurity=False)

    def read(self) -> Iterator[int]:
        """Yields the number of bytes after each block."""
        try:
            with self._path.open("rb", buffering=0) as file:
                with suppress(OSError):  # a note must not outlive the bytes it speaks of where power is cut
                    os.fsync(file.fileno())
                buffer = memoryview(bytearray(_BLOCK_BYTES))
                while count := file.readinto(buffer):
                    for one in self._hashes.values():
                        one.update(buffer[:count])
                    yield count
        except OSError as error:
            raise HubError(
                f"{self._path} cannot be read ({error.strerror or error}); remove it and run it again"
            ) from None

    def digests(self) -> frozenset[str]:
        return frozenset(f"{kind}:{one.hexdigest()}" for kind, one in self._hashes.items())


def _state(path: Path) -> list[int] | None:
    """What changes when a file is written or replaced."""
    try:
        found = path.stat()
    except OSError:
        return None
    return [found.st_size, found.st_mtime_ns, found.st_ino]


def _size(path: Path) -> int:
    state = _state(path)
    return 0 if state is None else state[0]


def _read_notes(path: Path) -> dict[str, Any]:
    try:
        notes = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return notes if isinstance(notes, dict) and all(_is_note(note) for note in notes.values()) else {}


def _is_note(note: Any) -> bool:
    return (
        isinstance(note, dict)
        and isinstance(note.get("state"), list)
        and isinstance(digests := note.get("digests"), list)
        and all(isinstance(digest, str) for digest in digests)
    )


def _write_notes(path: Path, notes: Mapping[str, Any]) -> None:
    """Notes of files that are gone are dropped. Where they cannot be written, the files are hashed once more."""
    kept = {key: note for key, note in notes.items() if (path.parent / key).exists()}
    with suppress(OSError):
        descriptor, temporary = tempfile.mkstemp(prefix=f"{NOTES}.", dir=path.parent)
        try:
            with open(descriptor, "w", encoding="utf-8") as file:
                json.dump(kept, file)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
