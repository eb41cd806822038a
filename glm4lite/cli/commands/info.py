"""`glm4lite info`."""

from __future__ import annotations

from typing import Annotated

import typer

from glm4lite.base.errors import ConfigError
from glm4lite.cli import options
from glm4lite.cli.output import print_facts, rendering


def info(
    model: Annotated[str | None, typer.Argument(help="Also describe this checkpoint.")] = None,
    lora: options.Lora = None,
    lora_modules: options.LoraModules = None,
) -> None:
    """What this machine has: versions, kernels, devices; with MODEL, its shape and memory needs."""
    from glm4lite.measure.info import machine_facts, model_facts

    loras = options.loras(lora, lora_modules)
    if loras and model is None:
        raise ConfigError("adapters are described with their model; give that too")
    facts = machine_facts()
    if model is not None:
        with rendering(as_json=False) as renderer:
            facts += model_facts(model, renderer.show, loras)
    print_facts(facts)
