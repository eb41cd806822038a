"""The folder in which something is written until it is whole, and what a run that was killed left of one.

A file in it is locked as long as its process lives: the system lets go of the lock however that ends. The number of a
process would not tell, since numbers are used again and each machine has its own. Where there are no such locks
(Windows), what was left is named and not removed.
"""

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from glm4lite.weights.memory import readable

try:
    import fcntl
except ImportError:
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger("glm4lite")

LOCK = ".glm4lite-lock"


class PartialFolder:
    """`.NAME.partial-XXXXXXXX` beside where the folder NAME will be. OSError where it cannot be made."""

    def __init__(self, destination: Path) -> None:
        self.path = Path(tempfile.mkdtemp(prefix=f".{destination.name}.partial-", dir=destination.parent))
        self._lock: int | None = None
        with suppress(OSError):  # a disk without locks
            self._hold()

    def _hold(self) -> None:
        """The lock gets its name when it is held, so that nobody takes it in between."""
        if fcntl is None:
            return
        new = self.path / f"{LOCK}.new"
        self._lock = os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        new.rename(self.path / LOCK)

    def files(self) -> list[Path]:
        """What was written."""
        return [path for path in self.path.iterdir() if not path.name.startswith(LOCK)]

    def publish(self, destination: Path) -> None:
        """Gives the folder its place; an empty one may be there."""
        for name in (LOCK, f"{LOCK}.new"):
            (self.path / name).unlink(missing_ok=True)
        if destination.exists():
            destination.rmdir()
        self.path.rename(destination)
        self._release()

    def discard(self) -> None:
        """Removes what was written."""
        shutil.rmtree(self.path, ignore_errors=True)
        self._release()

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def remove_abandoned(destination: Path) -> None:
    """Removes, with a word, what runs that were killed left beside a destination; what is still written stays."""
    for folder in _partial_folders(destination.parent):
        size = _size(folder)
        if not os.path.lexists(folder / LOCK):  # also where another user's folder may not be looked into
            if folder.name.startswith(f".{destination.name}.partial-"):
                logger.warning(
                    "%s (%s) may be left of an earlier run; remove it if none writes it", folder, readable(size)
                )
        elif is_abandoned(folder / LOCK):
            shutil.rmtree(folder, ignore_errors=True)
            logger.warning("removed %s (%s), which a run that was killed had left", folder, readable(size))


def _partial_folders(parent: Path) -> Iterator[Path]:
    try:
        entries = sorted(parent.glob(".*.partial-????????"))
    except OSError:
        return
    yield from (entry for entry in entries if entry.is_dir() and not entry.is_symlink())


def is_abandoned(lock: Path) -> bool:
    """Whether a lock's file is there and its process is not."""
    if fcntl is None:
        return False
    try:
        descriptor = os.open(lock, os.O_RDWR | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return not _takes_twice(lock)
    except OSError:
        return False
    finally:
        os.close(descriptor)


def _takes_twice(lock: Path) -> bool:
    """Some network disks give a lock to everyone who asks: there it says nothing."""
    second = os.open(lock, os.O_RDWR | os.O_NOFOLLOW)
    try:
        fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError:
        return False
    finally:
        os.close(second)


def _size(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with suppress(OSError):
            total += path.lstat().st_size
    return total
