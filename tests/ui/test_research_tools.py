"""The page's chats search a folder that the command line named: where its tools are listed, and what they show."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from glm4lite.engine.worker import EngineWorker
from glm4lite.research.browser import research_tools
from glm4lite.research.loop import browser_over, open_sources
from glm4lite.tools.builtin.tools import BUILTIN_TOOLS
from glm4lite.tools.tool import Tool
from glm4lite.tools.toolbox import Toolbox
from glm4lite_ui.chats import Chat
from glm4lite_ui.command import _research
from glm4lite_ui.runtime import Runtime
from glm4lite_ui.saved.store import ChatStore
from tests.commands import run
from tests.glm4lite.served import scripted
from tests.glm4lite.web_site import WebSite
from tests.ui.acts import ask, wait_for_end
from tests.ui.conftest import Serve

Visit = Callable[..., Any]


@pytest.fixture
def docs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GLM4LITE_INDEXES", str(tmp_path / "indexes"))
    folder = tmp_path / "docs"
    folder.mkdir()
    (folder / "tides.md").write_text("# Tides\n\nThe moon pulls the sea.", encoding="utf-8")
    return folder


def tools_over(docs: Path) -> list[Tool]:
    return research_tools(browser_over(open_sources([docs], links=False)), finish=False)


def test_a_chat_searches_the_folder_and_keeps_no_path_of_the_machine(docs: Path, tmp_path: Path) -> None:
    engine = scripted(
        'search\n{"query": "moon"}<|observation|>',
        'click\n{"link_id": 0}<|observation|>',
        "\nThe moon pulls it.<|user|>",
    )
    runtime = Runtime(EngineWorker(engine), ChatStore(tmp_path / "chats"), [*BUILTIN_TOOLS, *tools_over(docs)])
    chat = Chat()
    chat.ask("What pulls the sea?")
    assert runtime.answer(chat).over.wait(20)
    runtime.close()
    kept = runtime.store.load(chat.id)
    assert kept.turns[0].parts[-1].text == "The moon pulls it."
    said = str(kept.to_json())
    assert "doc:docs/tides.md" in said
    assert "The moon pulls the sea." in said
    assert str(docs) not in said


def test_its_tools_are_a_group_of_the_settings_that_is_switched_in_one_chat(
    serve: Serve, visit: Visit, docs: Path
) -> None:
    site = serve(tools=[*BUILTIN_TOOLS, *tools_over(docs)])
    page = visit(site.url)
    page.wait_for_selector("#open-tools >> text=Tools 6/6")
    ask(page, "Hi")
    wait_for_end(page)
    page.click("#open-settings")
    group = page.get_by_role("checkbox", name="Research", exact=True)
    assert group.is_checked()
    group.uncheck()
    page.wait_for_timeout(600)
    assert site.runtime.store.find()[0].settings.tools == ["calculator", "current_time", "unit_convert"]
    assert str(docs) not in page.content()


def test_the_command_line_alone_says_what_is_searched(docs: Path) -> None:
    said = list[str]()
    assert _research((), None, (), said.append) == []
    with WebSite() as site:
        made = _research([docs], site.url, (), said.append)
        assert [tool.name for tool in made] == ["search", "click", "open"]
        with Toolbox(approval="every", more=made) as box:
            assert all(tool.asks({}) for tool in box.tools)


def test_what_is_no_folder_is_one_line(tmp_path: Path) -> None:
    done = run("ui", "--docs", tmp_path / "nothing", "--port", "0")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith("it cannot be read as a folder (No such file or directory)")
