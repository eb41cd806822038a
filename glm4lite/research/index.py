"""The text of files as SQLite's FTS5 finds it, in one database that may be deleted at any time.

Words are found by their stem (Porter), without accents. Chinese, Japanese and Korean have no spaces, so each run of
their letters is written as all its pairs, as Lucene's CJK analyzer does: a trigram tokenizer would not find words of
two letters, which most Chinese words are. A letter alone is looked for at the beginning of pairs.

    >>> terms("SQLite 全文检索")
    'SQLite 全文 文检 检索 索'

A file is there as it was when it was read, whole or not at all: each is one transaction. Several processes may use a
database at once. One that is damaged is deleted and made again.
"""

from __future__ import annotations

import os
import re
import sqlite3
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from glm4lite.base.user_folder import make_private
from glm4lite.research.source import SourceError

LARGEST = 1 << 30
"""Bytes of a database."""
PASSAGE = 1200
"""Characters of a passage at most: what is ranked, and quoted."""

_FORMAT = 1  # goes up where what is written for a file changes
_PAGE = 4096
_BUSY_S = 30.0
_MOST_TERMS = 64  # of a query
_LONGEST_QUERY = 4000
_HAN = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff"
_PIECES = re.compile(f"[{_HAN}]+|[^\\W{_HAN}_]+")
_ENDS = ("\n\n", "\n", "。", ". ", " ")
_TABLES = f"""
CREATE TABLE IF NOT EXISTS files
(id INTEGER PRIMARY KEY, path TEXT UNIQUE, size INTEGER, mtime INTEGER, title TEXT, problem TEXT);
CREATE TABLE IF NOT EXISTS passages(id INTEGER PRIMARY KEY, file INTEGER, at INTEGER, text TEXT);
CREATE INDEX IF NOT EXISTS passages_of_files ON passages(file, at);
CREATE VIRTUAL TABLE IF NOT EXISTS terms
USING fts5(title, text, tokenize='porter unicode61 remove_diacritics 2');
INSERT INTO terms(terms, rank) VALUES ('rank', 'bm25(3.0, 1.0)');
PRAGMA user_version = {_FORMAT};
"""


@dataclass(frozen=True)
class Stamp:
    """What tells whether a file changed: its size in bytes, its time in nanoseconds."""

    size: int
    mtime: int


@dataclass(frozen=True)
class Entry:
    """A file that is taken in; `problem` says why it has no text."""

    path: str
    stamp: Stamp
    title: str
    text: str
    problem: str = ""


@dataclass(frozen=True)
class Found:
    """A passage that matches; `at` is where it begins in the file's text."""

    path: str
    title: str
    at: int
    text: str


class Index:
    """The index at a path, made where there is none. All methods raise SourceError."""

    def __init__(self, path: Path, largest: int = LARGEST) -> None:
        self.path, self._largest = path, largest
        try:
            make_private(path.parent)
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))  # SQLite would make it readable for all
        except OSError as error:
            raise SourceError(f"the index {path} cannot be written: {error.strerror}") from None
        with self._telling():
            self._prepare()

    def stamps(self) -> dict[str, Stamp]:
        """The files that are in it, those that could not be read too."""
        with self._opened() as database:
            rows = database.execute("SELECT path, size, mtime FROM files").fetchall()
        return {path: Stamp(size, mtime) for path, size, mtime in rows}

    def change(self, gone: Iterable[str] = (), entries: Iterable[Entry] = ()) -> None:
        """Forgets files, then takes others in as they come, each in the place of what was there of it."""
        with self._opened() as database:
            for path in gone:
                with _transaction(database):
                    _remove(database, path)
            for entry in entries:
                with _transaction(database):
                    _put(database, entry)

    def search(self, query: str, most: int) -> list[Found]:
        """Passages that hold any of the query's words, those first that hold more and rarer ones."""
        match = _match(query)
        if not match:
            return []
        with self._opened() as database:
            rows = database.execute(
                "SELECT files.path, files.title, passages.at, passages.text FROM terms "
                "JOIN passages ON passages.id = terms.rowid JOIN files ON files.id = passages.file "
                "WHERE terms MATCH ? ORDER BY terms.rank LIMIT ?",
                (match, most),
            ).fetchall()
        return [Found(*row) for row in rows]

    def text(self, path: str) -> tuple[str, str, str] | None:
        """Title, text and problem of a file as it was read; None where it is not there."""
        with self._opened() as database:
            file = database.execute("SELECT id, title, problem FROM files WHERE path = ?", (path,)).fetchone()
            if file is None:
                return None
            rows = database.execute("SELECT text FROM passages WHERE file = ? ORDER BY at", file[:1]).fetchall()
        return file[1], "".join(text for (text,) in rows), file[2]

    def count(self) -> int:
        """How many files have text in it."""
        with self._opened() as database:
            found: int = database.execute("SELECT count(*) FROM files WHERE problem = ''").fetchone()[0]
        return found

    def delete(self) -> None:
        """Removes it from the disk."""
        for suffix in ("", "-wal", "-shm", "-journal"):
            Path(f"{self.path}{suffix}").unlink(missing_ok=True)

    def _prepare(self) -> None:
        with closing(self._connect()) as database:
            database.execute("PRAGMA journal_mode = WAL").fetchone()
            version = database.execute("PRAGMA user_version").fetchone()[0]
            if version == 0:
                database.executescript(f"BEGIN IMMEDIATE; {_TABLES} COMMIT;")
        if version not in (0, _FORMAT):
            self.delete()
            self._prepare()

    def _connect(self) -> sqlite3.Connection:
        database = sqlite3.connect(self.path, timeout=_BUSY_S, isolation_level=None)
        database.execute(f"PRAGMA max_page_count = {self._largest // _PAGE}")
        database.execute("PRAGMA synchronous = NORMAL")  # whole after a power cut, if without the last files
        return database

    @contextmanager
    def _opened(self) -> Iterator[sqlite3.Connection]:
        with self._telling(), closing(self._connect()) as database:
            yield database

    @contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            if type(error) is sqlite3.DatabaseError:  # damaged, or no database; others are of kinds of their own
                self.delete()
            raise self._told(error) from None

    def _told(self, error: sqlite3.Error) -> SourceError:
        if type(error) is sqlite3.DatabaseError:
            return SourceError(f"the index {self.path} was damaged ({error}) and deleted; it is made again next time")
        if "no such module: fts5" in str(error):
            return SourceError("this Python's SQLite has no FTS5, with which files are searched; take another Python")
        if "full" in str(error):
            return SourceError(
                f"the index {self.path} is full (it takes at most {self._largest >> 20} MiB), or the disk is"
            )
        return SourceError(f"the index {self.path} fails ({error}); it may be deleted, and is made again")


@contextmanager
def _transaction(database: sqlite3.Connection) -> Iterator[None]:
    """What fails in it is undone when the connection is closed."""
    database.execute("BEGIN IMMEDIATE")
    yield
    database.execute("COMMIT")


def _put(database: sqlite3.Connection, entry: Entry) -> None:
    _remove(database, entry.path)
    row = (entry.path, entry.stamp.size, entry.stamp.mtime, entry.title, entry.problem)
    file = database.execute(
        "INSERT INTO files(path, size, mtime, title, problem) VALUES (?, ?, ?, ?, ?)", row
    ).lastrowid
    title = terms(f"{entry.title} {entry.path}")
    for at, passage in passages(entry.text):
        passage_id = database.execute(
            "INSERT INTO passages(file, at, text) VALUES (?, ?, ?)", (file, at, passage)
        ).lastrowid
        words = (passage_id, title, terms(passage))
        database.execute("INSERT INTO terms(rowid, title, text) VALUES (?, ?, ?)", words)


def _remove(database: sqlite3.Connection, path: str) -> None:
    of_file = "SELECT passages.id FROM passages JOIN files ON files.id = passages.file WHERE files.path = ?"
    database.execute(f"DELETE FROM terms WHERE rowid IN ({of_file})", (path,))
    database.execute("DELETE FROM passages WHERE file IN (SELECT id FROM files WHERE path = ?)", (path,))
    database.execute("DELETE FROM files WHERE path = ?", (path,))


def passages(text: str) -> Iterator[tuple[int, str]]:
    """(where it begins, passage): one behind the other, nothing left out, cut where a paragraph or sentence ends."""
    at = 0
    while at < len(text):
        end = at + PASSAGE
        if end < len(text):
            end = next((cut for mark in _ENDS if (cut := _after(text, mark, at + PASSAGE // 2, end))), end)
        yield at, text[at:end]
        at = end


def _after(text: str, mark: str, begin: int, end: int) -> int:
    """The place behind the last `mark` in a range; 0 where there is none."""
    place = text.rfind(mark, begin, end)
    return 0 if place < 0 else min(place + len(mark), end)


def terms(text: str) -> str:
    """The words of a text, as they are indexed, with spaces between them."""
    return " ".join(word for piece in _pieces(text) for word in _words(piece))


def _pieces(text: str) -> list[str]:
    return _PIECES.findall(unicodedata.normalize("NFKC", text))


def _words(piece: str) -> list[str]:
    if piece.isascii() or not re.match(f"[{_HAN}]", piece):
        return [piece]
    return [piece[place : place + 2] for place in range(len(piece))]


def wanted(query: str) -> list[str]:
    """The words that a query looks for, each once."""
    words = list[str]()
    for piece in _pieces(query[:_LONGEST_QUERY]):
        pairs = _words(piece)
        words += pairs[:-1] if len(pairs) > 1 else pairs
    return list(dict.fromkeys(words))[:_MOST_TERMS]


def _match(query: str) -> str:
    """A query of any text in FTS5's own language: one of its words is enough, the rank tells which are better."""
    return " OR ".join(f'"{word}"*' if re.fullmatch(f"[{_HAN}]", word) else f'"{word}"' for word in wanted(query))
