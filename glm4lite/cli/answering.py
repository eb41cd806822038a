"""The commands that let a model answer: chat, generate, serve."""

from __future__ import annotations

from contextlib import ExitStack, closing
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from glm4lite.base.errors import ConfigError, Glm4liteError
from glm4lite.base.user_folder import user_folder
from glm4lite.cli import options
from glm4lite.cli.running import interrupt_stops, nano_remark, rendering, use_threads
from glm4lite.cli.streams import InputError, is_interactive, piped_text, streams, typed_text

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from glm4lite.cli.chat.conversation import Conversation
    from glm4lite.cli.chat.keyboard import Keyboard
    from glm4lite.cli.terminal import Renderer


def chat(
    model: options.Model = "nano",
    prompt: options.Prompt = None,
    lines: options.Lines = False,
    quant: options.Quant = None,
    as_json: options.Json = False,
    raw: options.Raw = False,
    no_history: options.NoHistory = False,
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
    """Chat with a model: at a terminal, or one answer to -p, to what is piped, or to both."""
    from glm4lite.cli.chat.conversation import Conversation, Source
    from glm4lite.cli.chat.loop import converse
    from glm4lite.engine.sampling import SamplingParams
    from glm4lite.tools.toolbox import Toolbox

    if lines and prompt is not None:
        raise ConfigError("--lines and -p contradict each other: each line is a turn, or all is one message")
    sampling: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "seed": seed, "stop": tuple(stop or ())}
    sampling["max_new_tokens"] = max_new_tokens
    SamplingParams.check(**sampling)
    use_threads(threads)
    with rendering(as_json, raw) as renderer, ExitStack() as open_tools:
        message = None if lines or (prompt is None and is_interactive()) else _question(prompt, renderer)
        box = open_tools.enter_context(Toolbox(tools or (), mcp or (), not no_tools, approve))
        if model == "nano":
            renderer.remark(nano_remark("chat"))
        limits: dict[str, Any] = {"device": device, "dtype": dtype}
        limits |= {"gpu_memory": gpu_memory, "ram": ram, "context": context, "kv": kv}
        source = Source(model, quant or "auto", limits)
        conversation = Conversation.begin(source, renderer, box.tools, sampling, system, is_interactive())
        if message is None and not as_json and is_interactive() and streams().err.isatty():
            conversation.ask_before_tools()
        if message is None:
            converse(conversation, _keyboard(conversation, no_history))
        else:
            conversation.ask(message)


def generate(
    model: options.Model = "nano",
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="Text to go on from, what stdin holds below it; - is stdin.")
    ] = None,
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
    from glm4lite.chat.completion import Completion
    from glm4lite.engine.engine import Engine
    from glm4lite.engine.sampling import SamplingParams

    sampling: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "seed": seed}
    sampling |= {"max_new_tokens": max_new_tokens, "stop": tuple(stop or ())}
    SamplingParams.check(**sampling)
    use_threads(threads)
    with rendering(as_json, raw=True) as renderer:
        text = "" if prompt is None and is_interactive() else _piped(prompt, renderer)
        limits: dict[str, Any] = {"gpu_memory": gpu_memory, "ram": ram, "context": context, "kv": kv}
        completion = Completion(Engine.load(model, quant or "auto", device, dtype, renderer.show, **limits))
        with interrupt_stops(completion):
            renderer.show_all(completion.run(text, **sampling))


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
        from glm4lite.engine.engine import Engine
        from glm4lite.engine.worker import EngineWorker
        from glm4lite.server import create_app
        from glm4lite.server.launch import name_of, url_of

        if model == "nano":
            renderer.remark(nano_remark("serve"))
        engine = Engine.load(model, quant or "auto", device, dtype, renderer.show, **limits)
        name = name_of(model)
        ready = f"{name} answers at {url_of(listening)}/v1 (Ctrl-C ends)"
        served = create_app(EngineWorker(engine, queue), name, api_key)
        serve_app(served, listening, lambda: renderer.remark(ready))


def _question(prompt: str | None, renderer: Renderer) -> str:
    """The message of one answer: files that -p names are put in; what stdin holds is text."""
    from glm4lite.cli.chat.mentions import with_files

    if prompt is not None and prompt != "-":
        prompt = with_files(prompt, remark=renderer.remark)
    message = _piped(prompt, renderer)
    if not message.strip():
        raise InputError("-p is empty: there is nothing to answer")
    return message


def _piped(prompt: str | None, renderer: Renderer) -> str:
    """The prompt, and below it what stdin holds; `-` is stdin alone, typed where it is a terminal.

    The line end that files and echo have is none of the text's.
    """
    prompt = None if prompt == "-" else prompt
    if prompt is None and is_interactive():
        renderer.remark("(type the text; Ctrl-D on a line of its own ends it)")
        piped = typed_text()
    else:
        piped = piped_text(optional=prompt is not None, remark=renderer.remark)
    piped = piped.rstrip("\n")
    if prompt is None and not piped.strip():
        raise InputError("stdin is empty: give a text there, or with -p")
    return "\n\n".join(text for text in (prompt, piped) if text)


def _keyboard(conversation: Conversation, no_history: bool) -> Keyboard:
    from glm4lite.cli.chat import commands, keyboard

    remark = conversation.renderer.remark
    history = None if no_history or not conversation.by_hand else _history_file(remark)
    return keyboard.opened(partial(commands.offers, conversation), history, remark)


def _history_file(remark: Callable[[str], None]) -> Path | None:
    try:
        return user_folder() / "history"
    except Glm4liteError as error:
        remark(f"(what you type is not kept: {error})")
        return None
