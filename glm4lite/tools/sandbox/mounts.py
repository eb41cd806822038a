"""A file system of its own for the process: what Python reads, read-only, and a work folder in memory.

Nothing else of the machine has a path there, so no file can be looked at or changed and no UNIX socket reached,
whatever call is used. There is no /proc either: a Python program needs none. man pages: pivot_root(2),
mount_setattr(2).
"""

import os
import sys
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from struct import pack

if sys.platform == "win32":
    raise ImportError("Windows has none of the sandbox's calls")

from glm4lite.tools.sandbox.kernel import call, syscall

SHARED_MEMORY = "/dev/shm"

_OPEN_TREE, _MOVE_MOUNT, _MOUNT_SETATTR = 428, 429, 442  # Linux 5.12; one number on every machine
_AT_FDCWD, _EMPTY_PATH, _RECURSIVE, _CLONE, _CLOEXEC, _MOVE_FROM_EMPTY_PATH = -100, 0x1000, 0x8000, 1, os.O_CLOEXEC, 4
_RDONLY, _NOSUID, _NODEV, _NOEXEC = 1, 2, 4, 8  # of mount_setattr; mount's second and third are the same
_MS_REC, _MS_PRIVATE, _MNT_DETACH = 16384, 1 << 18, 2


def hide_all_but(readable: Iterable[str], devices: Iterable[str], size: int, owner: int) -> None:
    """Puts this mount namespace into a new root, where the current folder is empty, `owner`'s, and holds `size` bytes.

    /dev/shm, which the locks of multiprocessing need, shares that size. OSError where the system does not allow it;
    the old root is then as it was. RuntimeError where nothing may run.
    """
    folder, places = os.getcwd(), [place for place in readable if os.path.exists(place)]
    call("mount", b"none", b"/", None, _MS_REC | _MS_PRIVATE, None)
    trees = {place: _tree(place, _RDONLY | _NOSUID | _NODEV, _RECURSIVE) for place in _outermost(places)}
    trees |= {device: _tree(device, _RDONLY | _NOSUID | _NOEXEC) for device in devices if os.path.exists(device)}
    options = f"size={size},nr_inodes=4096,mode=0755".encode()
    call("mount", b"tmpfs", os.fsencode(folder), b"tmpfs", _NOSUID | _NODEV, options)
    try:
        root = _build(folder, places, trees, owner)
        os.chdir(root)
        call("pivot_root", b".", b".")
    except OSError:
        os.chdir("/")
        call("umount2", os.fsencode(folder), _MNT_DETACH)
        os.chdir(folder)
        raise
    try:
        call("umount2", b".", _MNT_DETACH)  # the old root, which lies on the new one
        os.chdir(folder)
    except OSError as error:
        raise RuntimeError(f"the old root cannot be left: {error}") from error


def _build(folder: str, places: list[str], trees: dict[str, int], owner: int) -> str:
    """Fills the new file system, mounted at `folder`; returns the path of the new root."""
    root = os.path.join(folder, "root")
    os.mkdir(root)
    _attach(_tree(root, 0), root)
    for place, tree in trees.items():
        _attach(tree, _target(root, place))
    for place, name in ((SHARED_MEMORY, "shared"), (folder, "work")):  # the work folder may lie in /dev/shm
        own = os.path.join(folder, name)
        os.mkdir(own, 0o700)
        os.chown(own, owner, -1)
        target = root + place
        os.makedirs(target, exist_ok=True)
        _attach(_tree(own, _NOSUID | _NODEV), target)
    for place in places:
        _link(root, place)
    _set(_AT_FDCWD, os.fsencode(root), 0, _RDONLY | _NOSUID | _NODEV)
    return root


def _outermost(places: Iterable[str]) -> list[str]:
    """The real paths, without those that lie in another of them."""
    kept = list[str]()
    for place in sorted({os.path.realpath(place) for place in places}):
        if not any(Path(place).is_relative_to(other) for other in kept):
            kept.append(place)
    return kept


def _tree(path: str, attributes: int, recursive: int = 0) -> int:
    """The mounts at `path`, copied but not attached anywhere yet, with more attributes."""
    tree = syscall(_OPEN_TREE, _AT_FDCWD, os.fsencode(path), _CLONE | _CLOEXEC | recursive)
    _set(tree, b"", _EMPTY_PATH | recursive, attributes)
    return tree


def _set(place: int, path: bytes, flags: int, attributes: int) -> None:
    syscall(_MOUNT_SETATTR, place, path, flags, pack("4Q", attributes, 0, 0, 0), 32)


def _attach(tree: int, target: str) -> None:
    syscall(_MOVE_MOUNT, tree, b"", _AT_FDCWD, os.fsencode(target), _MOVE_FROM_EMPTY_PATH)
    os.close(tree)


def _target(root: str, place: str) -> str:
    """Something empty to mount on, of the same kind as `place`, a real path."""
    target = root + place
    if os.path.isdir(place):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with suppress(FileExistsError):
            os.close(os.open(target, os.O_CREAT | os.O_EXCL))
    return target


def _link(root: str, path: str) -> None:
    """Makes the symbolic links that lead to `path` again: a virtual environment's python is one, and often /lib."""
    reached, names = "/", deque(Path(path).parts[1:])
    while names:
        reached = os.path.normpath(os.path.join(reached, names.popleft()))
        if not os.path.islink(reached):
            continue
        to = os.readlink(reached)
        if not os.path.lexists(root + reached):
            os.makedirs(os.path.dirname(root + reached), exist_ok=True)
            os.symlink(to, root + reached)
        reached = os.path.dirname(reached)
        if to.startswith("/"):
            reached = "/"
        names.extendleft(reversed([name for name in to.split("/") if name]))
