"""`glm4lite list` and `glm4lite rm`: the models on this machine."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from glm4lite.cli import options
from glm4lite.cli.streams import streams


def list_models(
    known: Annotated[bool, typer.Option("--known", help="The models with a short name, and what fits here.")] = False,
    as_json: options.JsonObject = False,
) -> None:
    """The models on this machine; with --known, those that a short name stands for."""
    from glm4lite.cli.terminal import json_line, print_table

    out = streams().out
    if known:
        from glm4lite.loading.known_models import HEADER, known_models

        models = list(known_models())
        if as_json:
            out.write(json_line({"models": [one.to_json() for one in models]}))
        else:
            print_table([HEADER, *(one.row() for one in models)], out)
        return
    from glm4lite.base.sizes import readable
    from glm4lite.hub.local import local_models

    here = local_models()
    if as_json:
        out.write(json_line({"models": [asdict(one) | {"path": str(one.path)} for one in here]}))
    elif here:
        rows = [(one.name, one.state, readable(one.nbytes), str(one.path)) for one in here]
        print_table([("model", "state", "size", "folder"), *rows], out)
    else:
        out.write("no model is on this machine but nano; `glm4lite list --known` names some to pull\n")


def rm(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="As `glm4lite list` names them.")],
) -> None:
    """Remove models from this machine: from the cache that tools share, or what `pull --quant` made."""
    from glm4lite.base.sizes import readable
    from glm4lite.hub.local import remove

    for name in models:
        gone = remove(name)
        streams().out.write(f"removed {gone.name}: {readable(gone.nbytes)}\n")
