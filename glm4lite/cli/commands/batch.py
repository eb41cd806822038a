"""`glm4lite batch`: OpenAI's batch files, answered here, by a server, or by the workers of a Ray cluster.

OUT is all the state there is: a request whose custom_id it has is done, whatever the line says of it. Exit code 3 where
the end was reached and lines of OUT are errors.
"""

from __future__ import annotations

import os
import time
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from typing import TYPE_CHECKING, Annotated, BinaryIO

import typer

from glm4lite.base.errors import ConfigError, shown
from glm4lite.cli import options
from glm4lite.cli.output import nano_remark, rendering
from glm4lite.cli.streams import InputError, streams

if TYPE_CHECKING:
    from rich.progress import Progress

    from glm4lite.cli.batch_results import Results
    from glm4lite.cli.terminal import Renderer
    from glm4lite.server.batch.cluster import Cluster
    from glm4lite.server.batch.lines import LineError, Request, Result
    from glm4lite.server.batch.running import Source

SOME_FAILED = 3
MOST_IGNORED = 20  # names that are said
LOG_S = 10.0  # between two lines about the progress where stderr is no terminal


def batch(
    ctx: typer.Context,
    requests: Annotated[str, typer.Argument(metavar="IN.jsonl", help="OpenAI's batch lines; - is stdin.")],
    answers: Annotated[
        str, typer.Argument(metavar="OUT.jsonl", help="Added to; what it has is not answered again. - is stdout.")
    ],
    model: options.NamedModel = "nano",
    server: Annotated[
        str | None,
        typer.Option(
            metavar="URL", help="Ask this OpenAI server, such as vLLM's, and load no model.", show_default="none"
        ),
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="GLM4LITE_API_KEY", help="What --server asks of clients.", show_default="none")
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="local|auto|HOST:PORT",
            help="Spread the work over a Ray cluster: one for this run, this machine's, or that of this head.",
            show_default="none",
        ),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Of --ray, each with a model.", show_default="one for each GPU or machine")
    ] = None,
    quant: options.Quant = None,
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
    parallel: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Answers computed at once by each model.",
            show_default="4 on a CPU, 1 with a GPU, 32 of --server",
        ),
    ] = None,
    threads: options.Threads = None,
) -> None:
    """Answer a file of requests in OpenAI's batch format. The same command goes on where it was stopped."""
    from glm4lite.cli.batch_results import opened
    from glm4lite.memory.budget import Budget
    from glm4lite.server.batch.client import AT_ONCE, Server
    from glm4lite.server.batch.cluster import Cluster
    from glm4lite.server.batch.local import Model
    from glm4lite.server.launch import name_of

    _refuse_ignored(ctx, server, ray)
    who: Source
    if server is None:
        budget, number = Budget.of(gpu_memory, ram, context, kv), options.thread_count(threads)
        found, guesser = _everywhere(model), draft and _everywhere(draft)
        adapters = options.loras(
            [_adapter_everywhere(one) for one in lora or ()], [_choice_everywhere(one) for one in lora_modules or ()]
        )
        who = Model(found, name_of(model), quant, device, dtype, budget, speculate, guesser, parallel, number, adapters)
    else:
        who = Server(server, api_key, parallel or AT_ONCE)
    cluster = None if ray is None else Cluster(ray, workers)
    with rendering(as_json=False) as renderer, ExitStack() as stack:
        source = stack.enter_context(_source(requests, answers))
        results = stack.enter_context(opened(answers))
        if results.held.cut:
            renderer.remark(f"({answers} ended in the middle of a line, which was dropped: it is answered again)")
        if results.held:
            renderer.remark(f"{answers} holds {len(results.held):,} results; those are not answered again")
        if server is None and model == "nano":
            renderer.remark(nano_remark("batch IN.jsonl OUT.jsonl --model"))
        run = _Run(renderer, results, total=_count(source))
        with run.saying_how_to_go_on():
            run.answer(who, cluster, source)
    if results.held.failed:
        raise typer.Exit(SOME_FAILED)


OF_A_MODEL = (
    "model",
    "quant",
    "lora",
    "lora_modules",
    "device",
    "dtype",
    "kv",
    "gpu_memory",
    "ram",
    "context",
    "speculate",
    "draft",
    "threads",
)


def _refuse_ignored(given: typer.Context, server: str | None, ray: str | None) -> None:
    """ConfigError for an option that would mean nothing."""
    idle = {name: "with --server, which has its own model" for name in OF_A_MODEL if server is not None}
    idle |= {} if ray is not None else {"workers": "without --ray"}
    idle |= {} if server is not None else {"api_key": "without --server"}
    for name, why in idle.items():
        found = given.get_parameter_source(name)
        if found is not None and found.name == "COMMANDLINE":
            raise ConfigError(f"--{name.replace('_', '-')} means nothing {why}; leave it out")


def _everywhere(model: str) -> str:
    """A folder by its whole path: other machines' processes run elsewhere. "nano" is never a folder."""
    return os.path.abspath(model) if model != "nano" and os.path.exists(model) else model


def _adapter_everywhere(text: str) -> str:
    """ADAPTER[=SCALE] with a folder by its whole path."""
    from glm4lite.checkpoint.lora.folder import with_scale

    folder = with_scale(text)[0]
    return os.path.abspath(folder) + text[len(folder) :] if os.path.exists(folder) else text


def _choice_everywhere(text: str) -> str:
    """NAME=ADAPTER[=SCALE] with a folder by its whole path."""
    name, equals, adapter = text.partition("=")
    return f"{name}={_adapter_everywhere(adapter)}" if equals and adapter else text


def _source(requests: str, answers: str) -> AbstractContextManager[BinaryIO]:
    """The file of requests. ConfigError where it is that of the answers too, OSError where it cannot be read."""
    if requests == "-":
        number = streams().stdin
        if number is None or os.isatty(number):
            raise InputError("stdin is no file of requests: redirect one, or name it")
        return open(number, "rb", closefd=False)
    if answers != "-" and os.path.exists(answers) and os.path.samefile(requests, answers):
        raise ConfigError(f"{requests} is both the requests and the answers; name another file for the answers")
    return open(requests, "rb")


def _count(source: BinaryIO) -> int | None:
    """How many requests are to be read, None where that is not known before."""
    from glm4lite.server.batch.lines import lines

    if not source.seekable():
        return None
    begin = source.tell()
    total = sum(1 for _ in lines(source))
    source.seek(begin)
    return total


class _Run:
    """One run, from the first request that is left to the last, and what stderr says of it."""

    def __init__(self, renderer: Renderer, results: Results, total: int | None) -> None:
        self._renderer, self._results, self._total = renderer, results, total
        self._skipped = self._answered = 0
        self._error_said, self._ignored = False, set[str]()
        self._bar: Progress | None = None
        self._shown = time.monotonic()

    def answer(self, who: Source, cluster: Cluster | None, file: BinaryIO) -> None:
        """Answers what is left of a file."""
        from glm4lite.server.batch.lines import requests
        from glm4lite.server.batch.running import UNKNOWN_CONTEXT, results

        if cluster is not None:
            left = filter(self._is_left, requests(file, UNKNOWN_CONTEXT))
            self._write(cluster.results(who, left, self._remark))
            return
        with closing(who.open(self._renderer.show)) as answerer:
            left = filter(self._is_left, requests(file, answerer.context))
            self._write(results(answerer, left))

    def _write(self, results: Generator[Result]) -> None:
        began, tokens = time.monotonic(), 0

        def speed() -> float:
            return tokens / (time.monotonic() - began)

        with closing(results) as found, self._bar_where_seen():
            for result in found:
                self._results.write(result.line)
                self._answered += 1
                tokens += result.new_tokens
                self._say(result)
                self._show(f"{self._so_far()}, {speed():.0f} tok/s")
        self._renderer.remark(f"{self._so_far()}, {tokens:,} tokens, {speed():.0f} tok/s")

    @contextmanager
    def saying_how_to_go_on(self) -> Iterator[None]:
        """The last line of a run that is told to stop."""
        try:
            yield
        except (KeyboardInterrupt, SystemExit):
            how = "; the same command goes on from here" if self._results.kept else ""
            self._renderer.remark(f"stopped: {self._so_far()}{how}")
            raise

    def _is_left(self, request: Request | LineError) -> bool:
        held = self._results.held.has(request)
        self._skipped += held
        return not held

    def _so_far(self) -> str:
        done = f"{self._skipped + self._answered:,}" + ("" if self._total is None else f" of {self._total:,}")
        return f"{done} requests done, {self._results.held.failed:,} errors"

    def _say(self, result: Result) -> None:
        """What a user may want to stop the run for: the first error, and names in bodies that mean nothing here."""
        if result.error is not None and not self._error_said:
            self._error_said = True
            self._remark(f"(the first error, {result.where}: {result.error})")
        new = [name for name in result.ignored if name not in self._ignored]
        if new and len(self._ignored) < MOST_IGNORED:
            self._ignored.update(new)
            names = ", ".join(shown(name) for name in new)
            self._remark(f"(bodies hold {names}, of which answers take no notice)")

    @contextmanager
    def _bar_where_seen(self) -> Iterator[None]:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(file=streams().err)
        if not console.is_terminal:
            yield
            return
        columns = (BarColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as self._bar:
            self._bar.add_task("", total=self._total)
            yield
        self._bar = None

    def _show(self, line: str) -> None:
        """A line about the progress: on a terminal always the last one, behind a bar, elsewhere one now and then."""
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], description=line, completed=self._skipped + self._answered)
        elif time.monotonic() - self._shown > LOG_S:
            self._shown = time.monotonic()
            self._renderer.remark(line)

    def _remark(self, text: str) -> None:
        """A line that stays, for which a bar makes room."""
        if self._bar is not None:
            self._bar.stop()
        self._renderer.remark(text)
        if self._bar is not None:
            self._bar.start()
