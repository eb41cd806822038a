"""`glm4lite ui`. Found by the command line through the entry-point group `glm4lite.commands`."""

from __future__ import annotations

from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Annotated, Any

import typer

from glm4lite.base.errors import Glm4liteError
from glm4lite.base.extras import require
from glm4lite.cli import options
from glm4lite.cli.output import nano_remark, rendering

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from glm4lite.tools.tool import Tool
    from glm4lite_ui.saved.store import ChatStore


def _own_folder() -> Path | None:
    from glm4lite.base.user_folder import user_folder

    try:
        return user_folder()
    except Glm4liteError:  # a user without a home keeps all beside the chats
        return None


def _take_in_older(store: ChatStore, own: bool) -> None:
    """Chats of an older glm4lite become what both programs list: the terminal's lay in a folder of their own."""
    from glm4lite.cli.chat.saved import take_over_older

    if own:
        take_over_older()
    store.add_messages()


def _research(
    docs: Sequence[Path], search: str | None, allow: Sequence[str], remark: Callable[[str], None]
) -> list[Tool]:
    """The tools of research over what the command line names, and nothing that is typed on the page.

    Folders are read meanwhile; who asks before that is done finds what was read.
    """
    if not docs and search is None and not allow:
        return []
    from glm4lite.research.browser import research_tools
    from glm4lite.research.folder import Folder
    from glm4lite.research.loop import browser_over, open_sources

    sources = open_sources(docs, search, allow, links=False)

    def read() -> None:
        for folder in sources:
            if isinstance(folder, Folder):
                try:
                    folder.refresh()
                except Glm4liteError as error:
                    remark(f"({error})")
                for note in folder.notes:
                    remark(f"({note})")

    Thread(target=read, daemon=True).start()
    return research_tools(browser_over(sources), finish=False)


def ui(
    model: options.Model = "nano",
    port: Annotated[int, typer.Option(help="Of http://127.0.0.1; 0 takes a free one.")] = 7860,
    quant: options.Quant = None,
    lora: options.Lora = None,
    tools: options.Tools = None,
    no_tools: options.NoTools = False,
    mcp: options.Mcp = None,
    docs: options.Docs = None,
    search: options.Search = None,
    allow: options.Allow = None,
    approve: options.Approve = "ask",
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
    servers_from_elsewhere: Annotated[
        bool,
        typer.Option(help="Let also who reaches the page from elsewhere add MCP servers (programs) and allow tools."),
    ] = False,
    chats: Annotated[Path | None, typer.Option(help="Where chats are kept.", show_default="your data folder")] = None,
) -> None:
    """Chat with a model in the browser, on this machine only."""
    limits: dict[str, Any] = {"device": device, "dtype": dtype}
    limits |= {
        "gpu_memory": gpu_memory,
        "ram": ram,
        "context": context,
        "kv": kv,
        "speculate": speculate,
        "parallel": parallel,
        "keep_prefixes": keep_prefixes,
    }
    with rendering(as_json=False) as renderer:
        # Before what takes seconds to import.
        require("the web chat", "gradio", "nh3", "latex2mathml", "pygments", extra="ui")
        renderer.remark(nano_remark("ui") if model == "nano" else f"Starting the page with {model} ...")
        from glm4lite.engine.engine import Engine
        from glm4lite.engine.worker import EngineWorker
        from glm4lite.server import Address
        from glm4lite.tools.toolbox import Toolbox
        from glm4lite_ui.runtime import Runtime
        from glm4lite_ui.saved.store import ChatStore
        from glm4lite_ui.serving import serve_page

        options.use_threads(threads)
        researching = _research(docs or (), search, allow or (), renderer.remark)
        store, listening = ChatStore(chats), Address("127.0.0.1", port).listen()
        older = Thread(target=_take_in_older, args=(store, chats is None))
        older.start()
        with Toolbox(tools or (), mcp or (), not no_tools, approve, researching) as box:
            engine = Engine.load(
                model, quant or "auto", progress=renderer.show, need_template=True, lora=lora, **limits
            )
            older.join()
            runtime = Runtime(
                EngineWorker(engine),
                store,
                box.tools,
                source=model,
                load_options=limits,
                quant=quant or "auto",
                lora=tuple(lora or ()),
                folder=_own_folder(),
                servers_from_elsewhere=servers_from_elsewhere,
                servers=box.servers,
                approval=approve,
            )
            serve_page(runtime, listening, renderer.remark)
