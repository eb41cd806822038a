"""A folder that one process fills, and what a process that was killed left of one.

A file in it is locked as long as its process lives: the system lets go of the lock however that ends. The number of a
process would not tell, since numbers are used again and each machine has its own.

Windows neither renames nor removes a file that is open, so there the lock is taken a moment after its file is made, and
let go of a moment before the folder gets its place: a file that was touched a short while ago is taken for locked.
"""

import errno
import logging
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Self

from glm4lite.base.whole_file import replace

if sys.platform == "win32":
    import msvcrt

    def _take(descriptor: int) -> None:
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
else:
    import fcntl

    def _take(descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


logger = logging.getLogger("glm4lite")

LOCK = ".glm4lite-lock"
UNFINISHED_FOLDER = ".unfinished"
"""How a folder ends that a later process may go on with."""
_WINDOWS = sys.platform == "win32"
_FRESH_S = 60.0
_OPEN = os.O_RDWR | getattr(os, "O_NOFOLLOW", 0)
Remove = Callable[[Path], None]


def remove_tree(folder: Path) -> None:
    """All of it, as far as that is possible."""
    shutil.rmtree(folder, ignore_errors=True)


class OwnedFolder:
    """A new folder, `prefix` and eight characters, in `parent` (None: the system's for temporary files).

    OSError where it cannot be made.
    """

    def __init__(self, prefix: str, parent: Path | None = None) -> None:
        self.path = Path(os.path.realpath(tempfile.mkdtemp(prefix=prefix, dir=parent)))
        self._lock: int | None = None
        with suppress(OSError):  # a disk without locks
            self._hold()

    @classmethod
    def of(cls, path: Path) -> Self:
        """The folder of a name that goes on where an earlier process left it; a new one where there is none.

        Raises:
            BlockingIOError: another process has it.
            OSError: it cannot be made.
        """
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        self = cls.__new__(cls)
        self.path, self._lock = Path(os.path.realpath(path)), None
        descriptor = os.open(self.path / LOCK, _OPEN | os.O_CREAT, 0o600)
        try:
            _take(descriptor)
        except OSError as error:
            os.close(descriptor)
            if error.errno in (errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS, errno.EINVAL):  # a disk without locks
                return self
            raise BlockingIOError(errno.EAGAIN, "another process has it", str(path)) from None
        self._lock = descriptor
        return self

    def _hold(self) -> None:
        """The lock gets its name when it is held, so that nobody takes it in between."""
        new = self.path / (LOCK if _WINDOWS else f"{LOCK}.new")
        self._lock = os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        _take(self._lock)
        if not _WINDOWS:
            new.rename(self.path / LOCK)

    def files(self) -> list[Path]:
        """What was written."""
        return [path for path in self.path.iterdir() if not path.name.startswith(LOCK)]

    def publish(self, destination: Path) -> None:
        """Gives the folder its place; an empty one may be there."""
        self._release_early()
        for name in (LOCK, f"{LOCK}.new"):
            (self.path / name).unlink(missing_ok=True)
        if destination.exists():
            destination.rmdir()
        replace(self.path, destination)
        self._release()

    def leave(self) -> None:
        """What was written stays, for a later process to go on with."""
        self._release()

    def discard(self, remove: Remove = remove_tree) -> None:
        """Removes what was written."""
        self._release_early()
        remove(self.path)
        self._release()

    def _release_early(self) -> None:
        if _WINDOWS and self._lock is not None:
            with suppress(OSError):
                os.utime(self.path / LOCK)
            self._release()

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def abandoned(parent: Path, pattern: str) -> Iterator[Path]:
    """The folders whose process is gone, of those of a name in `parent`; who removes one may say so."""
    for folder in owned(parent, pattern):
        if is_abandoned(folder / LOCK):
            yield folder


def owned(parent: Path, pattern: str) -> Iterator[Path]:
    """The folders of a name in `parent`."""
    try:
        entries = sorted(parent.glob(pattern))
    except OSError:
        return
    yield from (entry for entry in entries if entry.is_dir() and not entry.is_symlink())


def remove_abandoned_temporary(prefix: str, remove: Remove = remove_tree) -> None:
    """What processes that were killed left among the system's temporary files."""
    for folder in abandoned(Path(tempfile.gettempdir()), f"{prefix}????????"):
        remove(folder)


def is_abandoned(lock: Path) -> bool:
    """Whether a lock's file is there and its process is not."""
    try:
        descriptor = os.open(lock, _OPEN)
    except OSError:
        return False
    try:
        if _WINDOWS and time.time() - os.fstat(descriptor).st_mtime < _FRESH_S:
            return False
        _take(descriptor)
        return not _takes_twice(lock)
    except OSError:
        return False
    finally:
        os.close(descriptor)


def _takes_twice(lock: Path) -> bool:
    """Some network disks give a lock to everyone who asks: there it says nothing."""
    second = os.open(lock, _OPEN)
    try:
        _take(second)
        return True
    except OSError:
        return False
    finally:
        os.close(second)
