"""`glm4lite info`."""

from __future__ import annotations

from typing import Annotated

import typer

from glm4lite.cli.output import print_facts, rendering


def info(
    model: Annotated[str | None, typer.Argument(help="Also describe this checkpoint.")] = None,
) -> None:
    """What this machine has: versions, kernels, devices; with MODEL, its shape and memory needs."""
    from glm4lite.measure.info import machine_facts, model_facts

    facts = machine_facts()
    if model is not None:
        with rendering(as_json=False) as renderer:
            facts += model_facts(model, renderer.show)
    print_facts(facts)
