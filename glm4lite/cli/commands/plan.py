"""`glm4lite plan`."""

from __future__ import annotations

from typing import Annotated

import typer

from glm4lite.cli import options
from glm4lite.cli.output import print_report
from glm4lite.cli.streams import streams


def plan(
    model: options.Model,
    gpu_memory: options.GpuMemory = None,
    ram: options.Ram = None,
    context: options.Context = None,
    kv: options.KV = "auto",
    quant: options.Quant = None,
    bits: options.Bits = None,
    fit: options.Fit = None,
    lora: options.Lora = None,
    lora_modules: options.LoraModules = None,
    gpu_bandwidth: Annotated[
        str | None, typer.Option(help="In a second, such as 272GB.", show_default="measured, or an RTX 4060's")
    ] = None,
    as_json: options.JsonObject = False,
) -> None:
    """Will it fit, and how fast will it be? Of a model that is not here only a few kilobytes are fetched."""
    from glm4lite.base.sizes import parse_size
    from glm4lite.checkpoint.codec_choice import Aim
    from glm4lite.loading import plan_report
    from glm4lite.memory.budget import Budget

    budget = Budget.of(gpu_memory, ram, context, kv)
    bandwidth = None if gpu_bandwidth is None else float(parse_size(gpu_bandwidth))
    options.use_threads(None)
    report = plan_report.plan(
        model, quant, budget, bandwidth, Aim.of(bits, fit, budget), options.loras(lora, lora_modules)
    )
    if not as_json:
        from glm4lite.cli.terminal import print_table

        print_table(list(report.rows()), streams().out)
    print_report(report, as_json)
