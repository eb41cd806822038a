"""Which tools ask: what the user said for all chats, kept, shown, taken back; and what it holds for."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from glm4lite.tools.builtin.tools import BUILTIN_TOOLS
from glm4lite.tools.mcp_config import ServerConfig
from glm4lite.tools.tool import Tool
from glm4lite.tools.tool_files import load_tools
from glm4lite.tools.toolbox import Toolbox
from glm4lite_ui.saved.servers import ServerFile
from glm4lite_ui.saved.trust import Trust
from glm4lite_ui.servers import Servers
from glm4lite_ui.toolset import Toolset
from tests.ui.acts import ask, wait_for_end
from tests.ui.conftest import Serve, Site
from tests.ui.test_servers import PLAIN, WEATHER, add, entry, kept, line, wait_for_server

Visit = Callable[..., Any]
QUESTION = "What is 37 * 24?"


def choose(page: Any, label: str, word: str) -> None:
    """In the settings, which are closed afterwards."""
    if not page.is_visible("#settings"):
        page.click("#open-settings")
    page.get_by_label(label, exact=True).select_option(word)
    page.wait_for_timeout(300)
    page.keyboard.press("Escape")


def test_a_tool_asks_in_every_chat_once_it_was_said_and_no_more_when_taken_back(
    serve: Serve, visit: Visit, tmp_path: Path
) -> None:
    first = serve(folder=tmp_path / "kept")
    page = visit(first.url)
    choose(page, "Before calculator runs", "ask")
    ask(page, QUESTION)
    page.wait_for_selector("#asking >> text=Run calculator?")
    page.click("#stop")
    wait_for_end(page)
    page.context.close()
    first.close()
    page = visit(serve(folder=tmp_path / "kept").url)  # it is remembered, and shown
    page.click("#open-settings")
    assert page.get_by_label("Before calculator runs").input_value() == "ask"
    page.keyboard.press("Escape")
    ask(page, QUESTION)
    page.wait_for_selector("#asking >> text=Run calculator?")
    choose(page, "Before calculator runs", "")
    page.click("#stop")
    wait_for_end(page)
    ask(page, QUESTION)
    page.wait_for_selector("text=37 * 24 = 888.")
    wait_for_end(page)


def test_a_server_is_trusted_as_a_whole_a_tool_of_it_is_not_and_both_are_taken_back(serve: Serve, visit: Visit) -> None:
    site = serve()
    page = visit(site.url)
    add(page, "weather", line(PLAIN))
    wait_for_server(page, "weather")
    choose(page, "Before a tool of weather runs", "allow")
    ask(page, WEATHER)
    page.wait_for_selector("text=18 degrees and sunny in Lisbon")  # nobody was asked
    wait_for_end(page)
    page.click("#open-settings")
    shown = page.get_by_label("Before environment runs").locator("option").first
    assert shown.inner_text() == "runs (default)"
    choose(page, "Before get_weather runs", "ask")
    ask(page, "How is the weather in Oslo?")
    page.wait_for_selector("#asking >> text=Run get_weather of MCP server weather?")
    page.click("#stop")
    wait_for_end(page)
    choose(page, "Before get_weather runs", "")
    choose(page, "Before a tool of weather runs", "")
    ask(page, "How is the weather in Rome?")
    page.wait_for_selector("#asking >> text=Run get_weather of MCP server weather?")
    page.click("#stop")
    wait_for_end(page)


def test_a_server_that_is_started_otherwise_or_added_again_is_not_trusted(serve: Serve, visit: Visit) -> None:
    site = serve()
    page = visit(site.url)
    add(page, "weather", line(PLAIN))
    wait_for_server(page, "weather")
    choose(page, "Before a tool of weather runs", "allow")
    assert not asks(site, "get_weather")
    site.runtime.toolset.servers.file.put("weather", entry(PLAIN, env={"PYTHONPATH": "/elsewhere"}))
    site.runtime.toolset.servers.restart("weather")
    assert asks(site, "get_weather")
    site.runtime.toolset.servers.file.put("weather", entry(PLAIN))
    site.runtime.toolset.servers.restart("weather")
    assert not asks(site, "get_weather")
    site.runtime.toolset.remove("weather")
    site.runtime.toolset.servers.add("weather", entry(PLAIN))
    assert asks(site, "get_weather")
    assert kept(site).keys() == {"weather"}


def test_what_a_chat_allowed_is_not_for_another_server_of_that_name(serve: Serve, visit: Visit) -> None:
    site = serve()
    page = visit(site.url)
    site.runtime.toolset.servers.add("weather", entry(PLAIN))
    ask(page, WEATHER)
    page.wait_for_selector("#asking >> text=Run get_weather of MCP server weather?")
    page.wait_for_timeout(500)
    page.click("#asking button:text-is('Always for this chat')")
    wait_for_end(page)
    (kept_name,) = site.runtime.store.find()[0].settings.always
    assert kept_name.startswith("get_weather (MCP server weather) #")
    page.click("#open-settings")
    page.wait_for_selector(".allowed:visible")
    page.keyboard.press("Escape")
    ask(page, "How is the weather in Oslo?")
    page.wait_for_selector("text=18 degrees and sunny in Oslo")  # nobody was asked
    wait_for_end(page)
    site.runtime.toolset.remove("weather")
    site.runtime.toolset.servers.add("weather", entry(PLAIN, env={"PYTHONPATH": "/elsewhere"}))
    ask(page, "How is the weather in Rome?")
    page.wait_for_selector("#asking >> text=Run get_weather of MCP server weather?")
    page.click("#stop")
    wait_for_end(page)


def asks(site: Site, name: str) -> bool:
    (tool,) = (tool for tool in site.runtime.toolset.tools() if tool.name == name)
    return tool.asks({})


def test_what_is_allowed_in_this_chat_is_marked(serve: Serve, visit: Visit) -> None:
    site = serve(tools=[replace(tool, needs_approval=True) for tool in BUILTIN_TOOLS])
    page = visit(site.url)
    ask(page, QUESTION)
    page.wait_for_selector("#asking")
    page.wait_for_timeout(500)
    page.click("#asking button:text-is('Always for this chat')")
    wait_for_end(page)
    page.click("#open-settings")
    page.wait_for_selector(".allowed:visible")
    assert page.locator(".allowed:visible").count() == 1
    page.click("#ask-again")
    page.wait_for_selector(".allowed:visible", state="detached")
    assert site.runtime.store.find()[0].settings.always == []


def toolset(folder: Path, tools: list[Tool], approval: str = "ask", given: tuple[ServerConfig, ...] = ()) -> Toolset:
    servers = Servers(ServerFile(folder / "mcp.json"), (), tuple, approval)
    return Toolset(lambda: tools, given, servers, Trust(folder / "trust.json"), approval)


@pytest.mark.parametrize(("approval", "expected"), [("every", True), ("all", False)])
def test_the_command_line_is_above_what_was_said(tmp_path: Path, approval: str, expected: bool) -> None:
    toolset(tmp_path, list(BUILTIN_TOOLS)).say("", "calculator", "ask")
    toolset(tmp_path, list(BUILTIN_TOOLS)).say("", "current_time", "allow")
    with Toolbox(approval=approval) as box:
        found = {tool.name: tool.asks({}) for tool in toolset(tmp_path, list(box.tools), approval).tools()}
    assert found == dict.fromkeys(("calculator", "current_time", "unit_convert"), expected)


def test_a_word_about_a_function_holds_for_its_file(tmp_path: Path) -> None:
    source = "from glm4lite import tool\n@tool(needs_approval=True)\ndef erase(name: str) -> str:\n    'Erase.'\n"
    for name in ("one", "two"):
        (tmp_path / f"{name}.py").write_text(source)
    one, two = (load_tools(tmp_path / f"{name}.py") for name in ("one", "two"))
    toolset(tmp_path, one).say("", "erase", "allow")
    assert [tool.asks({}) for tool in toolset(tmp_path, one).tools()] == [False]
    assert [tool.asks({}) for tool in toolset(tmp_path, two).tools()] == [True]
    (group,) = toolset(tmp_path, one).groups()
    assert group.kind == "python"


def test_a_server_of_the_command_line_is_trusted_as_it_is_started(tmp_path: Path) -> None:
    (tmp_path / "given.json").write_text(json.dumps({"mcpServers": {"weather": entry(PLAIN)}}))
    with Toolbox(mcp=[tmp_path / "given.json"]) as box:
        mine = toolset(tmp_path, list(box.tools), given=box.servers)
        assert [group.kind for group in mine.groups()] == ["builtin", "server"]
        mine.say("MCP server weather", "", "allow")
        assert not any(tool.asks({}) for tool in mine.tools())
        other = toolset(tmp_path, list(box.tools), given=(ServerConfig("weather", sys.executable, ("other.py",)),))
        assert [tool.name for tool in other.tools() if tool.asks({})] == ["environment", "get_weather"]


def test_a_damaged_file_allows_nothing_and_is_not_written_over(tmp_path: Path) -> None:
    tools = [replace(tool, needs_approval=True) for tool in BUILTIN_TOOLS]
    mine = toolset(tmp_path, tools)
    mine.say("", "calculator", "allow")
    assert [tool.asks({}) for tool in mine.tools()] == [False, True, True]
    (tmp_path / "trust.json").write_text('{"format": 1, "said": {"calculator": {"word": "yes", "of": ""}}}')
    assert all(tool.asks({}) for tool in mine.tools())
    with pytest.raises(Exception, match=r"trust\.json cannot be read"):
        mine.say("", "calculator", "ask")
    assert "yes" in (tmp_path / "trust.json").read_text()


def test_what_was_taken_back_holds_for_an_answer_under_way(tmp_path: Path) -> None:
    mine = toolset(tmp_path, list(BUILTIN_TOOLS))
    tool = mine.tools()[0]  # as a session holds it
    assert not tool.asks({})
    mine.say("", "calculator", "ask")
    assert tool.asks({})
    mine.say("", "calculator", "")
    assert not tool.asks({})


@pytest.mark.parametrize(("origin", "name"), [("MCP server none", ""), ("", "no_such_tool"), ("", "")])
def test_a_word_about_nothing_is_refused(serve: Serve, origin: str, name: str) -> None:
    with pytest.raises(Exception, match="here"):
        serve().runtime.toolset.say(origin, name, "allow")
