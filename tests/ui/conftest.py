"""A real browser against a real server: Debian's Chromium, driven by Playwright, on pages served from loopback."""

from __future__ import annotations

import math
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from glm4lite.engine.engine import Engine
from glm4lite.engine.worker import EngineWorker
from glm4lite.server import create_app
from glm4lite.server.launch import Address, Server, url_of
from glm4lite.tools.builtin.tools import BUILTIN_TOOLS
from glm4lite.tools.tool import Tool
from glm4lite_ui.runtime import Runtime
from glm4lite_ui.saved.store import ChatStore
from glm4lite_ui.serving import mount

# The shell is the same engine without a window of its own, and takes a quarter less of the processor for a page.
_NAMES = ("chromium-headless-shell", "chromium", "chromium-browser")
CHROMIUM = next((path for name in _NAMES if (path := shutil.which(name))), None)
# Without these Chromium looks for Google's hosts when it starts; --no-sandbox since CI runs as root.
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync", "--no-first-run", "--disable-quic"]
# Two pages of the address bar's own come with each window otherwise, and take as long as the page that is tested.
# Of two such switches Chromium obeys the last: the others are Playwright's, as far as they matter here.
FLAGS += [
    "--disable-features=WebUIOmniboxPopup,WebUIOmniboxAimPopup,WebUIOmniboxFullPopup,"
    "AvoidUnnecessaryBeforeUnloadCheckSync,DestroyProfileOnBrowserClose,HttpsUpgrades,MediaRouter,OptimizationHints,"
    "PaintHolding,ThirdPartyStoragePartitioning"
]


@pytest.fixture(scope="session")
def nano() -> Engine:
    return Engine.load("nano")


@dataclass
class Site:
    """A served page."""

    url: str
    runtime: Runtime
    server: Server
    thread: threading.Thread

    def close(self) -> None:
        self.server.should_exit = True
        self.thread.join(10)
        self.runtime.toolset.servers.close()

    def idle_after(self) -> float:
        """Processor seconds until the engine computes nothing: on a busy machine a wall clock measures the others."""
        started, deadline = time.process_time(), time.monotonic() + 30
        while self.runtime.worker.state().running:
            if time.monotonic() > deadline:
                return math.inf
            time.sleep(0.01)
        return time.process_time() - started


Serve = Callable[..., Site]


def started(engine: Engine, folder: Path, tools: Sequence[Tool] = BUILTIN_TOOLS, port: int = 0) -> Site:
    runtime = Runtime(EngineWorker(engine), ChatStore(folder), tools)
    listening = Address("127.0.0.1", port).listen()
    server = Server(mount(create_app(runtime.worker, lambda: runtime.name), runtime))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    while not server.started and thread.is_alive():
        time.sleep(0.01)
    return Site(url_of(listening), runtime, server, thread)


@pytest.fixture(scope="module")
def empty_site(nano: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """One page for all tests of a file that change nothing of it."""
    site = started(nano, tmp_path_factory.mktemp("site") / "chats")
    yield site
    site.close()


@pytest.fixture
def serve(nano: Engine, tmp_path: Path) -> Iterator[Serve]:
    sites: list[Site] = []

    def start(
        engine: Engine | None = None,
        tools: Sequence[Tool] = BUILTIN_TOOLS,
        folder: Path | None = None,
        port: int = 0,
    ) -> Site:
        sites.append(started(engine or nano, folder or tmp_path / "chats", tools, port))
        return sites[-1]

    yield start
    for site in sites:
        site.close()


@pytest.fixture(scope="package")
def browser() -> Iterator[Any]:
    """One Chromium for all tests here. Closed with the package: Playwright's loop would stop other tests' asyncio."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no chromium: the page is not tested in a browser (Debian: install chromium-headless-shell)")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser: Any) -> Iterator[Callable[..., Any]]:
    """Opens a page. Afterwards: nothing was logged as an error, and no other host was asked for anything."""
    contexts, errors, foreign = [], list[str](), list[str]()

    def open_page(url: str, **options: Any) -> Any:
        context = browser.new_context(**{"viewport": {"width": 1200, "height": 800}} | options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(30_000)
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        own = (url.split("?")[0], "data:", "blob:", "about:")
        page.on("request", lambda asked: None if asked.url.startswith(own) else foreign.append(asked.url))
        # Chromium announces what a policy refused as a request that failed, too.
        page.on("requestfailed", lambda asked: foreign.remove(asked.url) if asked.failure == "csp" else None)
        page.goto(url)
        page.wait_for_selector("body[data-ready]")
        return page

    open_page.errors = errors  # type: ignore[attr-defined]  # a test may expect one
    yield open_page
    for context in contexts:
        context.close()
    assert not errors
    assert not foreign
