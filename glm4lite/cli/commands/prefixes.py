"""`glm4lite prefixes`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from glm4lite.base.errors import Glm4liteError, shown
from glm4lite.cli import options
from glm4lite.cli.streams import streams

if TYPE_CHECKING:
    from glm4lite.engine.prefix_files import ModelPrefixes

_KEY = 8  # characters of a key that are shown


def prefixes(
    delete: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY|MODEL|all", help="Delete what is kept of these; may be repeated."),
    ] = None,
    as_json: options.JsonObject = False,
) -> None:
    """What --keep-prefixes has kept on this machine; with --delete, what is left of it."""
    from glm4lite.base.sizes import readable
    from glm4lite.base.user_folder import prefixes_folder
    from glm4lite.cli.terminal import json_line, print_table
    from glm4lite.engine.prefix_files import PrefixFolder

    path = prefixes_folder()
    folder = PrefixFolder(path) if path.exists() else None
    kept = folder.models() if folder is not None else []
    if delete:
        keys = {one.key for name in delete for one in _named(name, kept)}
        if folder is not None:
            folder.delete(keys)
            kept = folder.models()
    out = streams().out
    if as_json:
        out.write(json_line({"folder": str(path), "prefixes": [asdict(one) for one in kept]}))
    elif kept:
        rows = [(one.key[:_KEY], one.model, f"{one.tokens:,}", readable(one.nbytes), _when(one.used)) for one in kept]
        print_table([("key", "model", "tokens", "size", "last used"), *rows], out)
    else:
        out.write("nothing is kept\n")


def _named(name: str, kept: Sequence[ModelPrefixes]) -> Sequence[ModelPrefixes]:
    """Those of a key or its beginning, of a model, or all. Raises Glm4liteError where there is none."""
    if name == "all":
        return kept
    of_key = [one for one in kept if len(name) >= _KEY and one.key.startswith(name)]
    found = of_key or [one for one in kept if name in (one.model, one.model.rpartition(" (")[0])]
    if not found:
        raise Glm4liteError(f"nothing is kept of {shown(name)}; `glm4lite prefixes` lists what is")
    return found


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
