"""The commands that let a model answer: chat, generate, serve."""

from __future__ import annotations

import difflib
import re
from contextlib import ExitStack, closing, suppress
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from glm4lite.cli import options
from glm4lite.cli.running import interrupt_stops, nano_remark, rendering, use_threads
from glm4lite.cli.streams import InputError, is_interactive, lent_terminal, piped_line, piped_lines, piped_text, streams
from glm4lite.errors import ConfigError, Glm4liteError, one_line

if TYPE_CHECKING:
    from glm4lite.session import ChatSession
    from glm4lite.terminal import Renderer

CHAT_HELP = "/reset forgets the conversation, /exit leaves, Ctrl-C stops an answer."
COMMANDS = {"/reset": "reset", "/clear": "reset", "/exit": "exit", "/quit": "exit", "/help": "help", "/?": "help"}


def chat(
    model: options.Model = "nano",
    prompt: options.Prompt = None,
    lines: options.Lines = False,
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
    """Chat with a model: at a terminal, or one answer to -p, to what is piped, or to both."""
    from glm4lite.approval import TerminalApproval
    from glm4lite.session import ChatSession
    from glm4lite.toolbox import Toolbox

    if lines and prompt is not None:
        raise ConfigError("--lines and -p contradict each other: each line is a turn, or all is one message")
    use_threads(threads)
    with rendering(as_json) as renderer, ExitStack() as open_tools:
        message = None if lines or (prompt is None and is_interactive()) else _message(prompt, renderer)
        box = open_tools.enter_context(Toolbox(tools or (), mcp or (), not no_tools, approve))
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
        if message is None:
            if not as_json and is_interactive() and streams().err.isatty():
                session.approve = TerminalApproval(session, renderer)
            _converse(session, renderer)
        else:
            _answer(session, message, renderer)


def generate(
    model: options.Model = "nano",
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="Text to go on from; what stdin holds comes below it.")
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
    from glm4lite.completion import Completion
    from glm4lite.engine import Engine
    from glm4lite.sampling import SamplingParams

    sampling: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "seed": seed}
    sampling |= {"max_new_tokens": max_new_tokens, "stop": tuple(stop or ())}
    SamplingParams.check(**sampling)
    use_threads(threads)
    with rendering(as_json) as renderer:
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


def _message(prompt: str | None, renderer: Renderer) -> str:
    message = _piped(prompt, renderer)
    if not message.strip():
        raise InputError("-p is empty: there is nothing to answer")
    return message


def _piped(prompt: str | None, renderer: Renderer) -> str:
    """The prompt, and below it what stdin holds; the line end that files and echo have is none of the text's."""
    piped = piped_text(optional=prompt is not None, remark=renderer.remark).rstrip("\n")
    if prompt is None and not piped.strip():
        raise InputError("stdin is empty: give a text there, or with -p")
    return "\n\n".join(text for text in (prompt, piped) if text)


def _answer(session: ChatSession, text: str, renderer: Renderer) -> None:
    with interrupt_stops(session):
        renderer.show_all(session.send(text))


def _converse(session: ChatSession, renderer: Renderer) -> None:
    """Reads lines until /exit or end of input. An error of one turn does not end the conversation."""
    with suppress(ImportError):  # Windows has its own line editing
        import readline  # noqa: F401  # gives input() editing and history
    read = _typed_line if is_interactive() else partial(piped_line, piped_lines())
    renderer.remark(CHAT_HELP)
    while True:
        try:
            line = read()
        except KeyboardInterrupt:
            renderer.remark("\n" + CHAT_HELP)
            continue
        text = line.strip()
        command = COMMANDS.get(text)
        if not line or command == "exit":
            return
        if command == "reset":
            session.reset()
            renderer.remark("(the conversation is forgotten)")
        elif command == "help":
            renderer.remark(CHAT_HELP)
        elif text and not _is_misspelt_command(text, renderer):
            _turn(session, text, renderer)


def _typed_line() -> str:
    """The next line with its end; "" at the end of input."""
    try:
        with lent_terminal():
            return input("> " if streams().out.isatty() else "") + "\n"
    except EOFError:
        return ""


def _is_misspelt_command(text: str, renderer: Renderer) -> bool:
    """A lone word that is nearly a command is worth a hint; all else is a message, such as a path or a comment."""
    if not re.fullmatch(r"/\w+", text):
        return False
    near = difflib.get_close_matches(text, COMMANDS, 1, 0.8)
    said = f"{text} is not a command"
    renderer.remark(f"({said} and was not sent; is it {near[0]}?)" if near else f"({said}: it is sent as a message)")
    return bool(near)


def _turn(session: ChatSession, text: str, renderer: Renderer) -> None:
    try:
        _answer(session, text, renderer)
    except Glm4liteError as error:
        renderer.remark(f"error: {one_line(error)}")
    except KeyboardInterrupt:
        renderer.remark("(interrupted)")
