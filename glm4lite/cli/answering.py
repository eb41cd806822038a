"""The commands that let a model answer: chat, generate, serve."""

from __future__ import annotations

import sys
from contextlib import closing, suppress
from typing import TYPE_CHECKING, Annotated, Any

import typer

from glm4lite.cli import options
from glm4lite.cli.running import interrupt_stops, nano_remark, rendering, use_threads
from glm4lite.errors import Glm4liteError

if TYPE_CHECKING:
    from glm4lite.session import ChatSession
    from glm4lite.terminal import Renderer

CHAT_HELP = "/reset forgets the conversation, /exit leaves, Ctrl-C stops an answer."


def chat(
    model: options.Model = "nano",
    prompt: options.Prompt = None,
    quant: options.Quant = None,
    as_json: options.Json = False,
    system: options.System = None,
    tools: options.Tools = None,
    no_tools: options.NoTools = False,
    mcp: options.Mcp = None,
    approve: options.Approve = "ask",
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    seed: options.Seed = None,
    max_new_tokens: options.MaxNewTokens = 1024,
    stop: options.Stop = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    kv: options.KV = "auto",
    gpu_memory: options.GpuMemory = None,
    ram: options.Ram = None,
    context: options.Context = None,
    threads: options.Threads = None,
) -> None:
    """Chat with a model: interactively, or one answer with -p."""
    from glm4lite.approval import TerminalApproval
    from glm4lite.session import ChatSession
    from glm4lite.toolbox import Toolbox

    use_threads(threads)
    with rendering(as_json) as renderer, Toolbox(tools or (), mcp or (), not no_tools, approve) as box:
        if model == "nano":
            renderer.remark(nano_remark("chat"))
        session = ChatSession.load(
            model,
            quant=quant or "auto",
            tools=box.tools,
            system=system,
            device=device,
            dtype=dtype,
            progress=renderer.show,
            kv=kv,
            gpu_memory=gpu_memory,
            ram=ram,
            context=context,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            stop=tuple(stop or ()),
            max_new_tokens=max_new_tokens,
        )
        if box.tools and not session.template.takes_tools:
            renderer.remark("(this model's chat template has no place for tools: they are not offered)")
        if prompt is None:
            if not as_json and sys.stdin.isatty() and sys.stderr.isatty():
                session.approve = TerminalApproval(session, renderer)
            _converse(session, renderer)
        else:
            _answer(session, prompt, renderer)


def generate(
    model: options.Model = "nano",
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="Text to go on from.")] = "",
    quant: options.Quant = None,
    as_json: options.Json = False,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    seed: options.Seed = None,
    max_new_tokens: options.MaxNewTokens = 128,
    stop: options.Stop = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    kv: options.KV = "auto",
    gpu_memory: options.GpuMemory = None,
    ram: options.Ram = None,
    context: options.Context = None,
    threads: options.Threads = None,
) -> None:
    """Continue a text, without a chat template (for base models, or to look at a model's raw output)."""
    from glm4lite.completion import Completion
    from glm4lite.engine import Engine
    from glm4lite.sampling import SamplingParams

    sampling: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "seed": seed}
    sampling |= {"max_new_tokens": max_new_tokens, "stop": tuple(stop or ())}
    SamplingParams.check(**sampling)
    use_threads(threads)
    with rendering(as_json) as renderer:
        limits: dict[str, Any] = {"gpu_memory": gpu_memory, "ram": ram, "context": context, "kv": kv}
        completion = Completion(Engine.load(model, quant or "auto", device, dtype, renderer.show, **limits))
        with interrupt_stops(completion):
            renderer.show_all(completion.run(prompt, **sampling))


def serve(
    model: options.Model = "nano",
    host: Annotated[str, typer.Option(help="Where to listen; anything but this machine needs a key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes any that is free.")] = 8000,
    api_key: Annotated[
        str | None, typer.Option(envvar="GLM4LITE_API_KEY", help="Asked of every client.", show_default="none")
    ] = None,
    queue: Annotated[int, typer.Option(min=1, help="Requests that may wait for the one being answered.")] = 8,
    quant: options.Quant = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    kv: options.KV = "auto",
    gpu_memory: options.GpuMemory = None,
    ram: options.Ram = None,
    context: options.Context = None,
    threads: options.Threads = None,
) -> None:
    """Serve a model to programs that speak OpenAI's API."""
    from glm4lite.server import Address
    from glm4lite.server import serve as serve_app

    address = Address(host, port, api_key)
    use_threads(threads)
    limits: dict[str, Any] = {"gpu_memory": gpu_memory, "ram": ram, "context": context, "kv": kv}
    with closing(address.listen()) as listening, rendering(as_json=False) as renderer:
        from glm4lite.engine import Engine
        from glm4lite.server import create_app
        from glm4lite.server.launch import name_of, url_of
        from glm4lite.worker import EngineWorker

        if model == "nano":
            renderer.remark(nano_remark("serve"))
        engine = Engine.load(model, quant or "auto", device, dtype, renderer.show, **limits)
        name = name_of(model)
        ready = f"{name} answers at {url_of(listening)}/v1 (Ctrl-C ends)"
        served = create_app(EngineWorker(engine, queue), name, api_key)
        serve_app(served, listening, lambda: renderer.remark(ready))


def _answer(session: ChatSession, text: str, renderer: Renderer) -> None:
    with interrupt_stops(session):
        renderer.show_all(session.send(text))


def _converse(session: ChatSession, renderer: Renderer) -> None:
    """Reads lines until /exit or end of input. An error of one turn does not end the conversation."""
    with suppress(ImportError):  # Windows has its own line editing
        import readline  # noqa: F401  # gives input() editing and history
    renderer.remark(CHAT_HELP)
    while True:
        try:
            line = input("> " if sys.stdin.isatty() and sys.stdout.isatty() else "").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            renderer.remark("\n" + CHAT_HELP)
            continue
        if line == "/exit":
            return
        if line == "/reset":
            session.reset()
            renderer.remark("(the conversation is forgotten)")
        elif line.startswith("/"):
            renderer.remark(f"{line.split()[0]} is not a command. {CHAT_HELP}")
        elif line:
            try:
                _answer(session, line, renderer)
            except Glm4liteError as error:
                renderer.remark(f"error: {error}")
            except KeyboardInterrupt:
                renderer.remark("(interrupted)")
