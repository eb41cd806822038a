"""A file that is there whole or not at all, whatever ends the program that writes it.

    write_whole(path, data)                 # as the file's mode was; of a new one as the umask says
    write_whole(path, data, private=True)   # a new one is for this user alone

The bytes go to a file beside it, `.NAME.XXXXXXXX.part`, from there to the disk, and only then get the name: no system
cuts a rename in half. What a process left that was killed in between goes when the file is written again, or with
`remove_leftovers`.
"""

from __future__ import annotations

import errno
import glob
import os
import secrets
import stat
import sys
import time
from contextlib import suppress
from pathlib import Path

_STALE_S = 3600.0  # a file is written in a moment; what is older than this nobody writes any more
_PATIENCE_S = 1.0
_NAME = 40  # characters of the file's name in that of its part, which may be no longer than a name


def write_whole(path: str | Path, data: bytes, private: bool = False) -> None:
    """Makes the file hold `data`. A link is replaced, not followed: what it leads to may be another program's.

    Raises:
        OSError: nothing was changed and nothing is left behind. Also where the file is read-only, which renaming alone
            would not respect, or no plain file, such as a device.
    """
    path = Path(path)
    mode = _mode(path)
    part = path.with_name(f".{path.name[:_NAME]}.{secrets.token_hex(4)}.part")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    descriptor = os.open(part, flags, 0o666 if mode is None and not private else 0o600)
    try:
        with open(descriptor, "wb") as file:
            if mode is not None:
                part.chmod(mode)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)
    remove_leftovers(path.parent, f".{glob.escape(path.name[:_NAME])}.*.part")


def replace(source: Path, target: Path) -> None:
    """Gives a file or folder its place. OSError.

    Windows refuses that while a program has one of them open; virus scanners and indexers do so for a moment with what
    is new, so there it is tried for a second.
    """
    deadline = time.monotonic() + (_PATIENCE_S if sys.platform == "win32" else 0.0)
    while True:
        try:
            return os.replace(source, target)
        except PermissionError:
            if time.monotonic() >= deadline:
                raise
            time.sleep(0.02)


def remove_leftovers(folder: Path, pattern: str = ".*.part") -> None:
    """Removes what processes that were killed left in a folder; what another one may be writing stays."""
    with suppress(OSError):
        for part in folder.glob(pattern):
            with suppress(OSError):
                if part.lstat().st_mtime < time.time() - _STALE_S:
                    part.unlink()


def _mode(path: Path) -> int | None:
    """The mode of what is there, None where nothing is; OSError where it must not be written over."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "it is no plain file", str(path))
    if not path.is_symlink() and not os.access(path, os.W_OK):
        raise PermissionError(errno.EACCES, "the file is read-only", str(path))
    return stat.S_IMODE(mode)


def _sync_folder(folder: Path) -> None:
    """The new name, to the disk too. The file is there whole without it, so a system that cannot do it may leave it."""
    if sys.platform == "win32":
        return
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
