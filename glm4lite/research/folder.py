"""A folder of the user's files as a source: Markdown, text, HTML, PDF, Word, notebooks.

    folder = Folder(Path("notes"))
    folder.refresh()                                  # reads what is new or changed; the rest is in the index
    folder.search("quarterly budget", most=5)         # [Hit("Budget 2025", "doc:notes/plans/budget.md", ...)]

Names that begin with a dot are left out, with all that is below them. So are links: what they lead to inside of the
folder is there anyway, and what lies outside of it was not named. Nothing leaves the machine.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote, unquote

from glm4lite.base.errors import one_line
from glm4lite.base.extras import MissingPackageError
from glm4lite.base.user_folder import indexes_folder
from glm4lite.research.documents import KINDS, read_document
from glm4lite.research.index import LARGEST, Entry, Found, Index, Stamp, wanted
from glm4lite.research.source import Hit, Page, SourceError
from glm4lite.tools.running import abandoned

SCHEME = "doc:"
MOST_FILES = 20_000
LARGEST_FILE = 64 << 20
"""Bytes of a file; larger ones are named and left out."""

_MOST_ENTRIES = 500_000  # names that are looked at to find the files
_MOST_INDEXES = 16  # folders whose index is kept; the one that was used longest ago goes first
_FRESH_S = 10.0  # for which a folder is not looked through again
_SNIPPET = 300
_MOST_NOTES = 20
_ENCODED = re.compile(r"""[\s#%?【】†<>"'`\\]""")  # what would end an address, or begin its place
Told = Callable[[int, int], None]


class Folder:
    """Searches and opens a folder's files. `notes` are what was left out at the last look through it, and why."""

    def __init__(self, path: Path, label: str = "", links: bool = True, largest: int = LARGEST) -> None:
        """label: what its addresses begin with, the folder's name by default. links: whether a report may say where
        its files lie. Raises SourceError where it is no folder, or the index cannot be kept.
        """
        try:
            self.root = path.resolve(strict=True)
            if not self.root.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        except (OSError, RuntimeError, ValueError) as error:
            reason = getattr(error, "strerror", None) or one_line(error)
            raise SourceError(f"--docs {one_line(path)}: it cannot be read as a folder ({reason})") from None
        self.name = label or self.root.name or "docs"
        self.notes = list[str]()
        self._links = links
        self._looked = -_FRESH_S
        self._lock = threading.Lock()
        folder = indexes_folder()
        name = hashlib.sha256(os.fsencode(self.root)).hexdigest()[:16]
        self.index = Index(folder / f"{name}.sqlite", largest)
        with suppress(OSError):
            os.utime(self.index.path)
        _keep_newest(folder)

    def refresh(self, told: Told | None = None, cancel: threading.Event | None = None) -> None:
        """Reads the files that are new or changed since the last time, and forgets those that are gone.

        told: called with how many of how many are read. What was read when `cancel` is set stays. Raises SourceError
        where the index fails.
        """
        with self._lock:
            self.notes = []
            files, known = dict(self._files()), self.index.stamps()
            new = [path for path, stamp in files.items() if known.get(path) != stamp]
            self.index.change(known.keys() - files.keys(), self._entries(new, told, cancel))

    def search(self, query: str, most: int) -> list[Hit]:
        if time.monotonic() - self._looked > _FRESH_S and not self._lock.locked():
            self.refresh(cancel=abandoned())
        hits = dict[str, Hit]()  # one of a file, the best
        for found in self.index.search(query, 4 * most):
            hits.setdefault(found.path, self._hit(found, query))
        return list(hits.values())[:most]

    def open(self, url: str) -> Page | None:
        start = self._url("")
        if not url.startswith(start):
            return None
        path = unquote(url.removeprefix(start))
        found = self.index.text(path)
        if found is None:
            raise SourceError(f"there is no such file in the folder {self.name}; search it first")
        title, text, problem = found
        if problem:
            raise SourceError(f"{path}: {problem}")
        return Page(title, url, text, self._link(path))

    def _hit(self, found: Found, query: str) -> Hit:
        return Hit(
            found.title, self._url(found.path), snippet(found.text, query, _SNIPPET), found.at, self._link(found.path)
        )

    def _url(self, path: str) -> str:
        """The address of a file: its letters of any script stay, since a model has to read and write it."""
        return SCHEME + _ENCODED.sub(lambda sign: quote(sign[0]), f"{self.name}/{path}")

    def _link(self, path: str) -> str:
        return (self.root / path).as_uri() if self._links else ""

    def _files(self) -> Iterator[tuple[str, Stamp]]:
        """(path in the folder with slashes, stamp) of the files that can be read, in the order of their names."""
        count = looked_at = links = 0
        for folder, names, files in os.walk(self.root, onerror=self._unreadable):
            names[:] = sorted(name for name in names if not name.startswith("."))
            looked_at += len(names) + len(files)
            links += sum(os.path.islink(os.path.join(folder, name)) for name in names)
            for name in sorted(files):
                kind = KINDS.get(os.path.splitext(name)[1].lower())
                if kind is None or name.startswith("."):
                    continue
                path = os.path.join(folder, name)
                with suppress(OSError):  # it may have gone since it was listed
                    found = os.lstat(path)
                    links += stat.S_ISLNK(found.st_mode)
                    if stat.S_ISREG(found.st_mode) and _is_text(inside := os.path.relpath(path, self.root)):
                        count += 1
                        yield inside.replace(os.sep, "/"), Stamp(found.st_size, found.st_mtime_ns)
                if count >= MOST_FILES:
                    break
            if count >= MOST_FILES or looked_at >= _MOST_ENTRIES:
                self._note(f"of {self.name} only the first {count} files are searched")
                break
        if links:
            self._note(f"links are not followed; {self.name} holds {links}")

    def _entries(self, paths: list[str], told: Told | None, cancel: threading.Event | None) -> Iterator[Entry]:
        """What the index is to hold of the files."""
        for done, path in enumerate(paths):
            if told is not None:
                told(done, len(paths))
            if cancel is not None and cancel.is_set():
                self._note(f"{len(paths) - done} files of {self.name} were not read yet")
                return
            if (entry := self._entry(path)) is not None:
                yield entry
        if told is not None and paths:
            told(len(paths), len(paths))
        self._looked = time.monotonic()

    def _entry(self, path: str) -> Entry | None:
        """One file as it is now, or a note why it is not there."""
        try:
            data, stamp = self._read(path)
        except OSError as error:  # not kept: its rights may change without its time
            self._note(f"{path} cannot be read: {error.strerror or one_line(error)}")
            return None
        try:
            if len(data) > LARGEST_FILE:
                raise SourceError(f"it is larger than {LARGEST_FILE >> 20} MiB")
            document = read_document(data, KINDS[os.path.splitext(path)[1].lower()])
        except MissingPackageError as error:  # not kept: it may be installed
            self._note(f"{path}: {error}")
            return None
        except SourceError as error:
            self._note(f"{path}: {error}")
            return Entry(path, stamp, "", "", str(error))
        if document.note:
            self._note(f"{path}: {document.note}")
        return Entry(path, stamp, document.title or os.path.basename(path), document.text)

    def _read(self, path: str) -> tuple[bytes, Stamp]:
        """The file that was listed, also if something else has its name now: no link, no pipe, nothing outside."""
        whole = os.path.join(self.root, *path.split("/"))
        if os.path.realpath(os.path.dirname(whole)) != os.path.dirname(whole):
            raise OSError(errno.ELOOP, "a folder above it became a link")
        flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        with open(os.open(whole, flags), "rb") as file:
            before = os.fstat(file.fileno())
            if not stat.S_ISREG(before.st_mode):
                raise OSError(errno.EINVAL, "it is no plain file")
            data = file.read(LARGEST_FILE + 1)
            after = os.fstat(file.fileno())
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            raise OSError(errno.EAGAIN, "it was changed meanwhile; it is read next time")
        return data, Stamp(before.st_size, before.st_mtime_ns)

    def _unreadable(self, error: OSError) -> None:
        self._note(f"{one_line(os.path.basename(error.filename or ''))} in {self.name}: {error.strerror}")

    def _note(self, text: str) -> None:
        if len(self.notes) < _MOST_NOTES:
            self.notes.append(one_line(text))
        elif len(self.notes) == _MOST_NOTES:
            self.notes.append("and more")


def snippet(text: str, query: str, most: int) -> str:
    """The part of a text around the query's words, in one line."""
    line = " ".join(text.split())
    if len(line) <= most:
        return line
    small = line.lower()
    first = min((place for word in wanted(query) if (place := small.find(word.lower())) >= 0), default=0)
    begin = max(0, min(first - most // 4, len(line) - most))
    return f"{'…' if begin else ''}{line[begin : begin + most]}{'…' if begin + most < len(line) else ''}"


def _is_text(name: str) -> bool:
    """Names of bytes that are no text, and such as would break a line, are in no address."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return name.isprintable()


def _keep_newest(folder: Path) -> None:
    with suppress(OSError):
        indexes = sorted(folder.glob("*.sqlite"), key=lambda path: path.stat().st_mtime, reverse=True)
        for old in indexes[_MOST_INDEXES:]:
            for suffix in ("", "-wal", "-shm", "-journal"):
                Path(f"{old}{suffix}").unlink(missing_ok=True)
