"""`glm4lite generate`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from glm4lite.cli import options
from glm4lite.cli.output import rendering
from glm4lite.cli.signals import interrupt_stops
from glm4lite.cli.streams import is_interactive, prompt_text


def generate(
    model: options.Model = "nano",
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="Text to go on from, what stdin holds below it; - is stdin.")
    ] = None,
    quant: options.Quant = None,
    bits: options.Bits = None,
    fit: options.Fit = None,
    lora: options.Lora = None,
    as_json: options.Json = False,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    seed: options.Seed = None,
    max_new_tokens: options.MaxNewTokens = 128,
    stop: options.Stop = None,
    repetition_penalty: options.RepetitionPenalty = None,
    frequency_penalty: options.FrequencyPenalty = None,
    presence_penalty: options.PresencePenalty = None,
    min_new_tokens: Annotated[
        int | None, typer.Option(help="Shortest text, in tokens.", show_default="the checkpoint's")
    ] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on where the model would end.")] = False,
    schema: options.SchemaFile = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    kv: options.KV = "auto",
    gpu_memory: options.GpuMemory = None,
    ram: options.Ram = None,
    context: options.Context = None,
    speculate: options.Speculate = "auto",
    draft: options.Draft = None,
    threads: options.Threads = None,
) -> None:
    """Continue a text, without a chat template (for base models, or to look at a model's raw output)."""
    from glm4lite.chat.completion import Completion
    from glm4lite.checkpoint.codec_choice import Aim
    from glm4lite.engine.engine import Engine
    from glm4lite.engine.sampling import SamplingParams
    from glm4lite.loading.load_options import LoadOptions
    from glm4lite.memory.budget import Budget

    sampling: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "seed": seed}
    sampling |= {"max_new_tokens": max_new_tokens, "stop": tuple(stop or ())}
    sampling |= {"repetition_penalty": repetition_penalty, "frequency_penalty": frequency_penalty}
    sampling |= {"presence_penalty": presence_penalty, "min_new_tokens": min_new_tokens, "ignore_eos": ignore_eos}
    SamplingParams.check(**sampling)
    wanted = options.schema_of(schema)
    options.use_threads(threads)
    budget = Budget.of(gpu_memory, ram, context, kv)
    aim = Aim.of(bits, fit, budget, loads=True)
    with rendering(as_json, raw=True) as renderer:
        asked = LoadOptions(
            quant or "auto", device, dtype, renderer.show, budget=budget, loras=options.loras(lora), aim=aim
        )
        text = "" if prompt is None and is_interactive() else prompt_text(prompt, renderer.remark)
        completion = Completion(Engine.from_options(model, asked, speculate=speculate, draft=draft))
        with interrupt_stops(completion):
            renderer.show_all(completion.run(text, wanted, **sampling))
