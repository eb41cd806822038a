"""`glm4lite serve`."""

from __future__ import annotations

from contextlib import closing
from typing import Annotated

import typer

from glm4lite.cli import options
from glm4lite.cli.output import nano_remark, rendering


def serve(
    model: options.Model = "nano",
    host: Annotated[str, typer.Option(help="Where to listen; anything but this machine needs a key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes any that is free.")] = 8000,
    api_key: Annotated[
        str | None, typer.Option(envvar="GLM4LITE_API_KEY", help="Asked of every client.", show_default="none")
    ] = None,
    alias: Annotated[
        list[str] | None, typer.Option(help="Another name for the model in requests; may be repeated.")
    ] = None,
    any_model: Annotated[bool, typer.Option("--any-model", help="Answer whatever model a request names.")] = False,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="A name it is reached by, such as host.docker.internal; may be repeated.")
    ] = None,
    allow_origin: Annotated[
        list[str] | None, typer.Option(help="A web page that may ask, such as app://obsidian.md; may be repeated.")
    ] = None,
    queue: Annotated[int, typer.Option(min=1, help="Requests that may wait for those being answered.")] = 512,
    quant: options.Quant = None,
    bits: options.Bits = None,
    fit: options.Fit = None,
    lora: options.Lora = None,
    lora_modules: options.LoraModules = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    kv: options.KV = "auto",
    gpu_memory: options.GpuMemory = None,
    ram: options.Ram = None,
    context: options.Context = None,
    speculate: options.Speculate = "auto",
    draft: options.Draft = None,
    parallel: options.Parallel = None,
    keep_prefixes: options.KeepPrefixes = None,
    threads: options.Threads = None,
) -> None:
    """Serve a model to programs that speak OpenAI's or Anthropic's API."""
    from glm4lite.server import Access, Address
    from glm4lite.server import serve as serve_app

    address = Address(host, port, api_key)
    access = Access(api_key, tuple(allow_host or ()), tuple(allow_origin or ()))
    options.use_threads(threads)
    with closing(address.listen()) as listening, rendering(as_json=False) as renderer:
        from glm4lite.checkpoint.codec_choice import Aim
        from glm4lite.engine.engine import Engine
        from glm4lite.engine.worker import EngineWorker
        from glm4lite.loading.load_options import LoadOptions
        from glm4lite.memory.budget import Budget
        from glm4lite.server import ModelNames, create_app
        from glm4lite.server.launch import name_of, url_of
        from glm4lite.server.loading import Loading

        if model == "nano":
            renderer.remark(nano_remark("serve"))
        budget = Budget.of(gpu_memory, ram, context, kv)
        aim = Aim.of(bits, fit, budget, loads=True)
        loading = Loading(renderer.show)
        loras = options.loras(lora, lora_modules)
        asked = LoadOptions(quant or "auto", device, dtype, loading.show, budget=budget, loras=loras, aim=aim)
        with loading.answering(listening, access):
            engine = Engine.from_options(
                model, asked, speculate=speculate, parallel=parallel, draft=draft, keep_prefixes=keep_prefixes
            )
        name = name_of(model)
        with_adapters = "".join(f", {name}:{adapter}" for adapter in engine.adapters)
        ready = f"{name}{with_adapters} answers at {url_of(listening)}/v1 (Ctrl-C ends)"
        names = ModelNames(name, tuple(alias or ()), any_model, engine.adapters)
        served = create_app(EngineWorker(engine, queue), names, access)
        serve_app(served, listening, lambda: renderer.remark(ready))
