"""The folder of kept prefixes: which files there are, how one is written and read, and which goes for want of room.

    FOLDER/KEY/NAME.kv      KEY: of the model (`glm4lite.engine.kept_prefixes`); NAME: of what comes before, and the ids

A file holds what was computed for some ids of a prompt, behind others: little-endian,

    magic, key, parent, number of ids, CRC-32 of the data, length of the model's name | name | ids | CRC-32 | data

`parent` is the digest of all ids before, chained in blocks of 16, so that what agrees in it agrees in all of them.
Files are a stranger's like all others: sizes are compared before memory is taken, and a checksum (against accidents;
who can write here can also make one that is right) before anything is believed. The data are numbers, nothing is run.

Several processes may use the folder. They write one at a time, under a lock that ends with its process.
"""

from __future__ import annotations

import os
import secrets
import shutil
import stat
import struct
import sys
import time
import zlib
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

from glm4lite.base.errors import Glm4liteError, one_line
from glm4lite.base.files import open_file
from glm4lite.base.user_folder import make_private, prefixes_folder
from glm4lite.base.whole_file import remove_leftovers, replace

if sys.platform != "win32":  # there the parts of killed processes go when they are an hour old
    import fcntl

BLOCK = 16
"""Ids that are hashed together."""

MOST_IDS = 1024
"""Ids of one file."""

DIGEST = 16
"""Bytes of a digest."""

USUAL_SIZE = 4 << 30
LEAST_FREE = 1 << 30  # bytes of the disk that are left to others

_MAGIC = b"glm4kv1\n"
_HEAD = struct.Struct(f"<8s{DIGEST}s{DIGEST}sIIH")
_LONGEST_NAME = 200  # bytes of a model's name
_PATIENCE_S = 5.0  # how long another process may write before this one leaves it
_LOCK = ".lock"


class Damaged(ValueError):
    """A file here is not what it should be; the message says what is wrong with it."""


def digest(*parts: bytes) -> bytes:
    """Of all parts together."""
    made = blake2b(digest_size=DIGEST)
    for part in parts:
        made.update(part)
    return made.digest()


def as_bytes(ids: Sequence[int]) -> bytes:
    return struct.pack(f"<{len(ids)}I", *ids)


@dataclass(frozen=True)
class Segment:
    """What one file holds: of `ids`, which stand behind those that `parent` is the digest of."""

    path: Path
    key: bytes
    parent: bytes
    ids: tuple[int, ...]
    model: str
    checksum: int
    nbytes: int

    @property
    def head(self) -> bytes:
        """All that stands before the data."""
        name = self.model.encode()
        fields = (_MAGIC, self.key, self.parent, len(self.ids), self.checksum, len(name))
        head = _HEAD.pack(*fields) + name + as_bytes(self.ids)
        return head + struct.pack("<I", zlib.crc32(head))

    def blocks(self) -> Iterator[tuple[int, bytes, tuple[int, ...]]]:
        """(index of the first id here, digest of all ids before, ids) of each block; the last may be shorter."""
        before = self.parent
        for begin in range(0, len(self.ids), BLOCK):
            block = self.ids[begin : begin + BLOCK]
            yield begin, before, block
            before = digest(before, as_bytes(block))

    def read(self) -> bytearray:
        """The data. Raises OSError (another process may have removed the file), and Damaged."""
        data, head = bytearray(self.nbytes), self.head
        with open_file(self.path) as file:
            if file.read(len(head)) != head:
                raise Damaged("it was changed")
            if file.readinto(data) != self.nbytes or file.read(1):  # type: ignore[attr-defined]
                raise Damaged("its size was changed")
        if zlib.crc32(data) != self.checksum:
            raise Damaged("its checksum does not fit")
        return data


def read_head(path: Path) -> Segment:
    """What a file says of itself. Raises OSError, and Damaged."""
    most = _HEAD.size + _LONGEST_NAME + 4 * MOST_IDS + 4
    with open_file(path) as file:
        start, size = file.read(most), os.fstat(file.fileno()).st_size
    if len(start) < _HEAD.size or not start.startswith(_MAGIC):
        raise Damaged("it holds no prefix")
    _, key, parent, count, checksum, length = _HEAD.unpack_from(start)
    end = _HEAD.size + length + 4 * count
    if not 0 < count <= MOST_IDS or length > _LONGEST_NAME or len(start) < end + 4:
        raise Damaged("its header is damaged")
    if zlib.crc32(start[:end]) != int.from_bytes(start[end : end + 4], "little"):
        raise Damaged("its header is damaged")
    ids = struct.unpack_from(f"<{count}I", start, _HEAD.size + length)
    name = start[_HEAD.size : _HEAD.size + length].decode("utf-8", "replace")
    if path.parent.name != key.hex() or path.stem != digest(parent, as_bytes(ids)).hex():
        raise Damaged("it has another's name")
    return Segment(path, key, parent, ids, name, checksum, size - end - 4)


class _File(NamedTuple):
    path: Path
    nbytes: int
    used_ns: int


@dataclass(frozen=True)
class ModelPrefixes:
    """What is kept for one model, quantized and computed in one way: `used` is when it was last of use."""

    key: str
    model: str
    tokens: int
    nbytes: int
    used: float


class PrefixFolder:
    """Kept prefixes of all models, in at most `size` bytes, less on a full disk; the least recently used goes."""

    def __init__(self, path: Path | None = None, size: int = USUAL_SIZE) -> None:
        """`path`: None is the user's (`prefixes_folder`). Raises Glm4liteError where it cannot be used."""
        self.path, self.size = path or prefixes_folder(), size
        try:
            make_private(self.path)
            mode = self.path.stat()
        except OSError as error:
            raise Glm4liteError(f"{self.path} cannot hold prefixes: {error.strerror or one_line(error)}") from None
        if sys.platform != "win32" and (mode.st_mode & (stat.S_IWGRP | stat.S_IWOTH) or mode.st_uid != os.geteuid()):
            raise Glm4liteError(
                f"{self.path} cannot hold prefixes, for others can write there; remove it, or name another folder in "
                "GLM4LITE_PREFIXES"
            )

    def path_of(self, key: bytes, name: str) -> Path:
        return self.path / key.hex() / name

    def names(self, key: bytes) -> set[str]:
        """The files of a model."""
        with suppress(OSError):
            return {name for name in os.listdir(self.path / key.hex()) if name.endswith(".kv")}
        return set()

    def head(self, key: bytes, name: str) -> Segment:
        """Raises OSError, and Damaged."""
        return read_head(self.path_of(key, name))

    def write(
        self,
        key: bytes,
        parent: bytes,
        ids: Sequence[int],
        model: str,
        data: Sequence[bytes | memoryview],
        spare: Collection[Path],
    ) -> Segment | None:
        """Writes a file, and removes others where there is no room, none of `spare`; None where that is not enough.

        It is there whole or not at all. Raises OSError.
        """
        checksum = 0
        for piece in data:
            checksum = zlib.crc32(piece, checksum)
        nbytes = sum(memoryview(piece).nbytes for piece in data)
        path = self.path_of(key, f"{digest(parent, as_bytes(ids)).hex()}.kv")
        model = model.encode("utf-8", "replace")[:_LONGEST_NAME].decode("utf-8", "ignore")
        segment = Segment(path, key, parent, tuple(ids), model, checksum, nbytes)
        with self._locked() as alone:
            self._remove_leftovers(alone)
            if not self._make_room(len(segment.head) + nbytes, spare):
                return None
            make_private(path.parent)
            part = path.with_name(f".{secrets.token_hex(8)}.part")
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
            try:
                with open(os.open(part, flags, 0o600), "wb", buffering=0) as file:
                    for piece in (segment.head, *data):
                        _write_all(file.fileno(), piece)
                replace(part, path)
            except BaseException:
                part.unlink(missing_ok=True)
                raise
        return segment

    def used(self, paths: Sequence[Path]) -> None:
        """The files of one prefix, from its beginning on, were of use: none goes before one that needs it."""
        now = time.time_ns()
        for number, path in enumerate(paths):
            with suppress(OSError):
                os.utime(path, ns=(now - number * 1000, now - number * 1000))

    def models(self) -> list[ModelPrefixes]:
        """What is kept, the last used first; what is damaged is counted by its bytes alone."""
        found = []
        for folder in self._folders():
            name, tokens, nbytes, used = "", 0, 0, 0
            for file in _files(folder):
                nbytes, used = nbytes + file.nbytes, max(used, file.used_ns)
                with suppress(OSError, Damaged):
                    segment = read_head(file.path)
                    name, tokens = segment.model, tokens + len(segment.ids)
            if nbytes:
                found.append(ModelPrefixes(folder.name, name, tokens, nbytes, used / 1e9))
        return sorted(found, key=lambda one: one.used, reverse=True)

    def delete(self, keys: Collection[str]) -> None:
        """All that is kept under these keys. Raises OSError."""
        with self._locked():
            for folder in self._folders():
                if folder.name in keys:
                    shutil.rmtree(folder)

    def _folders(self) -> list[Path]:
        with suppress(OSError), os.scandir(self.path) as entries:
            found = [entry for entry in entries if _is_key(entry.name) and entry.is_dir(follow_symlinks=False)]
            return sorted(map(Path, found))
        return []

    def _make_room(self, nbytes: int, spare: Collection[Path]) -> bool:
        files = sorted((file for folder in self._folders() for file in _files(folder)), key=lambda file: file.used_ns)
        held = sum(file.nbytes for file in files)
        room = min(self.size, held + shutil.disk_usage(self.path).free - LEAST_FREE)
        if nbytes + sum(file.nbytes for file in files if file.path in spare) > room:
            return False
        for file in files:
            if held + nbytes <= room:
                break
            if file.path not in spare:
                file.path.unlink(missing_ok=True)
                held -= file.nbytes
                with suppress(OSError):
                    file.path.parent.rmdir()  # where it was the last
        return True

    def _remove_leftovers(self, alone: bool) -> None:
        """Parts of files: of processes that were killed, where nobody else can be writing."""
        for folder in self._folders():
            if not alone:
                remove_leftovers(folder)
                continue
            for part in folder.glob(".*.part"):
                part.unlink(missing_ok=True)

    @contextmanager
    def _locked(self) -> Iterator[bool]:
        """Nobody else writes meanwhile; False where the system has no locks. OSError where another takes too long."""
        descriptor = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o600)
        try:
            yield _lock(descriptor)
        finally:
            os.close(descriptor)


def _lock(descriptor: int) -> bool:
    if sys.platform != "win32":
        end = time.monotonic() + _PATIENCE_S
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.01)
            except OSError:  # a disk without locks
                break
    return False


def _files(folder: Path) -> Iterator[_File]:
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.endswith(".kv"):
                with suppress(OSError):
                    found = entry.stat(follow_symlinks=False)
                    yield _File(Path(entry), found.st_size, found.st_mtime_ns)


def _is_key(name: str) -> bool:
    return len(name) == 2 * DIGEST and set(name) <= set("0123456789abcdef")


def _write_all(descriptor: int, data: bytes | memoryview) -> None:
    left = memoryview(data).cast("B")
    while left:
        left = left[os.write(descriptor, left) :]
