"""`glm4lite export`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from glm4lite.base.errors import ConfigError
from glm4lite.cli import options
from glm4lite.cli.output import rendering

_NEXT = {
    "compressed-tensors": "vllm serve {}",
    "gguf": "llama-server -m {}",
    "hf": "vllm serve {}",
}


def export(
    model: options.Model,
    destination: Annotated[Path, typer.Argument(help="A new folder; for gguf, a new file NAME.gguf.")],
    to: Annotated[
        str,
        typer.Option(
            metavar="FORMAT",
            help="compressed-tensors (4 bits, for vLLM and SGLang), gguf (for llama.cpp), hf (bfloat16).",
            autocompletion=options.among("compressed-tensors", "gguf", "hf"),
        ),
    ],
    kind: Annotated[
        str | None,
        typer.Option(
            "--type",
            help="Of gguf: q4_0, q4_1, q8_0 or bf16.",
            show_default="q4_1",
            autocompletion=options.among("q4_0", "q4_1", "q8_0", "bf16"),
        ),
    ] = None,
    group_size: Annotated[
        int | None, typer.Option(help="Of compressed-tensors: weights per scale.", show_default="32")
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="Calibrate 4 bits with this UTF-8 text instead of the built-in one.")
    ] = None,
    no_calibration: Annotated[
        bool, typer.Option("--no-calibration", help="Look at the weights alone: quicker, less exact.")
    ] = False,
    as_json: options.Json = False,
) -> None:
    """Write a checkpoint for another engine: vLLM, SGLang, llama.cpp, Transformers."""
    from glm4lite.base.sizes import readable
    from glm4lite.export.export import export_checkpoint

    options.use_threads(None)
    if calibration is not None and no_calibration:
        raise ConfigError("--calibration and --no-calibration contradict each other")
    with rendering(as_json) as renderer:
        written = export_checkpoint(
            model,
            destination,
            to,
            kind=kind,
            group_size=group_size,
            progress=renderer.show,
            calibration=calibration,
            calibrate=not no_calibration,
        )
        files = [written] if written.is_file() else list(written.iterdir())
        size = sum(file.stat().st_size for file in files)
        renderer.remark(
            f"{written}: {readable(size)}, {to}. Run it: {_NEXT[to].format(shlex.quote(str(written.resolve())))}"
        )
