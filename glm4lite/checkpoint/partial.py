"""The folder in which a checkpoint is written until it is whole, `.NAME.partial-XXXXXXXX` beside its place."""

import logging
import os
from contextlib import suppress
from pathlib import Path

from glm4lite.base.owned_folder import LOCK, OwnedFolder, abandoned, owned, remove_tree
from glm4lite.base.sizes import readable

logger = logging.getLogger("glm4lite")


def partial_folder(destination: Path) -> OwnedFolder:
    """OSError where it cannot be made."""
    return OwnedFolder(f".{destination.name}.partial-", destination.parent)


def remove_abandoned(destination: Path) -> None:
    """Removes, with a word, what runs that were killed left beside a destination; what is still written stays."""
    every = ".*.partial-????????"
    for folder in abandoned(destination.parent, every):
        size = _size(folder)
        remove_tree(folder)
        logger.warning("removed %s (%s), which a run that was killed had left", folder, readable(size))
    for folder in owned(destination.parent, every):
        own = folder.name.startswith(f".{destination.name}.partial-")
        if own and not os.path.lexists(folder / LOCK):  # also where another user's folder may not be looked into
            left = readable(_size(folder))
            logger.warning("%s (%s) may be left of an earlier run; remove it if none writes it", folder, left)


def _size(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with suppress(OSError):
            total += path.lstat().st_size
    return total
