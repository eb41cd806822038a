"""The chats on the left and what is kept beside them: search, groups, import, drafts, presets; and files to send."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from glm4lite.engine.engine import Engine
from glm4lite_ui.chats import Chat, Part, Settings, Turn
from tests.ui.acts import ask, shown, start_long_answer, wait_for_end
from tests.ui.conftest import Serve
from tests.ui.slow_model import slow_engine

Visit = Callable[..., Any]


# From the last key to the list that holds what was searched and nothing else, as the page itself sees it.
UNTIL_FOUND = """() => {
  let typed = 0;
  document.querySelector('#search').addEventListener('input', () => { typed = performance.now(); });
  window.until = {found: new Promise(resolve => {
    new MutationObserver(() => {
      const shown = [...document.querySelectorAll('#chats a')].map(one => one.textContent);
      if (String(shown) === 'Chat 77' && document.querySelector('#search').value === 'zebra') {
        resolve(performance.now() - typed);
      }
    }).observe(document.querySelector('#chats'), {childList: true, subtree: true});
  })};
}"""


def test_among_200_chats_the_search_finds_what_was_typed_within_a_second(
    nano: Engine, serve: Serve, visit: Visit
) -> None:
    site = serve(slow_engine(nano, "word " * 3000))
    for n in range(200):
        text = "word " * 200 + ("zebra " if n == 77 else "zoo ")
        site.runtime.store.save(Chat.of(Turn(f"Question {n}", parts=[Part("text", 0, text)]), title=f"Chat {n}"))
    page = visit(site.url)
    page.wait_for_function("document.querySelectorAll('#chats a').length === 200")
    start_long_answer(page)  # the machine has other work, too
    on_its_way = set[Any]()
    searches = lambda request: "/page/chats?query=" in request.url  # noqa: E731
    page.on("request", lambda request: on_its_way.add(request) if searches(request) else None)
    page.on("requestfinished", lambda request: on_its_way.discard(request))
    page.evaluate(UNTIL_FOUND)
    page.locator("#search").press_sequentially("zebra", delay=20)
    assert page.evaluate("until.found") < 1000  # milliseconds from the last key to the right list
    while on_its_way:
        page.wait_for_timeout(20)
    assert page.locator("#chats a").all_inner_texts() == ["Chat 77"]  # and no earlier one came after it
    page.fill("#search", "nothing like it")
    page.wait_for_selector("#chats >> text=No chat matches.")


def test_two_chats_are_answered_at_once(nano: Engine, serve: Serve, visit: Visit) -> None:
    site = serve(slow_engine(nano, "word " * 3000))
    pages = [visit(site.url) for _ in range(2)]
    for page in pages:
        start_long_answer(page)
    words = [shown(page).count("word") for page in pages]
    for page, before in zip(pages, words, strict=True):
        page.wait_for_function("n => document.body.innerText.split('word').length > n", arg=before + 20)
    assert site.runtime.worker.state().running == 2
    for page in pages:
        page.click("#stop")
        wait_for_end(page)


def test_a_chat_is_pinned_and_put_into_a_folder(serve: Serve, visit: Visit) -> None:
    site = serve()
    for title in ("One", "Two", "Three"):
        site.runtime.store.save(Chat.of(Turn(title), title=title))
    page = visit(site.url)
    page.wait_for_selector("#chats >> text=Three")
    page.get_by_label("More about One").click()
    page.get_by_role("menuitem", name="Pin").click()
    page.wait_for_selector("#chats h2 >> text=Pinned")
    page.on("dialog", lambda dialog: dialog.accept("Work"))
    page.get_by_label("More about Two").click()
    page.get_by_role("menuitem", name="Move to a new folder").click()
    page.wait_for_selector("#chats h2 >> text=Work")
    assert page.locator("#chats h2").all_inner_texts() == ["Pinned", "Work", "Today"]
    assert page.locator("#chats a").all_inner_texts() == ["One", "Two", "Three"]


def test_a_chat_that_is_damaged_or_no_chat_is_said_and_a_new_one_begun(serve: Serve, visit: Visit) -> None:
    site = serve()
    chat = Chat.of(Turn("Hi"), title="Broken")
    site.runtime.store.save(chat)
    (site.runtime.store.folder / f"{chat.id}.json").write_text("{")
    page = visit(f"{site.url}/?chat={chat.id}")
    page.wait_for_selector(".toast >> text=this chat cannot be read")
    page.wait_for_selector("#greeting")
    page.goto(f"{site.url}/?chat=../../etc")
    page.wait_for_selector("#greeting")
    ask(page, "Hi")
    wait_for_end(page)
    assert len(site.runtime.store.summaries()) == 1


def test_chats_of_another_program_are_imported(serve: Serve, visit: Visit, tmp_path: Path) -> None:
    site = serve()
    message = {"author": {"role": "user"}, "content": {"content_type": "text", "parts": ["Hello from there"]}}
    mapping = {
        "root": {"id": "root", "message": None, "parent": None, "children": ["a"]},
        "a": {"id": "a", "message": {"id": "a", **message}, "parent": "root", "children": []},
    }
    exported = [{"id": "x", "title": "From there", "create_time": 1e9, "mapping": mapping, "current_node": "a"}]
    (tmp_path / "conversations.json").write_text(json.dumps(exported))
    page = visit(site.url)
    page.set_input_files("#import-file", tmp_path / "conversations.json")
    page.wait_for_selector(".toast >> text=Imported 1 chat.")
    page.click("#chats >> text=From there")
    page.wait_for_selector(".said >> text=Hello from there")


def test_what_was_typed_is_there_after_a_restart(serve: Serve, visit: Visit, tmp_path: Path) -> None:
    first = serve(folder=tmp_path / "kept")
    page = visit(first.url)
    page.fill("#message", "half a question")
    page.wait_for_timeout(800)
    first.close()
    serve(folder=tmp_path / "kept", port=int(first.url.rpartition(":")[2]))
    page.goto(first.url)  # without naming the chat
    page.wait_for_function("document.querySelector('#message')?.value === 'half a question'")
    ask(page, "half a question")
    wait_for_end(page)
    page.click("#new-chat")
    page.wait_for_selector("#greeting")
    assert page.input_value("#message") == ""
    visit.errors.clear()  # type: ignore[attr-defined]  # that the server was away for a moment


def test_settings_are_kept_under_a_name_and_for_new_chats(serve: Serve, visit: Visit) -> None:
    site = serve()
    page = visit(site.url)
    page.click("#open-settings")
    page.fill("#system", "Be brief.")
    page.on("dialog", lambda dialog: dialog.accept("Short"))
    page.click("#keep-preset")
    page.wait_for_selector("#preset option >> text=Short", state="attached")
    page.fill("#temperature", "0.3")
    page.click("#use-for-new")
    page.wait_for_selector(".toast >> text=New chats start with these settings.")
    assert site.runtime.preferences.presets == {"Short": Settings(system="Be brief.")}
    page.fill("#system", "Something else")
    page.wait_for_timeout(500)
    page.select_option("#preset", "Short")
    page.wait_for_function("document.querySelector('#system')?.value === 'Be brief.'")
    page.keyboard.press("Escape")
    ask(page, "Hi")
    wait_for_end(page)
    page.click("#new-chat")
    page.wait_for_selector("#greeting")
    page.click("#open-settings")
    page.wait_for_function("document.querySelector('#temperature')?.value === '0.3'")


def test_a_file_may_be_dropped_anywhere_in_any_encoding(serve: Serve, visit: Visit) -> None:
    site = serve()
    page = visit(site.url)
    written = "你好，这是一个用国标编码写的文件。" * 3
    dropped = page.evaluate_handle(
        """bytes => {
          const data = new DataTransfer();
          data.items.add(new File([new Uint8Array(bytes)], 'notes.txt'));
          return data;
        }""",
        list(written.encode("gb18030")),
    )
    page.dispatch_event("#thread", "dragover", {"dataTransfer": dropped})
    assert page.is_visible("#drop-here")
    page.dispatch_event("#thread", "drop", {"dataTransfer": dropped})
    page.wait_for_selector("#chips >> text=notes.txt · GB18030 ·")
    assert not page.is_visible("#drop-here")
    ask(page, "Read it")
    wait_for_end(page)
    (turn,) = site.runtime.store.find()[0].turns
    assert turn.files[0].text == written
    assert page.inner_text(".question .chip").startswith("notes.txt · GB18030 ·")


def test_a_long_paste_becomes_a_file(serve: Serve, visit: Visit) -> None:
    page = visit(serve().url)
    page.evaluate(
        """() => {
          for (const [text, place] of [['x'.repeat(3000), 0], ['short', 1]]) {
            const data = new DataTransfer();
            data.setData('text/plain', text);
            document.querySelector('#message').dispatchEvent(
              new ClipboardEvent('paste', {clipboardData: data, cancelable: true, bubbles: true}));
          }
        }"""
    )
    page.wait_for_selector("#chips >> text=pasted-1.txt ·")
    # The chat's first message may come later than the paste.
    page.evaluate("import('/page/static/composer.js').then(composer => composer.showDraft('a draft'))")
    assert page.input_value("#message") == "a draft"
    assert page.locator("#chips li").count() == 1


def test_the_status_says_that_a_tool_runs(serve: Serve, visit: Visit, nano: Engine) -> None:
    from glm4lite.tools.tool import Tool

    def wait(seconds: float = 2) -> str:
        time.sleep(seconds)
        return "done"

    properties = {"seconds": {"type": "number"}}
    tool = Tool("wait", "Waits.", {"type": "object", "properties": properties}, wait)
    page = visit(serve(slow_engine(nano, 'wait\n{"seconds": 2}', seconds=0), tools=[tool]).url)
    ask(page, "Wait")
    page.wait_for_selector("#status >> text=running wait")
    page.click("#stop")
    wait_for_end(page)


def test_settings_typed_before_another_chat_is_opened_stay_with_theirs(serve: Serve, visit: Visit) -> None:
    site = serve()
    for title in ("One", "Two"):
        site.runtime.store.save(Chat.of(Turn(title), title=title))
    page = visit(site.url)
    page.click("#chats >> text=One")
    page.wait_for_selector(".said >> text=One")
    page.click("#chats >> text=Two")
    page.wait_for_selector(".said >> text=Two")

    def late(route: Any) -> None:
        time.sleep(0.5)  # a server that has other work
        route.continue_()

    page.route("**/set", late)
    page.click("#open-settings")
    page.fill("#system", "For two")
    page.go_back()
    page.wait_for_selector(".said >> text=One")
    page.wait_for_function("document.querySelector('#system')?.value === ''")
    page.fill("#seed", "5")
    page.wait_for_timeout(1500)
    kept = {chat.title: (chat.settings.system, chat.settings.seed) for chat in site.runtime.store.find()}
    assert kept == {"One": ("", 5), "Two": ("For two", None)}


def test_escape_closes_a_menu_and_leaves_the_answer(serve: Serve, visit: Visit, nano: Engine) -> None:
    site = serve(slow_engine(nano, "word " * 3000))
    page = visit(site.url)
    start_long_answer(page)
    page.get_by_label("More about Write for long").click()
    page.wait_for_selector("[role=menu]")
    page.keyboard.press("Escape")
    page.wait_for_selector("[role=menu]", state="detached")
    page.wait_for_timeout(300)
    assert site.runtime.answers
    page.keyboard.press("Escape")
    wait_for_end(page)
