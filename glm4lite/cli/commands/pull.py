"""`glm4lite pull`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

import typer

from glm4lite.base.errors import ConfigError, HubError
from glm4lite.cli import options
from glm4lite.cli.output import rendering


def pull(
    model: options.Model,
    quant: Annotated[
        str | None,
        typer.Option(
            help="int4 or int8: quantized while it arrives, so that the whole model never lies on the disk.",
            show_default="as it is",
        ),
    ] = None,
    bits: options.Bits = None,
    fit: options.Fit = None,
    context: options.Context = None,
    kv: options.KV = "auto",
    to: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Where the quantized model goes.", show_default="by its name")
    ] = None,
    host: Annotated[
        str | None, typer.Option("--from", metavar="HOST", help="hub or modelscope.", show_default="hub")
    ] = None,
    lora: options.Lora = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit.", show_default="the newest")] = None,
    as_json: options.Json = False,
) -> None:
    """Download a model, verified; what was stopped or killed goes on where it was. Of GGUF give ORG/NAME:Q4_K_M.

    With --bits or --fit all of it is fetched into the cache first, since choosing goes through all layers.
    """
    from glm4lite.checkpoint.codec_choice import Aim
    from glm4lite.hub.options import HubOptions
    from glm4lite.hub.sources import locate
    from glm4lite.memory.budget import Budget

    if host not in (None, "hub", "modelscope"):
        raise ConfigError(f"--from is {host[:100]!r}; use hub or modelscope")
    aim = Aim.of(bits, fit, Budget.of(context=context, kv=kv))
    if aim is not None and quant is not None:
        raise ConfigError(f"--quant and --{aim.option} contradict each other; leave one of them out")
    if (context is not None or kv != "auto") and fit is None:
        raise ConfigError("--context and --kv are counted for --fit; leave them out, they are given where a model runs")
    if lora and quant is None and aim is None:
        raise ConfigError(
            "--lora is for --quant, --bits and --fit: a model that stays as it is takes adapters where it is run"
        )
    options.loras(lora)
    found = locate(model)
    if isinstance(found, Path):
        raise HubError(f"{model} is on this machine already ({found})")
    if host == "modelscope":
        from glm4lite.hub.known import on_modelscope

        found = on_modelscope(found)
    asked = HubOptions(revision=revision)
    with rendering(as_json) as renderer:
        if quant is None and aim is None:
            if to is not None:
                raise ConfigError(
                    "--to is for --quant, --bits and --fit: a model that stays as it is lies in the cache of all tools"
                )
            from glm4lite.base.sizes import readable
            from glm4lite.hub.sources import resolve

            written, name = resolve(found, renderer.show, asked), found
        else:
            from glm4lite.base.sizes import readable
            from glm4lite.base.user_folder import models_folder
            from glm4lite.checkpoint.quantize import quantize_checkpoint

            options.use_threads(None)
            called = "-".join([_called(found), *map(_adapter, lora or ()), quant or _suffix(bits, fit)])
            target = models_folder() / called if to is None else to
            written = quantize_checkpoint(found, target, quant or "int4", renderer.show, hub=asked, lora=lora, aim=aim)
            name = called if to is None else str(to)
        files = [written] if written.is_file() else [path for path in written.iterdir() if path.is_file()]
        size = sum(path.stat().st_size for path in files)
        renderer.remark(f"{written}: {readable(size)}. Run it: glm4lite chat {shlex.quote(name)}")


def _suffix(bits: str | None, fit: str | None) -> str:
    """What a model's name ends in: "3.5bits", "12GiB"."""
    return f"{float(bits):g}bits" if bits is not None else (fit or "").replace(" ", "")


def _adapter(text: str) -> str:
    """What an adapter adds to the name: its own, and its scale where that is not 1."""
    from glm4lite.checkpoint.lora.folder import with_scale

    source, scale = with_scale(text)
    name = Path(source).resolve().name if Path(source).is_dir() else source.rpartition("/")[2]
    return name if scale == 1 else f"{name}-{scale:g}"


def _called(found: str) -> str:
    """What a model is called where it lies quantized: by its repo, or by its GGUF file."""
    from glm4lite.hub.sources import is_url

    name = urlsplit(found).path if is_url(found) else found
    return name.rpartition("/")[2].removesuffix(".gguf").replace(":", "-")
