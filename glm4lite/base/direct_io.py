"""Files read by position, past the page cache where the system lets us.

Weights that stream from disk for every token would push everything else out of the page cache and still never be found
in it: a scan larger than the cache hits nothing. Reads here go straight into the caller's memory (O_DIRECT on Linux,
F_NOCACHE on macOS, FILE_FLAG_NO_BUFFERING on Windows); where a file system of Linux refuses that, they go through the
cache and its pages are given back.
"""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from typing import NamedTuple

from glm4lite.base.errors import CheckpointError

if sys.platform == "win32":
    from glm4lite.base import windows_io
elif sys.platform == "darwin":
    import fcntl

ALIGNMENT = 4096
"""Offsets, lengths and addresses of direct reads are multiples of this many bytes."""


class DirectFile:
    """An open file whose aligned parts are read into memory; several threads may read at once.

    The file stays the one that was opened: replacing it changes nothing, writing into it is noticed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._fd = self._open()
            self._opened = os.fstat(self._fd)
        except OSError as error:
            raise self._unreadable(error) from None
        self.size = self._opened.st_size

    def _open(self) -> int:
        self.direct = True
        if sys.platform == "win32":
            return windows_io.open_direct(self.path)
        flags = os.O_RDONLY | os.O_CLOEXEC
        if sys.platform == "linux":
            try:
                return os.open(self.path, flags | os.O_DIRECT)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
        fd = os.open(self.path, flags)
        if sys.platform == "darwin":
            fcntl.fcntl(fd, fcntl.F_NOCACHE, 1)
        else:
            self.direct = False
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
            if not self.direct and sys.platform == "linux":
                os.posix_fadvise(self._fd, offset, len(target), os.POSIX_FADV_DONTNEED)
        except OSError as error:
            raise self._unreadable(error) from None

    def _read(self, target: memoryview, offset: int) -> int:
        if sys.platform == "win32":
            return windows_io.read_at(self._fd, target, offset)
        return os.preadv(self._fd, [target], offset)

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


class Extent(NamedTuple):
    """`nbytes` of a file from `offset` go to `at` of a buffer; all three are multiples of ALIGNMENT."""

    file: DirectFile
    offset: int
    nbytes: int
    at: int
