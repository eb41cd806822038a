"""Files and folders that go on from what is typed."""

from __future__ import annotations

import os
from collections.abc import Iterator

MOST_OFFERED = 200
_MOST_LOOKED_AT = 5000  # names of one folder


def paths(typed: str) -> Iterator[str]:
    """Files and folders (with "/" behind them) whose path goes on from `typed`, in order; hidden ones if asked for."""
    start = typed.rpartition("/")[2]
    shown = typed[: len(typed) - len(start)]
    try:
        with os.scandir(os.path.expanduser(shown or ".")) as entries:
            names = [
                entry.name + "/" * entry.is_dir()
                for entry, _ in zip(entries, range(_MOST_LOOKED_AT), strict=False)
                if entry.name.startswith(start) and (start or not entry.name.startswith("."))
            ]
    except OSError:
        return
    yield from (shown + name for name in sorted(names)[:MOST_OFFERED] if name.isprintable() and '"' not in name)


def models(typed: str) -> Iterator[str]:
    """What may be named as a model: the embedded one, those with a short name, and folders."""
    from glm4lite.hub.known import KNOWN
    from glm4lite.hub.sources import NANO

    yield from (name for name in (NANO, *(one.name for one in KNOWN)) if name.startswith(typed))
    folders = (path.removesuffix("/") for path in paths(typed) if path.endswith("/"))
    yield from (folder for folder in folders if folder != NANO)
