"""`glm4lite research`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from glm4lite.base.errors import ConfigError, Glm4liteError
from glm4lite.cli import options
from glm4lite.cli.output import nano_remark, rendering
from glm4lite.cli.paths import models
from glm4lite.cli.signals import interrupt_stops
from glm4lite.cli.streams import prompt_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from glm4lite.base.events import Event
    from glm4lite.research.loop import Research
    from glm4lite.research.source import Source

_SHOWN = 400  # characters of what a source said, on the terminal
_INTERRUPTED = 130


def research(
    question: Annotated[str, typer.Argument(help="What to find out; - is stdin.")],
    model: Annotated[
        str,
        typer.Option(
            "--model",
            help="A folder, a Hub repository such as zai-org/GLM-Z1-Rumination-32B-0414, or nano.",
            autocompletion=lambda incomplete: list(models(incomplete)),
        ),
    ] = "nano",
    docs: options.Docs = None,
    search: options.Search = None,
    allow: options.Allow = None,
    mcp: options.Mcp = None,
    approve: options.Approve = "ask",
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the report here, too.", show_default="stdout alone")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, max=200, help="The most calls before the report.")] = 35,
    quant: options.Quant = None,
    lora: options.Lora = None,
    as_json: options.Json = False,
    raw: options.Raw = False,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    seed: options.Seed = None,
    max_new_tokens: options.MaxNewTokens = None,
    think: options.Think = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    kv: options.KV = "auto",
    gpu_memory: options.GpuMemory = None,
    ram: options.Ram = None,
    context: options.Context = None,
    speculate: options.Speculate = "auto",
    draft: options.Draft = None,
    keep_prefixes: options.KeepPrefixes = None,
    threads: options.Threads = None,
) -> None:
    """Find something out in folders, on the web or from MCP servers: a report that cites what was read."""
    from glm4lite.engine.engine import Engine
    from glm4lite.engine.sampling import SamplingParams
    from glm4lite.loading.load_options import LoadOptions
    from glm4lite.memory.budget import Budget
    from glm4lite.research.loop import Research, open_sources

    sampling: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "seed": seed}
    sampling |= {"max_new_tokens": max_new_tokens, "thinking_budget": options.thinking_budget(think)}
    SamplingParams.check(**sampling)
    _check_out(out)
    options.use_threads(threads)
    budget = Budget.of(gpu_memory, ram, context, kv)
    with rendering(as_json, raw) as renderer, ExitStack() as opened:
        asked = prompt_text(None, renderer.remark) if question == "-" else question
        if not asked.strip():
            raise ConfigError("the question is empty")
        sources = [*open_sources(docs or (), search, allow or ()), *_of_servers(mcp or (), approve, opened)]
        if not sources:
            raise ConfigError(
                "there is nothing to search: name --docs FOLDER, --search URL, --allow HOST or --mcp FILE"
            )
        if model == "nano":
            renderer.remark(nano_remark("research ... --model"))
        load = LoadOptions(quant or "auto", device, dtype, renderer.show, budget=budget, loras=options.loras(lora))
        engine = Engine.from_options(
            model, load, need_template=True, speculate=speculate, draft=draft, keep_prefixes=keep_prefixes
        )
        work = Research(engine, sources, engine.params(**sampling), rounds)
        failure = None
        try:
            with interrupt_stops(work):
                renderer.show_all(_events(work, asked, short=not as_json))
        except Glm4liteError as error:
            failure = error
        for note in work.notes():
            renderer.remark(f"({note})")
        kept = _keep(work, out)
        if failure is not None:
            raise failure if not kept else Glm4liteError(f"{failure}; what was read until then is in {out}")
        if not work.report.complete:
            renderer.remark(f"({_unfinished(work, out)})")
        if work.stopped:
            raise typer.Exit(_INTERRUPTED)


def _check_out(out: Path | None) -> None:
    """Before hours of work."""
    if out is not None and (out.is_dir() or not out.absolute().parent.is_dir()):
        raise ConfigError(f"--out {out}: it is no file in a folder that is there")


def _of_servers(mcp: Sequence[Path], approve: str, opened: ExitStack) -> list[Source]:
    if not mcp:
        return []
    from glm4lite.research.mcp import mcp_sources
    from glm4lite.tools.toolbox import Toolbox

    return [*mcp_sources(opened.enter_context(Toolbox((), mcp, False, approve)).tools)]


def _events(work: Research, question: str, short: bool) -> Iterator[Event]:
    """The research's events with the list of sources behind the report; `short`: of what was read a beginning."""
    from glm4lite.base.events import Done, TextDelta, ToolCallFinished

    for event in work.run(question):
        if isinstance(event, Done) and (listed := work.report.listed()):
            yield TextDelta(f"\n{listed}" if work.report.text else listed.lstrip("\n"))
        if short and isinstance(event, ToolCallFinished) and len(event.content) > _SHOWN:
            event = replace(event, content=f"{event.content[:_SHOWN]}…")
        yield event


def _keep(work: Research, out: Path | None) -> bool:
    """Writes the report, also of what was not finished; whether there was anything to write."""
    from glm4lite.base.whole_file import write_whole

    if out is None or not (work.report.text or work.report.sources):
        return False
    try:
        write_whole(out, work.report.markdown().encode("utf-8", "replace"))
    except OSError as error:
        raise Glm4liteError(f"the report could not be written to {out}: {error.strerror}") from None
    return True


def _unfinished(work: Research, out: Path | None) -> str:
    read = sum(source.opened for source in work.report.sources)
    kept = f"; what there is was written to {out}" if out is not None and (work.report.text or read) else ""
    said = "stopped" if work.stopped else "the report is not complete"
    return f"{said}; pages read: {read}{kept}; what was indexed of the folders is kept"
