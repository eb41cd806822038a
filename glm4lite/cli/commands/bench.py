"""`glm4lite bench`."""

from __future__ import annotations

from typing import Annotated

import typer

from glm4lite.cli import options
from glm4lite.cli.output import print_report, rendering


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
    lora: options.Lora = None,
    as_json: options.JsonObject = False,
) -> None:
    """Measure speed and memory of a model, and how near it comes to what this machine's memory and disk give."""
    from glm4lite.measure.benchmark import benchmark
    from glm4lite.memory.budget import Budget

    budget = Budget.of(gpu_memory, ram, None, kv)
    options.use_threads(threads)
    with rendering(as_json=False) as renderer:
        loras = options.loras(lora)
        counts = prompt_tokens, new_tokens
        found = benchmark(model, quant, *counts, renderer.show, budget=budget, device=device, loras=loras)
    print_report(found, as_json)
