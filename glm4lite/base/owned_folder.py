"""A folder that one process fills, and what a process that was killed left of one.

A file in it is locked as long as its process lives: the system lets go of the lock however that ends. The number of a
process would not tell, since numbers are used again and each machine has its own. Where there are no such locks
(Windows), what was left is named and not removed.
"""

import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

try:
    import fcntl
except ImportError:
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger("glm4lite")

LOCK = ".glm4lite-lock"
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

    def discard(self, remove: Remove = remove_tree) -> None:
        """Removes what was written."""
        remove(self.path)
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
