"""The commands that convert, describe and measure: quantize, info, plan, bench, eval."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from glm4lite.base.errors import ConfigError
from glm4lite.cli import options
from glm4lite.cli.running import print_facts, print_report, rendering, use_threads
from glm4lite.cli.streams import streams
from glm4lite.hub.sources import NANO


def quantize(
    source: Annotated[str, typer.Argument(help="A folder of bfloat16 shards or a Hub repository.")],
    destination: Annotated[Path, typer.Argument(help="A new folder for the quantized checkpoint.")],
    quant: Annotated[str, typer.Option(help="int4 or int8.")] = "int4",
    group_size: Annotated[int, typer.Option(help="Weights per scale: 32, 64 or 128.")] = 32,
    calibration: Annotated[
        Path | None, typer.Option(help="Calibrate int4 with this UTF-8 text instead of the built-in one.")
    ] = None,
    no_calibration: Annotated[
        bool, typer.Option("--no-calibration", help="Look at the weights alone: quicker, less exact.")
    ] = False,
    fast: Annotated[bool, typer.Option("--fast", help="Take each group's whole range: quickest, least exact.")] = False,
    as_json: options.Json = False,
) -> None:
    """Write a pre-quantized checkpoint, which loads at once and needs no conversion."""
    from glm4lite.base.sizes import readable
    from glm4lite.checkpoint.quantization import parse_quant
    from glm4lite.checkpoint.quantize import quantize_checkpoint
    from glm4lite_quant import QuantConfig

    config = parse_quant(quant)
    use_threads(None)
    if calibration is not None and (fast or no_calibration):
        raise ConfigError(f"--calibration and {'--fast' if fast else '--no-calibration'} contradict each other")
    method = "minmax" if fast else "search" if no_calibration else "calibrated"
    with rendering(as_json) as renderer:
        asked = QuantConfig(config.bits, group_size, method=method) if isinstance(config, QuantConfig) else quant
        written = quantize_checkpoint(source, destination, asked, renderer.show, calibration=calibration)
        size = sum(file.stat().st_size for file in written.iterdir())
        command = f"glm4lite chat {shlex.quote(_as_model(written))}"
        renderer.remark(f"{written}: {readable(size)}, {quant}. Run it: {command}")


def _as_model(folder: Path) -> str:
    """The folder as a model's name: a bare one may be the embedded model's, a user's home or an option."""
    bare = str(folder)
    return f"./{bare}" if bare == NANO or bare.startswith(("~", "-")) else bare


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


def plan(
    model: options.Model,
    gpu_memory: options.GpuMemory = None,
    ram: options.Ram = None,
    context: options.Context = None,
    kv: options.KV = "auto",
    quant: options.Quant = None,
    gpu_bandwidth: Annotated[
        str | None, typer.Option(help="In a second, such as 272GB.", show_default="measured, or an RTX 4060's")
    ] = None,
    as_json: options.JsonObject = False,
) -> None:
    """Will it fit, and how fast will it be? Of a model that is not here only a few kilobytes are fetched."""
    from glm4lite.base.sizes import parse_size
    from glm4lite.loading import planner
    from glm4lite.memory.budget import Budget

    budget = Budget.of(gpu_memory, ram, context, kv)
    bandwidth = None if gpu_bandwidth is None else float(parse_size(gpu_bandwidth))
    use_threads(None)
    report = planner.plan(model, quant, budget, bandwidth)
    if not as_json:
        from glm4lite.cli.terminal import print_table

        print_table(list(report.rows()), streams().out)
    print_report(report, as_json)


def bench(
    model: options.Model = "nano",
    prompt_tokens: Annotated[int, typer.Option(help="Length of the prompt.")] = 128,
    new_tokens: Annotated[int, typer.Option(help="Tokens generated after it.")] = 32,
    kv: options.KV = "float",
    gpu_memory: options.GpuMemory = None,
    ram: options.Ram = None,
    device: options.Device = "cpu",
    threads: options.Threads = None,
    quant: options.Quant = None,
    as_json: options.JsonObject = False,
) -> None:
    """Measure speed and memory of a model, and how near it comes to what this machine's memory and disk give."""
    from glm4lite.measure.benchmark import benchmark
    from glm4lite.memory.budget import Budget

    budget = Budget.of(gpu_memory, ram, None, kv)
    use_threads(threads)
    with rendering(as_json=False) as renderer:
        found = benchmark(model, quant, prompt_tokens, new_tokens, renderer.show, budget=budget, device=device)
    print_report(found, as_json)


def evaluate_text(
    model: options.Model,
    text: Annotated[Path, typer.Option(help="A UTF-8 text to predict.")],
    against: Annotated[str | None, typer.Option(help="Compare with this model (the reference).")] = None,
    quant: options.Quant = None,
    against_quant: options.Quant = None,
    windows: Annotated[int | None, typer.Option(help="At most so many windows.", show_default="all")] = None,
    dtype: options.Dtype = "auto",
    against_dtype: options.Dtype = "auto",
    threads: options.Threads = None,
    as_json: options.JsonObject = False,
) -> None:
    """Perplexity on a text, and the KL divergence from another model or precision."""
    from glm4lite.measure.evaluate import Choice, evaluate, read_text

    use_threads(threads)
    reference = None if against is None else Choice(against, against_quant, against_dtype)
    with rendering(as_json=False) as renderer:
        found = evaluate(Choice(model, quant, dtype), read_text(text), reference, windows, renderer.show)
    print_report(found, as_json)
