"""Draws docs/img: the page of `glm4lite ui` with nano, in Chromium. `python docs/pictures.py`"""

from __future__ import annotations

import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright

from glm4lite.engine.engine import Engine
from glm4lite.engine.worker import EngineWorker
from glm4lite.server import create_app
from glm4lite.server.launch import Address, Server, url_of
from glm4lite.tools.builtin.tools import BUILTIN_TOOLS
from glm4lite_ui.chats import Chat, Counts, Part, Turn
from glm4lite_ui.runtime import Runtime
from glm4lite_ui.saved.store import ChatStore
from glm4lite_ui.serving import mount

IMAGES = Path(__file__).with_name("img")
QUESTION = "What is 37 * 24?"
CLOCK = """Here is a clock face as SVG:

```svg
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 200 200">
  <title>Clock</title>
  <circle cx="100" cy="100" r="90" fill="#eef6f5" stroke="#0b6e63" stroke-width="6"/>
  <path d="M100 100V45M100 100L138 122" stroke="#1b2227" stroke-width="8" stroke-linecap="round"/>
</svg>
```

The hour hand turns by $\\frac{360^\\circ}{12}$ each hour.
"""


@contextmanager
def served(folder: Path, asks: bool) -> Iterator[tuple[str, Runtime]]:
    """The page; with `asks` every tool waits for the user's word."""
    tools = [replace(tool, needs_approval=asks) for tool in BUILTIN_TOOLS]
    runtime = Runtime(EngineWorker(Engine.load("nano")), ChatStore(folder), tools)
    listening = Address("127.0.0.1", 0).listen()
    server = Server(mount(create_app(runtime.worker, lambda: runtime.name), runtime))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield url_of(listening), runtime
    runtime.close()
    server.should_exit = True
    thread.join(10)


def visit(browser: Browser, url: str, width: int = 1200, scheme: str = "light") -> Page:
    options = {"viewport": {"width": width, "height": 800}, "color_scheme": scheme, "device_scale_factor": 1}
    page = browser.new_context(**options).new_page()  # type: ignore[arg-type]
    page.goto(url)
    page.wait_for_selector("body[data-ready]")
    return page


def ask(page: Page) -> None:
    page.fill("#message", QUESTION)
    page.press("#message", "Enter")


def save(page: Page, name: str) -> None:
    page.wait_for_timeout(500)
    page.screenshot(path=IMAGES / f"{name}.png")


def draw(browser: Browser, folder: Path) -> None:
    with served(folder, asks=False) as (url, runtime):
        parts = [Part("text", 0, CLOCK, seconds=3.1)]
        turn = Turn("Draw a clock", parts=parts, counts=Counts(40, 210, "stop", 12.4, 40))
        runtime.store.save(Chat.of(turn, title="A clock"))
        clock = runtime.store.summaries()[0].id
        page = visit(browser, url)
        ask(page)
        page.wait_for_selector("text=37 * 24 = 888.")
        page.click("details.call summary")
        save(page, "chat")
        for name in ("settings", "model"):
            page.click(f"#open-{name}")
            save(page, name)
            page.keyboard.press("Escape")
        save(visit(browser, page.url, width=390, scheme="dark"), "phone-dark")
        page = visit(browser, f"{url}/?chat={clock}")
        page.get_by_label("Preview").click()
        save(page, "preview")
    with served(folder, asks=True) as (url, _):
        page = visit(browser, url)
        ask(page)
        page.wait_for_selector("#asking >> text=calculator")
        save(page, "approval")


def main() -> None:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as folder:
        draw(playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"]), Path(folder))


if __name__ == "__main__":
    main()
