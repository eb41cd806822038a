"""What takes no more clicks than elsewhere: the next thing one wants is at hand, and what was done can be seen."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from glm4lite.engine.engine import Engine
from glm4lite.tools.tool import Tool
from glm4lite_ui.chats import Chat, Part, Turn
from tests.ui.acts import ask, delete_chat, given, wait_for_end
from tests.ui.conftest import Serve, Site
from tests.ui.slow_model import slow_engine

Visit = Callable[..., Any]
NANO = Path(__file__).parents[2] / "glm4lite" / "nano"


def saved(site: Site, *titles: str, answer: str = "Yes.") -> None:
    for title in titles:
        site.runtime.store.save(Chat.of(Turn(f"About {title}", parts=[Part("text", 0, answer)]), title=title))


def focused(page: Any) -> str:
    return str(page.evaluate("document.activeElement.id"))


def test_what_is_typed_goes_into_the_message_wherever_the_mouse_was(serve: Serve, visit: Visit) -> None:
    site = serve()
    saved(site, "Moon", "Sun")
    page = visit(site.url)
    page.click("#chats >> text=Moon")
    page.wait_for_selector(".said >> text=About Moon")
    page.keyboard.type("How far")
    assert page.input_value("#message") == "How far"
    page.get_by_label("Copy answer").focus()
    page.keyboard.type("?")
    assert page.input_value("#message") == "How far?"
    page.click("#open-settings")
    page.get_by_label("Close").first.focus()
    page.keyboard.type("a")  # what lies over the page keeps its keys
    page.keyboard.press("Escape")
    page.get_by_label("More about Sun").click()
    page.keyboard.type("d")
    page.keyboard.press("Escape")
    assert page.input_value("#message") == "How far?"


def test_a_message_is_typed_at_once_after_files_were_chosen_or_a_call_approved(
    serve: Serve, visit: Visit, nano: Engine
) -> None:
    def greet() -> str:
        return "Hello.\nAnd again."

    tool = Tool("greet", "Greets.", {"type": "object", "properties": {}}, greet, True)
    page = visit(serve(slow_engine(nano, "greet\n{}", seconds=0), tools=[tool]).url)
    with page.expect_file_chooser() as chooser:
        page.click("#attach")
    chooser.value.set_files([given("a.txt", b"Hello")])
    page.wait_for_selector("#chips >> text=a.txt")
    page.keyboard.type("Greet")
    assert page.input_value("#message") == "Greet"
    page.keyboard.press("Enter")
    page.wait_for_selector("#asking >> text=Run greet?")
    page.wait_for_timeout(500)
    page.keyboard.press("Enter")
    page.wait_for_selector("details.call summary >> text=Hello. …")  # there is more than this line
    assert focused(page) == "message" or page.is_visible("#asking")  # the model calls again
    page.keyboard.press("Escape")
    wait_for_end(page)


def answer_late(route: Any) -> None:
    response = route.fetch()
    time.sleep(0.5)
    route.fulfill(response=response)


# Whether the page hears of it from the stream first.
@pytest.mark.parametrize("late", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_deleted_chat_comes_back(serve: Serve, visit: Visit, late: bool) -> None:
    site = serve()
    saved(site, "Moon", "Sun")
    page = visit(site.url)
    if late:
        page.route(re.compile("/page/chats/[0-9a-f]{16}$"), answer_late)
    asked = []
    page.on("dialog", lambda dialog: asked.append(dialog.message))
    page.click("#chats >> text=Sun")
    page.wait_for_selector(".said >> text=About Sun")
    delete_chat(page, "Sun")
    page.wait_for_selector("#greeting")
    page.wait_for_function("document.querySelectorAll('#chats a').length === 1")
    page.wait_for_function("document.querySelector('#title').value === '' && document.title.startsWith('New chat')")
    assert not asked
    page.get_by_role("button", name="Undo").click()
    page.wait_for_selector(".said >> text=About Sun")
    page.wait_for_function("document.querySelectorAll('#chats a').length === 2")
    assert not page.locator(".toast").count()
    (sun,) = site.runtime.store.find("sun")
    assert sun.turns[0].parts[0].text == "Yes."


def test_a_chat_is_renamed_in_the_list(serve: Serve, visit: Visit) -> None:
    site = serve()
    saved(site, "Moon", "Sun")
    page = visit(site.url)
    page.click("#chats >> text=Sun")
    page.wait_for_selector(".said >> text=About Sun")
    page.on("dialog", lambda dialog: dialog.accept(f"{dialog.default_value} and stars"))
    for title in ("Moon", "Sun"):
        page.get_by_label(f"More about {title}").click()
        page.get_by_role("menuitem", name="Rename").click()
        page.wait_for_selector(f"#chats >> text={title} and stars")
    page.wait_for_function("document.querySelector('#title').value === 'Sun and stars'")


def test_a_menu_goes_when_something_was_exported_from_it(serve: Serve, visit: Visit) -> None:
    site = serve()
    saved(site, "Moon")
    page = visit(site.url)
    page.get_by_label("More about Moon").click()
    with page.expect_download() as download:
        page.get_by_role("menuitem", name="Export as Markdown").click()
    assert download.value.suggested_filename == "Moon.md"
    page.wait_for_selector(".menu", state="detached")


def test_what_was_searched_is_opened_with_the_keyboard(serve: Serve, visit: Visit) -> None:
    site = serve()
    saved(site, "Moon", "Sun", "Mars")
    page = visit(site.url)
    page.wait_for_selector("#chats >> text=Mars")
    page.keyboard.press("Control+k")
    page.keyboard.type("moon")
    page.keyboard.press("Enter")  # before the list could be drawn
    page.wait_for_selector(".said >> text=About Moon")
    assert focused(page) == "message"
    page.keyboard.press("Control+k")
    page.keyboard.type("a")  # "About" is in all
    page.wait_for_function("document.querySelectorAll('#chats a').length === 3")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    assert page.evaluate("document.activeElement.textContent") == "Sun"
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowUp")
    assert focused(page) == "search"


def test_versions_are_walked_through_without_looking_for_the_button_each_time(serve: Serve, visit: Visit) -> None:
    page = visit(serve().url)
    ask(page, "What is 37 * 24?")
    wait_for_end(page)
    page.get_by_label("Regenerate").press("Enter")
    page.wait_for_selector(".versions >> text=2/2")
    assert focused(page) == "message"
    page.get_by_label("Earlier version").press("Enter")
    page.wait_for_selector(".versions >> text=1/2")
    assert page.evaluate("document.activeElement.ariaLabel") == "Later version"  # there is no earlier one
    page.keyboard.press("Enter")
    page.wait_for_selector(".versions >> text=2/2")
    assert page.evaluate("document.activeElement.ariaLabel") == "Earlier version"


def test_a_search_shows_where_the_word_stands(serve: Serve, visit: Visit) -> None:
    site = serve()
    told = "Once upon a time, far away, there lived " + "a <b>Zebra</b> who loved " + "grass and water and the sun " * 4
    saved(site, "Tales", answer=told)
    saved(site, "Zebra crossings", answer="They are striped.")
    saved(site, "东京", answer="首都是东京，也有许多动物园，可以看斑马。")
    page = visit(site.url)
    page.wait_for_selector("#chats >> text=Tales")
    assert page.locator("#chats .found").count() == 0
    page.fill("#search", "zebra")
    page.wait_for_function("document.querySelectorAll('#chats a').length === 2")
    (found,) = page.locator("#chats .found").all_inner_texts()  # the other's title says it
    assert "a <b>Zebra</b> who loved" in found
    assert len(found) < 100
    page.click("#chats .found")
    page.wait_for_selector(".said >> text=About Tales")
    page.fill("#search", "斑马")
    page.wait_for_selector("#chats .found >> text=可以看斑马")


# Nothing of the page lies over what became part of the browser's top layer after the sheet.
ON_TOP = "document.querySelector('#toasts').matches(':popover-open')"


@pytest.mark.parametrize("width", [390, pytest.param(1440, marks=pytest.mark.slow)])
def test_what_is_said_while_a_sheet_is_open_lies_over_it(serve: Serve, visit: Visit, width: int) -> None:
    page = visit(serve().url, viewport={"width": width, "height": 900}, color_scheme="light")
    page.click("#open-settings")
    page.fill("#system", "Be brief.")
    page.click("#use-for-new")
    page.wait_for_selector(".toast >> text=New chats start with these settings.")
    assert page.evaluate(ON_TOP)
    page.keyboard.press("Escape")
    page.wait_for_selector("#settings", state="hidden")  # the toast takes no Escape for itself


def test_a_draft_and_a_setting_outlive_a_reload_right_after_the_last_key(serve: Serve, visit: Visit) -> None:
    page = visit(serve().url)
    page.keyboard.type("half a question")
    page.reload()
    page.wait_for_function("document.querySelector('#message')?.value === 'half a question'")
    page.click("#open-settings")
    page.fill("#temperature", "0.75")
    page.reload()
    page.wait_for_selector("body[data-ready]")
    page.wait_for_function("document.querySelector('#temperature').value === '0.75'")


def test_fields_show_the_defaults_of_the_model_that_is_loaded(serve: Serve, visit: Visit, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(NANO, other)
    defaults = json.loads((other / "generation_config.json").read_text())
    (other / "generation_config.json").write_text(
        json.dumps(defaults | {"do_sample": True, "temperature": 0.33, "top_k": 7})
    )
    page = visit(serve().url)
    assert page.get_attribute("#temperature", "placeholder") != "0.33"
    page.click("#open-settings")
    page.fill("#seed", "12")
    page.keyboard.press("Escape")
    page.click("#open-model")
    assert focused(page) == "source"
    page.keyboard.type(str(other))
    page.keyboard.press("Enter")
    page.wait_for_selector("#load-progress >> text=is loaded.")
    page.wait_for_function("document.querySelector('#temperature').placeholder === '0.33'")
    assert page.get_attribute("#top_k", "placeholder") == "7"
    assert page.input_value("#seed") == "12"


def test_markdown_is_exported_in_the_language_of_the_page(serve: Serve, visit: Visit) -> None:
    site = serve()
    parts = [Part("thinking", 0, "Hm"), Part("call", 0, name="f", arguments="{}"), Part("text", 1, "Ja.")]
    chat = Chat.of(Turn("Really?", parts=parts), title="Moon")
    chat.settings.system = "Be brief."
    site.runtime.store.save(chat)
    page = visit(site.url, locale="zh-CN")
    page.get_by_label("Moon 的更多操作").click()
    with page.expect_download() as download:
        page.get_by_role("menuitem", name="导出为 Markdown").click()
    text = Path(download.value.path()).read_text(encoding="utf-8")
    assert [line for line in text.splitlines() if line.startswith("#")] == [
        "# Moon",
        "## 系统提示词",
        "## 用户",
        "## 模型",
    ]
    assert "<summary>思考过程</summary>" in text
    assert "没有运行" in text
    page.click("#chats a")
    page.wait_for_selector(".said >> text=Really?")
    assert page.get_attribute("#export a[data-kind=md]", "href") == f"/export/{chat.id}.md?language=zh"
    assert page.get_attribute("#export-all", "href") == "/export/all.zip?language=zh"


def test_on_a_phone_a_formula_has_no_bar_beside_it_and_the_list_calls_for_no_keyboard(
    serve: Serve, visit: Visit
) -> None:
    site = serve()
    saved(site, "Moon", answer=r"$$\int_0^1 x^2\,dx = \frac{1}{3}$$")
    page = visit(site.url, viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    page.tap("#open-library")
    assert focused(page) != "search"
    page.tap("#chats >> text=Moon")
    page.wait_for_selector(".formula math")
    assert page.evaluate("getComputedStyle(document.querySelector('.formula')).overflowY") == "hidden"
    assert page.evaluate("(b => b.scrollHeight <= b.clientHeight + 1)(document.querySelector('.formula'))")
    assert focused(page) != "message"  # a phone's keyboard would cover the chat


def test_a_server_is_named_as_soon_as_one_is_to_be_added(serve: Serve, visit: Visit) -> None:
    page = visit(serve().url)
    page.click("#open-tools")
    page.get_by_role("menuitem", name="Tools and MCP servers…").click()
    page.click("#add-server > summary")
    page.wait_for_function("document.activeElement.id === 'server-name'")


def test_one_of_a_thing_is_said_as_one(serve: Serve, visit: Visit) -> None:
    from tests.ui.files import pdf

    page = visit(serve().url)
    page.set_input_files("#files", [given("a.pdf", pdf("Hello")), given("b.pdf", pdf("Hello", "World"))])
    page.wait_for_selector("#chips >> text=PDF, 1 page ·")
    page.wait_for_selector("#chips >> text=PDF, 2 pages ·")
    ask(page, "Hi")
    wait_for_end(page)
    page.click("#open-model")
    page.wait_for_selector("#facts >> text=/^1 conversation,/")
