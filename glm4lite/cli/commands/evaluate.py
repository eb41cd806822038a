"""`glm4lite eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from glm4lite.cli import options
from glm4lite.cli.output import print_report, rendering


def evaluate(
    model: options.Model,
    text: Annotated[Path, typer.Option(help="A UTF-8 text to predict.")],
    against: Annotated[str | None, typer.Option(help="Compare with this model (the reference).")] = None,
    quant: options.Quant = None,
    lora: options.Lora = None,
    against_quant: options.Quant = None,
    windows: Annotated[int | None, typer.Option(help="At most so many windows.", show_default="all")] = None,
    dtype: options.Dtype = "auto",
    against_dtype: options.Dtype = "auto",
    threads: options.Threads = None,
    as_json: options.JsonObject = False,
) -> None:
    """Perplexity on a text, and the KL divergence from another model or precision."""
    from glm4lite.measure.evaluate import Choice, read_text
    from glm4lite.measure.evaluate import evaluate as compared

    options.use_threads(threads)
    reference = None if against is None else Choice(against, against_quant, against_dtype)
    with rendering(as_json=False) as renderer:
        found = compared(
            Choice(model, quant, dtype, tuple(lora or ())), read_text(text), reference, windows, renderer.show
        )
    print_report(found, as_json)
