"""`glm4lite batch`: OpenAI's batch files, answered here.

OUT is all the state there is: a request whose custom_id it has is done, whatever the line says of it. Exit code 3 where
the end was reached and lines of OUT are errors.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
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
    from glm4lite.engine.worker import EngineWorker
    from glm4lite.server.batch import LineError, Request, Result

SOME_FAILED = 3
READ_AHEAD = 4  # requests that are ready when one of those that run is done
MOST_IGNORED = 20  # names that are said
LOG_S = 10.0  # between two lines about the progress where stderr is no terminal


def batch(
    requests: Annotated[str, typer.Argument(metavar="IN.jsonl", help="OpenAI's batch lines; - is stdin.")],
    answers: Annotated[
        str, typer.Argument(metavar="OUT.jsonl", help="Added to; what it has is not answered again. - is stdout.")
    ],
    model: options.NamedModel = "nano",
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
    parallel: options.Parallel = None,
    threads: options.Threads = None,
) -> None:
    """Answer a file of requests in OpenAI's batch format. The same command goes on where it was stopped."""
    from glm4lite.cli.batch_results import opened
    from glm4lite.engine.engine import Engine
    from glm4lite.engine.worker import EngineWorker
    from glm4lite.loading.load_options import LoadOptions
    from glm4lite.memory.budget import Budget

    budget = Budget.of(gpu_memory, ram, context, kv)
    options.use_threads(threads)
    with rendering(as_json=False) as renderer, ExitStack() as stack:
        source = stack.enter_context(_source(requests, answers))
        results = stack.enter_context(opened(answers))
        if results.held.cut:
            renderer.remark(f"({answers} ended in the middle of a line, which was dropped: it is answered again)")
        if results.held:
            renderer.remark(f"{answers} holds {len(results.held):,} results; those are not answered again")
        if model == "nano":
            renderer.remark(nano_remark("batch IN.jsonl OUT.jsonl --model"))
        run = _Run(renderer, results, total=_count(source))
        with run.saying_how_to_go_on():
            loras = options.loras(lora, lora_modules)
            asked = LoadOptions(quant or "auto", device, dtype, renderer.show, budget=budget, loras=loras)
            engine = Engine.from_options(model, asked, speculate=speculate, parallel=parallel, draft=draft)
            at_once = engine.parallel + READ_AHEAD
            worker = stack.enter_context(closing(EngineWorker(engine, at_once)))
            run.answer(source, worker, model, at_once)
    if results.held.failed:
        raise typer.Exit(SOME_FAILED)


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
    from glm4lite.server.batch import lines

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

    def answer(self, source: BinaryIO, worker: EngineWorker, model: str, at_once: int) -> None:
        """Answers what is left of a file."""
        from glm4lite.server.batch import requests, results
        from glm4lite.server.launch import name_of

        began = time.monotonic()

        def speed() -> float:
            return worker.state().new_tokens / (time.monotonic() - began)

        left = filter(self._is_left, requests(source, worker.engine.model.context))
        with closing(results(worker, name_of(model), left, at_once)) as found, self._bar_where_seen():
            for result in found:
                self._results.write(result.line)
                self._answered += 1
                self._say(result)
                self._show(f"{self._so_far()}, {speed():.0f} tok/s")
        self._renderer.remark(f"{self._so_far()}, {worker.state().new_tokens:,} tokens, {speed():.0f} tok/s")

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
