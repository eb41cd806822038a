"""New files take the place of old ones in a folder: all of them, or, where that fails, none.

No system renames several files at once. So config.json, without which a folder is no checkpoint, leaves first and comes
last: a process that is killed in between leaves a folder that is refused, never a mixture that is read.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Sequence
from pathlib import Path

from glm4lite.base.files import CONFIG, INDEX, SINGLE
from glm4lite.base.whole_file import replace

_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors", re.ASCII)


def replace_files(folder: Path, new: Sequence[Path], aside: Path) -> None:
    """Moves the `new` files into `folder`; what they replace, older weights too, goes into `aside`, a new folder.

    Both lie on the folder's own disk. OSError, or whatever else interrupts it, leaves everything as it was.
    """
    names = sorted((path.name for path in new), key=lambda name: name == CONFIG)
    old = [name for name in os.listdir(folder) if name in names or _holds_weights(name)]
    for name in old:
        if (folder / name).is_dir() and not (folder / name).is_symlink():
            raise OSError(errno.EISDIR, f"{name} is a folder")
    moves = [(folder / name, aside / name) for name in sorted(old, key=lambda name: name != CONFIG)]
    moves += [(next(path for path in new if path.name == name), folder / name) for name in names]
    aside.mkdir()
    begun: list[tuple[Path, Path]] = []
    try:
        for source, target in moves:
            begun.append((source, target))
            replace(source, target)
    except BaseException:
        for source, target in reversed(begun):
            if os.path.lexists(target) and not os.path.lexists(source):
                replace(target, source)
        raise


def _holds_weights(name: str) -> bool:
    """Whether a model would be read from it, so that it must not stay beside another's files."""
    return name in (SINGLE, INDEX) or _SHARD.fullmatch(name) is not None
