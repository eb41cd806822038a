"""The page in Chinese: by the browser's language, with a choice, and no text left out."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import glm4lite_ui
from tests.ui.acts import ask, wait_for_end
from tests.ui.conftest import Serve

STATIC = Path(glm4lite_ui.__file__).with_name("static")
SAID = re.compile(r"\bt\((?:'((?:[^'\\]|\\.)*)'|\"([^\"]*)\")")
IN_TEMPLATES = re.compile(r'data-(?:t|label|hint)="([^"]*)"')
LISTED = re.compile(r"const (?:KEYS|FIELDS) = \[\n(.*?)\n\];", re.DOTALL)
SHORT = re.compile(r"'((?:[^'\\]|\\.)*)'")


def texts_of_the_page() -> set[str]:
    found = set[str]()
    for script in STATIC.glob("*.js"):
        text = script.read_text(encoding="utf-8")
        found |= {one or other for one, other in SAID.findall(text)}
        for listed in LISTED.findall(text):
            rows = (SHORT.findall(row) for line in listed.splitlines() for row in line.split("], ["))
            found |= {words[1] for words in rows if len(words) > 1} | {words[2] for words in rows if len(words) > 2}
    for template in STATIC.glob("*.html"):
        found |= set(IN_TEMPLATES.findall(template.read_text(encoding="utf-8")))
    return {text.replace("\\'", "'") for text in found if text}


def test_every_text_of_the_page_is_there_in_chinese() -> None:
    table = (STATIC / "words.js").read_text(encoding="utf-8").split("const CHINESE = {")[1].split("\n};")[0]
    known = {line.strip().split("': '")[0].lstrip("'").replace("\\'", "'") for line in table.splitlines() if line}
    texts = texts_of_the_page()
    assert len(texts) > 120
    assert texts - known == set()


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
