"""Who does not see colours well, uses no mouse or hears the page: axe's rules, in both themes, narrow and wide."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from glm4lite.base.sentences import Sentence
from glm4lite.engine.engine import Engine
from glm4lite.tools.builtin.tools import BUILTIN_TOOLS
from glm4lite_ui.chats import Attachment, Chat, Counts, Part, Settings, Turn
from tests.glm4lite.test_mcp import BAD
from tests.ui.acts import ask, wait_for_end
from tests.ui.conftest import Serve
from tests.ui.test_servers import PLAIN, entry

AXE = Path(__file__).with_name("axe") / "axe.min.js"
SAID = """# Title

**bold** `code` [link](http://a.example/) $x < y$

- [x] done
- one

| a | b |
|---|---|
| 1 | 2 |

> quote

```python
def f(n: int) -> str:
    \"\"\"Doc.\"\"\"
    # comment
    return f"{n}" + "x" * 3  # all of it
```

```html
<title>Page</title><p class="x">Hi</p><!-- comment -->
```
"""
TURNS = [
    Turn(
        "Ask",
        [Attachment("notes.txt", "x", 5)],
        [
            Part("thinking", 0, "Let me think", seconds=1),
            Part("call", 0, "888", "calculator", "{}", seconds=1),
            Part("text", 1, SAID, seconds=1),
        ],
        Counts(10, 5, "length", 7.0, 3),
    ),
    Turn("Fail", error=Sentence("something went wrong"), dropped=True),
]


@pytest.mark.parametrize(("width", "scheme"), [(390, "light"), pytest.param(1440, "dark", marks=pytest.mark.slow)])
def test_axe_finds_nothing_serious(serve: Serve, visit: Callable[..., Any], width: int, scheme: str) -> None:
    site = serve(Engine.load("nano"), tools=[replace(tool, needs_approval=True) for tool in BUILTIN_TOOLS])
    site.runtime.preferences.keep_preset("Brief", Settings("Be brief."))
    for name, more in {"good": entry(PLAIN), "bad": entry(BAD, "bad-tools")}.items():
        site.runtime.toolset.servers.add(name, more)
    chat = Chat.of(*TURNS, title="A chat")
    site.runtime.store.save(chat)
    viewport = {"width": width, "height": 844}
    page = visit(f"{site.url}/?chat={chat.id}", viewport=viewport, color_scheme=scheme, bypass_csp=True)
    page.add_script_tag(path=AXE)
    page.wait_for_selector(".code >> nth=-1")
    page.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true; })")
    problems = {"chat": serious(page)}
    for name in ("settings", "model"):
        page.click(f"#open-{name}")
        page.wait_for_selector(f"#{name} .sheet-body > *")
        if name == "settings":
            page.wait_for_selector("[data-state=connected] >> text=get_weather")
            page.click("#add-server summary")
        problems[name] = serious(page)
        page.keyboard.press("Escape")
    for name in ("tools", "presets"):
        page.click(f"#open-{name}")
        page.wait_for_selector(".menu")
        problems[name] = serious(page)
        page.keyboard.press("Escape")
    page.keyboard.press("Control+/")
    problems["keys"] = serious(page)
    page.keyboard.press("Escape")
    page.keyboard.press("Control+k")
    problems["list"] = serious(page)
    if width == 390:
        page.keyboard.press("Escape")
    page.get_by_label("Preview").click()
    page.wait_for_selector("#pane iframe")
    problems["pane"] = serious(page)
    page.locator("#pane .close").click()
    page.click("#new-chat") if width > 390 else page.keyboard.press("Control+Shift+O")
    page.wait_for_selector("#greeting")
    problems["new"] = serious(page)
    ask(page, "What is 37 * 24?")
    page.wait_for_selector("#asking >> text=calculator")
    problems["asking"] = serious(page)
    page.click("#stop")
    wait_for_end(page)
    site.runtime.unload()
    page.click("#open-model")  # asks what is loaded
    page.wait_for_selector("#unloaded")
    problems["unloaded"] = serious(page)
    page.keyboard.press("Escape")
    problems["unloaded, composer"] = serious(page)
    assert not any(problems.values()), problems


def serious(page: Any) -> list[str]:
    found = page.evaluate("async () => (await axe.run(document, {iframes: false})).violations")
    return [
        f"{one['id']}: {node['html'][:120]} {node['failureSummary'][:160]}"
        for one in found
        if one["impact"] in ("serious", "critical")
        for node in one["nodes"]
    ]


def test_everything_is_reached_with_the_keyboard_and_nothing_that_is_closed(
    serve: Serve, visit: Callable[..., Any]
) -> None:
    page = visit(serve().url, viewport={"width": 390, "height": 800})
    reached = list[str]()
    page.focus("#open-library")
    for _ in range(14):
        reached.append(page.evaluate("document.activeElement.id"))
        page.keyboard.press("Tab")
    for name in ("open-library", "title", "open-model", "open-settings", "message", "attach"):
        assert name in reached
    assert {"open-tools", "open-presets"} <= set(reached)
    assert not {"search", "new-chat", "system", "source", "server-name"} & set(reached)
    page.focus("#open-settings")
    page.keyboard.press("Enter")
    page.wait_for_selector("#settings[open]")
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.id") == "open-settings"


def test_every_button_is_large_enough_to_be_hit(serve: Serve, visit: Callable[..., Any]) -> None:
    site = serve()
    chat = Chat.of(*TURNS)
    site.runtime.store.save(chat)
    page = visit(f"{site.url}/?chat={chat.id}", viewport={"width": 390, "height": 800})
    page.wait_for_selector(".code >> nth=-1")
    sizes = page.evaluate(
        """[...document.querySelectorAll('button')].filter(one => one.checkVisibility())
        .map(one => [one.getAttribute('aria-label') ?? one.textContent, one.getBoundingClientRect()])
        .filter(([, box]) => box.width < 24 || box.height < 24).map(([name]) => name)"""
    )
    assert sizes == []
