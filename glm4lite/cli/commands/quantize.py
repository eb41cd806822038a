"""`glm4lite quantize`."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from glm4lite.base.errors import ConfigError
from glm4lite.cli import options
from glm4lite.cli.output import rendering

if TYPE_CHECKING:
    from glm4lite.checkpoint.codec_choice import Aim


def quantize(
    source: Annotated[str, typer.Argument(help="A folder of bfloat16 shards or a Hub repository.")],
    destination: Annotated[Path, typer.Argument(help="A new folder for the quantized checkpoint.")],
    quant: Annotated[str | None, typer.Option(help="int4 or int8.", show_default="int4")] = None,
    bits: options.Bits = None,
    fit: options.Fit = None,
    context: options.Context = None,
    kv: options.KV = "auto",
    group_size: Annotated[int | None, typer.Option(help="Weights per scale: 32, 64 or 128.", show_default="32")] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="Calibrate int4 with this UTF-8 text instead of the built-in one.")
    ] = None,
    no_calibration: Annotated[
        bool, typer.Option("--no-calibration", help="Look at the weights alone: quicker, less exact.")
    ] = False,
    lora: options.Lora = None,
    fast: Annotated[bool, typer.Option("--fast", help="Take each group's whole range: quickest, least exact.")] = False,
    as_json: options.Json = False,
) -> None:
    """Write a pre-quantized checkpoint, which loads at once and needs no conversion."""
    from glm4lite.base.sizes import readable
    from glm4lite.checkpoint.codec_choice import Aim
    from glm4lite.checkpoint.quant_choice import parse_quant
    from glm4lite.checkpoint.quantize import quantize_checkpoint
    from glm4lite.memory.budget import Budget
    from glm4lite_quant import QuantConfig

    config = parse_quant(quant or "int4")
    aim = Aim.of(bits, fit, Budget.of(context=context, kv=kv))
    _check_aim(aim, {"--quant": quant, "--group-size": group_size, "--fast": fast, "--no-calibration": no_calibration})
    if (context is not None or kv != "auto") and fit is None:
        raise ConfigError("--context and --kv are counted for --fit; leave them out, they are given where a model runs")
    options.use_threads(None)
    if calibration is not None and (fast or no_calibration):
        raise ConfigError(f"--calibration and {'--fast' if fast else '--no-calibration'} contradict each other")
    method = "minmax" if fast else "search" if no_calibration else "calibrated"
    with rendering(as_json) as renderer:
        asked = (
            QuantConfig(config.bits, group_size or 32, method=method)
            if isinstance(config, QuantConfig)
            else quant or ""
        )
        written = quantize_checkpoint(
            source, destination, asked, renderer.show, calibration=calibration, lora=lora, aim=aim
        )
        size = sum(file.stat().st_size for file in written.iterdir())
        command = f"glm4lite chat {shlex.quote(_as_model(written))}"
        said = quant or "int4" if aim is None else str(aim)
        renderer.remark(f"{written}: {readable(size)}, {said}. Run it: {command}")


def _check_aim(aim: Aim | None, others: Mapping[str, object]) -> None:
    """ConfigError where bits or memory to fit are given beside what they decide."""
    given = next((name for name, value in others.items() if value), None)
    if aim is not None and given is not None:
        raise ConfigError(f"--{aim.option} and {given} contradict each other; leave one of them out")


def _as_model(folder: Path) -> str:
    """The folder as a model's name: a bare one may be the embedded model's, a user's home or an option."""
    from glm4lite.hub.sources import NANO

    bare = str(folder)
    return f"./{bare}" if bare == NANO or bare.startswith(("~", "-")) else bare
