"""The conversation on the page: long chats, texts as they were said, and what an answer may look like."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

import pytest

from glm4lite.base.sentences import Sentence
from glm4lite.engine.engine import Engine
from glm4lite_ui.chats import Chat, Counts, Part, Turn
from tests.ui.acts import ask, shown, start_long_answer, wait_for_end
from tests.ui.conftest import Serve, Site
from tests.ui.slow_model import slow_engine
from tests.ui.test_markup import FORM, KNOWN, nasty

Visit = Callable[..., Any]
PARAGRAPHS = "\n\n".join(["A **bold** word, `code` and [a link](http://a.example/)."] * 5 + ["- one\n- two\n- three"])


def answered(user: str, text: str) -> Turn:
    return Turn(user, parts=[Part("text", 0, text, seconds=0.1)], counts=Counts(10, 5, "stop", 7.0, 3))


def save(site: Site, *turns: Turn, **fields: Any) -> Chat:
    chat = Chat.of(*turns, **fields)
    site.runtime.store.save(chat)
    return chat


def long_chat(site: Site, count: int = 150) -> Chat:
    """A chat of `count` turns, which are twice as many messages."""
    turns = [answered(f"Question {n}", f"Answer {n}\n\n{PARAGRAPHS}") for n in range(count)]
    for turn in turns[:-1]:
        turn.dropped = True  # or nano's context were full
    return save(site, *turns, title="Long")


def test_a_long_chat_shows_its_last_turns_and_the_earlier_ones_when_asked(serve: Serve, visit: Visit) -> None:
    site = serve()
    chat = long_chat(site)
    page = visit(f"{site.url}/?chat={chat.id}")
    page.wait_for_selector("text=Question 149")
    assert page.locator(".turn").count() == 30
    page.locator("#earlier").scroll_into_view_if_needed()
    page.click("#earlier")
    page.wait_for_function("document.querySelectorAll('.turn').length === 60")
    assert page.locator(".said").first.text_content() == "Question 90"
    assert page.locator("#thread").evaluate("one => one.scrollTop") > 500  # what was read has not moved away


def test_what_still_comes_for_a_chat_never_lands_in_another(serve: Serve, visit: Visit, nano: Engine) -> None:
    site = serve(slow_engine(nano, "word " * 3000))
    chat = long_chat(site)
    page = visit(f"{site.url}/?chat={chat.id}")
    page.evaluate(
        """() => {
          window.wrong = 0;
          new MutationObserver(() => {
            if (document.title.startsWith('New chat') && document.querySelector('.said')) window.wrong += 1;
          }).observe(document.querySelector('#turns'), {childList: true, subtree: true, characterData: true});
        }"""
    )
    page.wait_for_selector("text=Question 149")
    start_long_answer(page)
    page.click("#stop")
    page.click("#new-chat")
    page.wait_for_selector("#greeting")
    page.wait_for_timeout(1500)
    assert shown(page) == ""
    assert page.evaluate("window.wrong") == 0
    start_long_answer(page)
    page.click("#stop")
    wait_for_end(page)
    assert len(site.runtime.store.load(chat.id).turns) == 151
    (new,) = [one for one in site.runtime.store.find() if one.id != chat.id]
    assert [turn.user for turn in new.turns] == ["Write for long"]


def test_quick_changes_between_chats_end_at_the_last_one(serve: Serve, visit: Visit) -> None:
    site = serve()
    chats = [save(site, answered(f"Ask {n}", f"Said {n}"), title=f"Chat {n}") for n in range(6)]
    page = visit(site.url)
    page.wait_for_selector("#chats >> text=Chat 5")
    page.evaluate("() => document.querySelectorAll('#chats a').forEach(link => link.click())")
    last = page.locator("#chats a").last.inner_text()
    page.wait_for_selector(f"text=Said {last.removeprefix('Chat ')}")
    page.wait_for_timeout(300)
    assert page.locator(".turn").count() == 1
    page.go_back()
    page.wait_for_function(f"!document.querySelector('#turns').innerText.includes('Said {last[-1]}')")
    assert page.url.split("chat=")[1] in {chat.id for chat in chats}


@pytest.mark.slow
def test_the_renderer_works_no_more_for_a_long_chat_and_stop_is_quick(serve: Serve, visit: Visit, nano: Engine) -> None:
    site = serve(slow_engine(nano, "word " * 3000))
    costs = {}
    for name, address in {"fresh": site.url, "long": f"{site.url}/?chat={long_chat(site).id}"}.items():
        page = visit(address)
        session = page.context.new_cdp_session(page)
        session.send("Performance.enable")
        start_long_answer(page)
        began = task_seconds(session)
        page.wait_for_timeout(5000)
        costs[name] = task_seconds(session) - began
        page.click("#stop")
        clicked = time.monotonic()
        wait_for_end(page)
        assert time.monotonic() - clicked < 1.2
        page.context.close()
    assert costs["long"] < 1.3 * costs["fresh"] + 0.05, costs


def task_seconds(session: Any) -> float:
    found = {one["name"]: one["value"] for one in session.send("Performance.getMetrics")["metrics"]}
    return float(found["TaskDuration"])


def test_stop_is_quick_in_a_long_chat(serve: Serve, visit: Visit, nano: Engine) -> None:
    site = serve(slow_engine(nano, "word " * 3000))
    page = visit(f"{site.url}/?chat={long_chat(site).id}")
    page.wait_for_selector("text=Question 149")
    start_long_answer(page)
    said = shown(page).count("word")
    page.click("#stop")
    page.wait_for_selector("text=Stopped.")
    wait_for_end(page)
    assert shown(page).count("word") - said < 60  # a word takes a fiftieth of a second


def test_only_what_changed_is_drawn_while_an_answer_grows(serve: Serve, visit: Visit, nano: Engine) -> None:
    site = serve(slow_engine(nano, "One paragraph.\n\n" + "word " * 3000))
    page = visit(site.url)
    start_long_answer(page)
    page.evaluate("() => document.querySelectorAll('#turns p, .said').forEach(one => { one.mark = true; })")
    page.wait_for_timeout(1000)
    marks = page.evaluate("() => [...document.querySelectorAll('#turns p, .said')].map(one => Boolean(one.mark))")
    assert marks == [True, True, False]
    page.click("#stop")
    wait_for_end(page)
    marks = page.evaluate("() => [...document.querySelectorAll('#turns .said, #turns .text p')].map(one => one.mark)")
    assert marks[:2] == [True, True]


def test_a_window_that_draws_slowly_is_told_less_often(serve: Serve, visit: Visit, nano: Engine) -> None:
    site = serve(slow_engine(nano, "word " * 3000))
    page = visit(site.url)
    acks = list[float]()
    page.on("request", lambda asked: acks.append(time.monotonic()) if "/page/ack" in asked.url else None)
    start_long_answer(page)
    page.evaluate(  # each drawing takes half a second
        """() => new MutationObserver(() => { const end = performance.now() + 500; while (performance.now() < end); })
          .observe(document.querySelector('#turns'), {childList: true, subtree: true})"""
    )
    acks.clear()
    page.wait_for_timeout(3000)
    assert len(acks) <= 8
    page.click("#stop")
    wait_for_end(page)


TYPED = "# comment\n__init__ and *this*\n    indented\tby a tab\n1. a < b && c > d &lt;"


def test_what_was_typed_is_shown_copied_and_edited_as_it_was(serve: Serve, visit: Visit) -> None:
    site = serve()
    said = "a<b & `c<d>`\n\n* ![x](http://a.example/) 中文\n\n```make\nall:\techo &lt;\n```"
    turn = Turn(TYPED, parts=[Part("thinking", 0, "1 < 2", seconds=1), Part("text", 0, said, seconds=1)])
    page = visit(f"{site.url}/?chat={save(site, turn).id}", permissions=["clipboard-read", "clipboard-write"])
    page.wait_for_selector(".code")
    copied = "navigator.clipboard.readText()"
    assert page.inner_text(".said") == TYPED
    page.get_by_label("Copy message").click()
    page.wait_for_timeout(200)
    assert page.evaluate(copied) == TYPED
    page.get_by_label("Copy answer").click()
    page.wait_for_timeout(200)
    assert page.evaluate(copied) == said  # and not the thought
    page.get_by_label("Copy code").click()
    page.wait_for_timeout(200)
    assert page.evaluate(copied) == "all:\techo &lt;"
    page.get_by_label("Edit").click()
    assert page.input_value("#message") == TYPED


def test_formulas_tasks_tables_and_every_direction_of_writing_are_drawn(serve: Serve, visit: Visit) -> None:
    wide = "| " + " | ".join(f"column{n}" for n in range(20)) + " |\n" + "|---" * 20 + "|\n" + "| value " * 20 + "|"
    said = "\n\n".join(
        [
            "So $x < y$, \\(a^2\\), H~2~O and it costs $5 or $6.",
            "$$\n\\begin{aligned} a &= b \\\\ c &= d \\end{aligned}\n$$",
            "- [ ] open\n- [x] done",
            "مرحبا بالعالم",
            wide,
            f"```python\nx = '{'long ' * 60}'\n```",
        ]
    )
    site = serve()
    page = visit(f"{site.url}/?chat={save(site, answered('Show', said)).id}", viewport={"width": 390, "height": 800})
    page.wait_for_selector(".wide table")
    assert page.locator("math").count() == 3
    assert page.locator("mtable mtr").count() == 2
    assert page.locator("s").count() == 0
    assert "costs $5 or $6." in shown(page)
    assert page.locator(".task").all_inner_texts() == ["☐", "☑"]
    arabic = page.locator("p", has_text="مرحبا")
    assert arabic.evaluate("one => getComputedStyle(one).direction") == "rtl"
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    for box in (".wide:has(table)", ".code .lines"):
        inner = page.locator(box).evaluate("one => [one.scrollWidth, one.clientWidth]")
        assert inner[0] > inner[1]  # it scrolls, and the page does not
    cell = page.locator("td").first.bounding_box()
    assert cell["height"] < 60  # no word is broken letter by letter


def test_the_thought_is_folded_when_the_answer_begins(serve: Serve, visit: Visit, nano: Engine) -> None:
    turn = Turn("Why", parts=[Part("thinking", 0, "Let me see", seconds=1.234), Part("text", 0, "So.", seconds=1)])
    site = serve()
    page = visit(f"{site.url}/?chat={save(site, turn).id}")
    page.wait_for_selector("text=Thought · 1.23 s")
    assert not page.is_visible("text=Let me see")
    page.click("summary")
    assert page.is_visible("text=Let me see")


def test_printing_holds_the_whole_chat(serve: Serve, visit: Visit) -> None:
    site = serve()
    page = visit(f"{site.url}/?chat={long_chat(site, 40).id}")
    page.wait_for_selector("text=Question 39")
    page.evaluate("() => { window.print = () => { window.printed = document.querySelectorAll('.turn').length; }; }")
    page.keyboard.press("Control+p")
    page.wait_for_function("window.printed === 40")
    page.emulate_media(media="print")
    assert page.locator("#thread").bounding_box()["height"] > 4000
    assert not page.is_visible("#composer")


# Nothing that somebody wrote becomes a part of the page

STRANGERS = """() => [...document.querySelectorAll('.text *, .said *, #asking .text *')]
  .filter(one => !one.closest('.code-bar'))
  .filter(one => one.matches(`form, input, select, textarea, button, img, svg, picture, video, audio, iframe, object,
      embed, script, style, link, meta, base, details, b, i, [onerror], [onload], [onclick], [style], [id]`)
    || (one.localName === 'a' && one.hasAttribute('href') && !/^(https?:|mailto:)/.test(one.getAttribute('href'))))
  .map(one => one.outerHTML.slice(0, 200))"""


def test_nothing_that_a_text_wrote_stands_on_the_page(serve: Serve, visit: Visit) -> None:
    site, chance = serve(), random.Random(5)
    texts = [*KNOWN, *(nasty(chance) for _ in range(60))]
    turns = [
        Turn(text, parts=[Part("thinking", 0, text, seconds=1), Part("text", 0, text, seconds=1)]) for text in texts
    ]
    turns[-1].parts.append(Part("call", 0, texts[0], f"`{FORM}`", '{"a": "``` <b>"}', seconds=1))
    turns[-1].error = Sentence(FORM)
    page = visit(f"{site.url}/?chat={save(site, *turns, title=FORM).id}")
    for drawn in range(30, len(turns), 30):
        page.wait_for_function(f"document.querySelectorAll('.turn').length >= {drawn}")
        page.click("#earlier")
    page.wait_for_function(f"document.querySelectorAll('.turn').length === {len(turns)}")
    assert page.evaluate("document.querySelectorAll('.text .code').length") > 50
    assert page.evaluate(STRANGERS) == []


@pytest.mark.slow
def test_nor_while_an_answer_grows(serve: Serve, visit: Visit, nano: Engine) -> None:
    text = "\n\n".join([*KNOWN[:6], *KNOWN[7:9], *KNOWN[11:16]])
    page = visit(serve(slow_engine(nano, text, seconds=0.005)).url)
    page.evaluate(
        f"""() => {{
          const look = {STRANGERS};
          window.strangers = [];
          new MutationObserver(() => window.strangers.push(...look()))
            .observe(document.querySelector('#turns'), {{childList: true, subtree: true}});
        }}"""
    )
    ask(page, "Go")
    page.wait_for_selector(".code")
    wait_for_end(page)
    assert page.evaluate("window.strangers") == []
