"""The menus of the composer: which tools are on in this chat, and settings under a name; with mouse and keyboard."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from glm4lite_ui.chats import Settings
from tests.ui.acts import ask, wait_for_end
from tests.ui.conftest import Serve
from tests.ui.test_servers import PLAIN, entry

Visit = Callable[..., Any]
WIDTHS = pytest.mark.parametrize("width", [390, pytest.param(1440, marks=pytest.mark.slow)])


def focused(page: Any) -> str:
    return str(page.evaluate("document.activeElement.textContent.trim()"))


@WIDTHS
def test_tools_are_turned_off_and_on_with_the_keyboard(serve: Serve, visit: Visit, width: int) -> None:
    site = serve()
    page = visit(site.url, viewport={"width": width, "height": 800})
    page.wait_for_selector("#open-tools >> text=Tools 3/3")
    page.focus("#open-tools")
    page.keyboard.press("Enter")
    page.wait_for_selector(".menu[role=menu]")
    assert page.get_attribute("#open-tools", "aria-expanded") == "true"
    assert focused(page) == "Built in"
    page.keyboard.press("ArrowDown")
    assert focused(page) == "calculator"
    page.keyboard.press("Space")
    page.wait_for_selector("#open-tools >> text=Tools 2/3")
    assert page.get_attribute(".menu [data-group]", "aria-checked") == "mixed"
    assert page.get_attribute(".menu [data-tool=calculator]", "aria-checked") == "false"
    page.keyboard.press("End")
    assert focused(page) == "Tools and MCP servers…"
    page.keyboard.press("ArrowDown")  # round
    assert focused(page) == "Built in"
    page.keyboard.press("u")
    assert focused(page) == "unit_convert"
    page.keyboard.press("Escape")
    page.wait_for_selector(".menu", state="detached")
    assert page.evaluate("document.activeElement.id") == "open-tools"
    assert page.get_attribute("#open-tools", "aria-expanded") == "false"
    page.wait_for_timeout(500)
    ask(page, "Hi")
    wait_for_end(page)
    assert site.runtime.store.find()[0].settings.tools == ["current_time", "unit_convert"]


def test_a_servers_tools_are_turned_off_together_and_the_sheet_shows_it(serve: Serve, visit: Visit) -> None:
    site = serve()
    site.runtime.toolset.servers.add("weather", entry(PLAIN))
    page = visit(site.url)
    ask(page, "Hi")
    wait_for_end(page)
    page.click("#open-tools")
    page.get_by_role("menuitemcheckbox", name="weather", exact=True).click()
    page.wait_for_selector("#open-tools >> text=Tools 3/7")
    page.get_by_role("menuitem", name="Tools and MCP servers…").click()
    page.wait_for_selector("#settings[open]")
    assert not page.get_by_role("checkbox", name="weather", exact=True).is_checked()
    page.get_by_role("checkbox", name="get_weather").check()
    page.wait_for_timeout(600)
    assert site.runtime.store.find()[0].settings.tools == ["calculator", "current_time", "unit_convert", "get_weather"]
    page.get_by_role("checkbox", name="weather", exact=True).check()
    page.wait_for_timeout(600)
    assert site.runtime.store.find()[0].settings.tools is None


def test_quick_choices_are_all_kept(serve: Serve, visit: Visit) -> None:
    site = serve()
    page = visit(site.url)
    ask(page, "Hi")
    wait_for_end(page)
    page.click("#open-tools")
    for name in ("calculator", "current_time", "unit_convert", "calculator"):
        page.get_by_role("menuitemcheckbox", name=name).click()
    page.wait_for_timeout(800)
    assert site.runtime.store.find()[0].settings.tools == ["calculator"]


def test_a_second_press_closes_the_menu(serve: Serve, visit: Visit) -> None:
    page = visit(serve().url)
    for _ in range(2):
        page.click("#open-tools")
        page.wait_for_selector(".menu")
        page.click("#open-tools")
        page.wait_for_selector(".menu", state="detached")
        page.wait_for_timeout(300)
        assert page.locator(".menu").count() == 0


@WIDTHS
def test_settings_are_kept_under_a_name_and_chosen_in_another_chat(serve: Serve, visit: Visit, width: int) -> None:
    site = serve()
    page = visit(site.url, viewport={"width": width, "height": 800})
    page.on("dialog", lambda dialog: dialog.accept("Translator"))
    page.click("#open-settings")
    page.fill("#system", "Translate into Chinese.")
    page.fill("#temperature", "0.3")
    page.keyboard.press("Escape")
    page.click("#open-presets")
    page.get_by_role("menuitem", name="Keep as a preset…").click()
    page.wait_for_selector("#open-presets >> text=Translator")
    assert site.runtime.preferences.presets == {"Translator": Settings("Translate into Chinese.", temperature=0.3)}
    page.keyboard.press("Control+Shift+O")
    ask(page, "Hi")
    wait_for_end(page)
    page.keyboard.press("Control+Shift+O")
    page.wait_for_selector("#open-presets >> text=Preset")
    page.focus("#open-presets")
    page.keyboard.press("Enter")
    page.wait_for_selector(".menu")
    checked = page.locator(".menu [aria-checked=true]")
    assert checked.inner_text() == "The model's own settings"
    page.keyboard.press("ArrowDown")
    assert focused(page) == "Translator"
    page.keyboard.press("Enter")
    page.wait_for_selector("#open-presets >> text=Translator")
    ask(page, "Hi")
    wait_for_end(page)
    newest = site.runtime.store.find()[0].settings
    assert (newest.system, newest.temperature) == ("Translate into Chinese.", 0.3)
    page.click("#open-presets")
    page.get_by_role("menuitemradio", name="The model's own settings").click()
    page.wait_for_selector("#open-presets >> text=Preset")
    page.wait_for_timeout(500)
    assert site.runtime.store.find()[0].settings == Settings()
    assert page.input_value("#system") == ""


def test_a_preset_changes_nothing_about_permissions(serve: Serve, visit: Visit) -> None:
    site = serve()
    site.runtime.preferences.keep_preset("Brief", Settings("Be brief.", always=["python"]))
    page = visit(site.url)
    ask(page, "Hi")
    wait_for_end(page)
    page.click("#open-presets")
    page.get_by_role("menuitemradio", name="Brief").click()
    page.wait_for_timeout(600)
    settings = site.runtime.store.find()[0].settings
    assert (settings.system, settings.always) == ("Be brief.", [])


def test_the_menus_are_chinese_in_a_chinese_browser(serve: Serve, visit: Visit) -> None:
    page = visit(serve().url, locale="zh-CN", viewport={"width": 390, "height": 800})
    page.wait_for_selector("#open-tools >> text=工具 3/3")
    page.click("#open-tools")
    page.wait_for_selector(".menu >> text=工具和 MCP 服务器…")
    page.keyboard.press("Escape")
    page.click("#open-presets")
    page.wait_for_selector(".menu >> text=存为预设…")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
