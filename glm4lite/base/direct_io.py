"""Files read by position, past the page cache where the system lets us.

Weights that stream from disk for every token would push everything else out of the page cache and still never be found
in it: a scan larger than the cache hits nothing. Reads here go straight into the caller's memory (O_DIRECT on Linux,
F_NOCACHE on macOS); where a file system refuses that, they go through the cache and its pages are given back.
"""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path
from typing import NamedTuple

from glm4lite.base.errors import CheckpointError

ALIGNMENT = 4096
"""Offsets, lengths and addresses of direct reads are multiples of this many bytes."""


class DirectFile:
    """An open file whose aligned parts are read into memory; several threads may read at once.

    The file stays the one that was opened: replacing it changes nothing, writing into it is noticed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.direct = True
        try:
            self._fd = self._open()
            self._opened = os.fstat(self._fd)
        except OSError as error:
            raise self._unreadable(error) from None
        self.size = self._opened.st_size
        self._seeking = threading.Lock()

    def _open(self) -> int:
        flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
        if hasattr(os, "O_DIRECT"):
            try:
                return os.open(self.path, flags | os.O_DIRECT)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
        self.direct = False
        fd = os.open(self.path, flags)
        no_cache = _no_cache_command()
        if no_cache is not None:
            import fcntl

            fcntl.fcntl(fd, no_cache, 1)
            self.direct = True
        return fd

    def read_into(self, target: memoryview, offset: int) -> None:
        """Fills `target` from `offset`; both aligned. The file may end within it: the rest is left as it was.

        Raises:
            CheckpointError: the disk fails, or the file is no longer what was opened.
        """
        done, wanted = 0, min(len(target), self.size - offset)
        try:
            while done < wanted:
                count = self._read(target[done:], offset + done)
                whole = done + count if done + count >= wanted else (done + count) // ALIGNMENT * ALIGNMENT
                if whole <= done:  # the next direct read must begin at a whole block: nothing more will come
                    raise CheckpointError(
                        f"{self.path} ended at {offset + done + count} of {self.size} bytes while in use"
                    )
                done = whole
            if not self.direct and hasattr(os, "posix_fadvise"):
                os.posix_fadvise(self._fd, offset, len(target), os.POSIX_FADV_DONTNEED)
        except OSError as error:
            raise self._unreadable(error) from None

    def _read(self, target: memoryview, offset: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self._fd, [target], offset)
        with self._seeking:  # Windows has no positional reads
            os.lseek(self._fd, offset, os.SEEK_SET)
            data = os.read(self._fd, len(target))
        target[: len(data)] = data
        return len(data)

    def check_unchanged(self) -> None:
        """CheckpointError where the file was written to since it was opened."""
        now = os.fstat(self._fd)
        if (now.st_size, now.st_mtime_ns) != (self._opened.st_size, self._opened.st_mtime_ns):
            raise CheckpointError(f"{self.path} was changed while the model was in use; load the model again")

    def _unreadable(self, error: OSError) -> CheckpointError:
        return CheckpointError(f"{self.path} cannot be read: {error.strerror or error}")

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __del__(self) -> None:
        if hasattr(self, "_fd"):
            self.close()


def _no_cache_command() -> int | None:
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    return getattr(fcntl, "F_NOCACHE", None)


class Extent(NamedTuple):
    """`nbytes` of a file from `offset` go to `at` of a buffer; all three are multiples of ALIGNMENT."""

    file: DirectFile
    offset: int
    nbytes: int
    at: int
