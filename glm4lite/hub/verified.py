"""Whether files of the Hub's cache hold what the Hub says they hold.

What glm4lite fetches is verified as it arrives, what other programs fetched is hashed once: a note beside the repo's
folder in the cache says which digest a file had and by what the system tells that it is still the same (size, time of
change, inode), so that the 18 to 65 GB of a model are not read again at each start.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from glm4lite.base.errors import HubError
from glm4lite.base.whole_file import write_whole
from glm4lite.hub.digests import Damage, Digests

NOTES = ".glm4lite-verified.json"


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
            state, digests = _state(self._folder / name), Digests(expected[name])
            for count in _read(self._folder / name, digests):
                done += count
                report(done, total)
            damage = digests.compared(expected[name])
            if damage is None:
                self._note(name, digests.found() & expected[name], state)
            else:
                wrong[name] = damage
        return wrong

    def note(self, name: str, digests: frozenset[str]) -> None:
        """A file was verified before it got its name."""
        if digests:
            self._note(name, digests, _state(self._folder / name))

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


def _read(path: Path, digests: Digests) -> Iterator[int]:
    """Yields the number of bytes after each block."""
    try:
        with path.open("rb", buffering=0) as file:
            with suppress(OSError):  # a note must not outlive the bytes it speaks of where power is cut
                os.fsync(file.fileno())
            size = os.fstat(file.fileno()).st_size
            digests.begin(size)
            while count := digests.read_from(file, size):
                yield count
    except OSError as error:
        raise HubError(f"{path} cannot be read ({error.strerror or error}); remove it and run it again") from None


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
        write_whole(path, json.dumps(kept).encode())
