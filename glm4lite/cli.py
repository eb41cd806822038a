"""The `glm4lite` command. Heavy imports happen inside the commands, so that --help answers at once."""

from __future__ import annotations

import io
import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from glm4lite import __version__
from glm4lite.errors import ConfigError, Glm4liteError

if TYPE_CHECKING:
    from glm4lite.benchmark import Benchmark
    from glm4lite.evaluate import Evaluation
    from glm4lite.planner import PlacementReport
    from glm4lite.session import ChatSession
    from glm4lite.terminal import Renderer

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help="Runs GLM-4 models locally."
)

NANO_REMARK = (
    "nano is a tiny demonstration model that comes with glm4lite: it calls tools and makes small talk, no more. "
    "For a 9B: glm4lite chat zai-org/GLM-4-9B-0414"
)
CHAT_HELP = "/reset forgets the conversation, /exit leaves, Ctrl-C stops an answer."

Model = Annotated[str, typer.Argument(help="A folder, a Hub repository such as zai-org/GLM-4-9B-0414, or nano.")]
Quant = Annotated[
    str | None, typer.Option(help="int4, int8, nf4, fp4 or none.", show_default="int4, or as the checkpoint is stored")
]
Prompt = Annotated[str | None, typer.Option("--prompt", "-p", help="Answer this and leave.")]
Json = Annotated[bool, typer.Option("--json", help="Every line of stdout is one event as JSON.")]
System = Annotated[str | None, typer.Option(help="System prompt.")]
Tools = Annotated[
    list[str] | None,
    typer.Option("--tools", metavar="FILE", help="The @tool functions of a file or folder; `python`: run Python code."),
]
NoTools = Annotated[bool, typer.Option("--no-tools", help="Not calculator, current_time and unit_convert.")]
Mcp = Annotated[
    list[Path] | None, typer.Option(metavar="FILE", help="A file with mcpServers, whose tools are offered.")
]
Approve = Annotated[
    str,
    typer.Option(metavar="WHEN", help="ask: for tools that want it; every: before every call; all: nothing is asked."),
]
Temperature = Annotated[float | None, typer.Option(help="0 is greedy.", show_default="the checkpoint's")]
TopP = Annotated[float | None, typer.Option(show_default="the checkpoint's")]
Seed = Annotated[int | None, typer.Option(help="The same seed gives the same text.")]
MaxNewTokens = Annotated[int, typer.Option(help="Longest answer, in tokens.")]
Stop = Annotated[list[str] | None, typer.Option(help="Text that ends the answer; may be repeated.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Dtype = Annotated[str, typer.Option(help="auto, bfloat16 or float32.")]
# Read as text, so that what is no number is answered in one line too.
Threads = Annotated[str | None, typer.Option(metavar="N", help="CPU threads.", show_default="all cores")]
KV = Annotated[str, typer.Option(help="Cache of keys and values: float, int8, or auto (int8 where it would not fit).")]
GpuMemory = Annotated[
    str | None, typer.Option(help="What may be used of each GPU, such as 8GiB.", show_default="what is free")
]
Ram = Annotated[
    str | None,
    typer.Option(help="What may be held in RAM, such as 3GiB; the rest streams.", show_default="what is free"),
]
# Read as text, so that what is no number is answered in one line too.
Context = Annotated[
    str | None, typer.Option(metavar="N", help="Tokens to have memory for.", show_default="8192 with a budget")
]
JsonObject = Annotated[bool, typer.Option("--json", help="Stdout is one JSON object.")]


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(f"glm4lite {__version__}")
        raise typer.Exit


@app.command()
def chat(
    model: Model = "nano",
    prompt: Prompt = None,
    quant: Quant = None,
    as_json: Json = False,
    system: System = None,
    tools: Tools = None,
    no_tools: NoTools = False,
    mcp: Mcp = None,
    approve: Approve = "ask",
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: Seed = None,
    max_new_tokens: MaxNewTokens = 1024,
    stop: Stop = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    kv: KV = "auto",
    gpu_memory: GpuMemory = None,
    ram: Ram = None,
    context: Context = None,
    threads: Threads = None,
) -> None:
    """Chat with a model: interactively, or one answer with -p."""
    from glm4lite.approval import TerminalApproval
    from glm4lite.session import ChatSession
    from glm4lite.toolbox import Toolbox

    _use_threads(threads)
    with _rendering(as_json) as renderer, Toolbox(tools or (), mcp or (), not no_tools, approve) as box:
        if model == "nano":
            renderer.remark(NANO_REMARK)
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


@app.command()
def generate(
    model: Model = "nano",
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="Text to go on from.")] = "",
    quant: Quant = None,
    as_json: Json = False,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: Seed = None,
    max_new_tokens: MaxNewTokens = 128,
    stop: Stop = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    kv: KV = "auto",
    gpu_memory: GpuMemory = None,
    ram: Ram = None,
    context: Context = None,
    threads: Threads = None,
) -> None:
    """Continue a text, without a chat template (for base models, or to look at a model's raw output)."""
    from glm4lite.completion import Completion
    from glm4lite.engine import Engine
    from glm4lite.sampling import SamplingParams

    sampling: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "seed": seed}
    sampling |= {"max_new_tokens": max_new_tokens, "stop": tuple(stop or ())}
    SamplingParams.check(**sampling)
    _use_threads(threads)
    with _rendering(as_json) as renderer:
        limits: dict[str, Any] = {"gpu_memory": gpu_memory, "ram": ram, "context": context, "kv": kv}
        completion = Completion(Engine.load(model, quant or "auto", device, dtype, renderer.show, **limits))
        with _interrupt_stops(completion):
            renderer.show_all(completion.run(prompt, **sampling))


@app.command()
def serve(
    model: Model = "nano",
    host: Annotated[str, typer.Option(help="Where to listen; anything but this machine needs a key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes any that is free.")] = 8000,
    api_key: Annotated[
        str | None, typer.Option(envvar="GLM4LITE_API_KEY", help="Asked of every client.", show_default="none")
    ] = None,
    queue: Annotated[int, typer.Option(min=1, help="Requests that may wait for the one being answered.")] = 8,
    quant: Quant = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    kv: KV = "auto",
    gpu_memory: GpuMemory = None,
    ram: Ram = None,
    context: Context = None,
    threads: Threads = None,
) -> None:
    """Serve a model to programs that speak OpenAI's API."""
    from glm4lite.server import Address
    from glm4lite.server import serve as serve_app

    address = Address(host, port, api_key)
    _use_threads(threads)
    limits: dict[str, Any] = {"gpu_memory": gpu_memory, "ram": ram, "context": context, "kv": kv}
    with closing(address.listen()) as listening, _rendering(as_json=False) as renderer:
        from glm4lite.engine import Engine
        from glm4lite.server import create_app
        from glm4lite.server.launch import url_of
        from glm4lite.worker import EngineWorker

        if model == "nano":
            renderer.remark(NANO_REMARK)
        engine = Engine.load(model, quant or "auto", device, dtype, renderer.show, **limits)
        name = model if not Path(model).is_dir() else Path(model).resolve().name
        ready = f"{name} answers at {url_of(listening)}/v1 (Ctrl-C ends)"
        served = create_app(EngineWorker(engine, queue), name, api_key)
        serve_app(served, listening, lambda: renderer.remark(ready))


@app.command()
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
    as_json: Json = False,
) -> None:
    """Write a pre-quantized checkpoint, which loads at once and needs no conversion."""
    from glm4lite.weights.memory import readable
    from glm4lite.weights.plan import parse_quant
    from glm4lite.weights.quantized import quantize_checkpoint
    from glm4lite_quant import QuantConfig

    config = parse_quant(quant)
    _use_threads(None)
    if calibration is not None and (fast or no_calibration):
        raise ConfigError(f"--calibration and {'--fast' if fast else '--no-calibration'} contradict each other")
    method = "minmax" if fast else "search" if no_calibration else "calibrated"
    with _rendering(as_json) as renderer:
        asked = QuantConfig(config.bits, group_size, method=method) if isinstance(config, QuantConfig) else quant
        written = quantize_checkpoint(source, destination, asked, renderer.show, calibration=calibration)
        size = sum(file.stat().st_size for file in written.iterdir())
        renderer.remark(f"{written}: {readable(size)}, {quant}. Run it: glm4lite chat {written}")


@app.command()
def info(
    model: Annotated[str | None, typer.Argument(help="Also describe this checkpoint.")] = None,
) -> None:
    """What this machine has: versions, kernels, devices; with MODEL, its shape and memory needs."""
    from glm4lite.info import machine_facts, model_facts

    facts = machine_facts()
    if model is not None:
        with _rendering(as_json=False) as renderer:
            facts += model_facts(model, renderer.show)
    _print_facts(facts)


@app.command()
def plan(
    model: Model,
    gpu_memory: GpuMemory = None,
    ram: Ram = None,
    context: Context = None,
    kv: KV = "auto",
    quant: Quant = None,
    gpu_bandwidth: Annotated[
        str | None, typer.Option(help="In a second, such as 272GB.", show_default="measured, or an RTX 4060's")
    ] = None,
    as_json: JsonObject = False,
) -> None:
    """Will it fit, and how fast will it be? Of a model that is not here only a few kilobytes are fetched."""
    from glm4lite.budget import Budget
    from glm4lite.planner import plan as make_plan
    from glm4lite.weights.memory import parse_size

    budget = Budget.of(gpu_memory, ram, context, kv)
    bandwidth = None if gpu_bandwidth is None else float(parse_size(gpu_bandwidth))
    _use_threads(None)
    report = make_plan(model, quant, budget, bandwidth)
    if not as_json:
        from glm4lite.terminal import print_table

        print_table(list(report.rows()))
    _print_report(report, as_json)


@app.command()
def bench(
    model: Model = "nano",
    prompt_tokens: Annotated[int, typer.Option(help="Length of the prompt.")] = 128,
    new_tokens: Annotated[int, typer.Option(help="Tokens generated after it.")] = 32,
    kv: KV = "float",
    gpu_memory: GpuMemory = None,
    ram: Ram = None,
    device: Device = "cpu",
    threads: Threads = None,
    quant: Quant = None,
    as_json: JsonObject = False,
) -> None:
    """Measure speed and memory of a model, and how near it comes to what this machine's memory and disk give."""
    from glm4lite.benchmark import benchmark
    from glm4lite.budget import Budget

    budget = Budget.of(gpu_memory, ram, None, kv)
    _use_threads(threads)
    with _rendering(as_json=False) as renderer:
        found = benchmark(model, quant, prompt_tokens, new_tokens, renderer.show, budget=budget, device=device)
    _print_report(found, as_json)


@app.command(name="eval")
def evaluate_text(
    model: Model,
    text: Annotated[Path, typer.Option(help="A UTF-8 text to predict.")],
    against: Annotated[str | None, typer.Option(help="Compare with this model (the reference).")] = None,
    quant: Quant = None,
    against_quant: Quant = None,
    windows: Annotated[int | None, typer.Option(help="At most so many windows.", show_default="all")] = None,
    dtype: Dtype = "auto",
    against_dtype: Dtype = "auto",
    threads: Threads = None,
    as_json: JsonObject = False,
) -> None:
    """Perplexity on a text, and the KL divergence from another model or precision."""
    from glm4lite.evaluate import Choice, evaluate, read_text

    _use_threads(threads)
    reference = None if against is None else Choice(against, against_quant, against_dtype)
    with _rendering(as_json=False) as renderer:
        found = evaluate(Choice(model, quant, dtype), read_text(text), reference, windows, renderer.show)
    _print_report(found, as_json)


def _use_threads(count: str | None) -> None:
    """Threads of torch and of the kernels; what this machine does not have is refused, also in the environment."""
    from glm4lite.errors import ConfigError
    from glm4lite_quant.kernels import check_environment, native

    check_environment()
    if count is None:
        return
    try:
        number = int(count)
    except ValueError:
        raise ConfigError(f"--threads is {count[:100]!r}; use a whole number of at least 1") from None
    native.set_threads(number)


def _print_report(report: Benchmark | Evaluation | PlacementReport, as_json: bool) -> None:
    """One JSON object, or aligned lines."""
    import json

    if as_json:
        typer.echo(json.dumps(report.to_json(), ensure_ascii=False))
    else:
        _print_facts(list(report.lines()))


def _print_facts(facts: list[tuple[str, str]]) -> None:
    from glm4lite.terminal import printable_line

    width = max(len(name) for name, _ in facts)
    for name, value in facts:
        typer.echo(f"{name:<{width}}  {printable_line(value)}")


@contextmanager
def _rendering(as_json: bool) -> Iterator[Renderer]:
    """Where events go; the terminal is left in order whatever happens."""
    from glm4lite.terminal import JsonLines, Notices, Terminal

    renderer: Renderer = JsonLines() if as_json else Terminal()
    logging.getLogger("glm4lite").addHandler(notices := Notices())
    try:
        yield renderer
    finally:
        logging.getLogger("glm4lite").removeHandler(notices)
        renderer.close()


def _answer(session: ChatSession, text: str, renderer: Renderer) -> None:
    with _interrupt_stops(session):
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


@contextmanager
def _interrupt_stops(answering: Any) -> Iterator[None]:
    """Ctrl-C ends the answer, not the program; a second one during the same answer interrupts for good."""

    def on_interrupt(*_: object) -> None:
        signal.signal(signal.SIGINT, previous)
        answering.stop()

    previous = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def _user_errors() -> tuple[type[BaseException], ...]:
    """Errors shown as one line. The quant package's own is known only once it (and torch) is imported."""
    quant = sys.modules.get("glm4lite_quant")
    return (Glm4liteError,) if quant is None else (Glm4liteError, quant.QuantError)


def _add_commands() -> None:
    """Commands of other packages, from the entry-point group `glm4lite.commands`: so that nothing here imports them."""
    for entry in entry_points(group="glm4lite.commands"):
        app.command(name=entry.name)(entry.load())


def main() -> None:
    """Runs the command line; a user's mistake is one line on stderr and exit code 2."""
    # torch's threads would otherwise spin after each of their loops and take the cores from the kernels' own pool:
    # silu(linear(x)) of 64 rows took 8 to 14 ms with it and 5 ms without, on two cores. Read when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    _speak_utf8()
    _add_commands()
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if not isinstance(error, _user_errors()):
            raise
        from glm4lite.terminal import printable_line

        sys.stderr.write(f"error: {printable_line(error)}\n")
        sys.exit(2)


def _speak_utf8() -> None:
    """Answers are in any language, whatever the terminal's code page; bytes that are no text do not end a chat."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="replace")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
