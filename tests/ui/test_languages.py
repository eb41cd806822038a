"""The page in Chinese: by the browser's language, with a choice, and no text left out, whoever says it."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from tests.ui.acts import ask, wait_for_end
from tests.ui.conftest import Serve
from tests.ui.words import errors_without_a_pattern, table, texts_of_the_page, texts_of_the_server

PLACE = re.compile(r"\{\w+\}")


def test_every_text_of_the_page_and_every_sentence_of_the_server_is_there_in_chinese_and_none_besides() -> None:
    page, server = texts_of_the_page(), texts_of_the_server()
    assert len(page) > 120
    assert len(server) > 150
    known = set(table())
    assert (page | server) - known == set()
    assert known - page - server == set()


def test_a_translation_has_the_places_of_its_sentence() -> None:
    assert [said for said, chinese in table().items() if {*PLACE.findall(said)} != {*PLACE.findall(chinese)}] == []


def test_what_the_page_s_errors_say_can_be_looked_up() -> None:
    assert errors_without_a_pattern() == []


def test_a_chinese_browser_gets_a_chinese_page_and_another_language_can_be_chosen(
    serve: Serve, visit: Callable[..., Any]
) -> None:
    page = visit(serve().url, locale="zh-CN")
    assert page.evaluate("document.documentElement.lang") == "zh"
    assert page.inner_text("#new-chat") == "新对话"
    ask(page, "What is 37 * 24?")
    wait_for_end(page)
    assert "词元/秒" in page.inner_text("#status")
    assert page.get_by_label("复制消息").count() == 1
    page.click("#open-settings")
    page.wait_for_selector("text=系统提示词")
    with page.expect_navigation():
        page.select_option("#language", "en")
    page.wait_for_selector("body[data-ready]")
    assert page.inner_text("#new-chat") == "New chat"
