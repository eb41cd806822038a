"""The page in Chinese: by the browser's language, with a choice, and no text left out, whoever says it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from glm4lite.base.errors import ToolError
from glm4lite.base.sentences import Sentence
from glm4lite.engine.engine import Engine
from glm4lite.tools.builtin.tools import BUILTIN_TOOLS
from glm4lite.tools.tool import Tool
from glm4lite_ui.chats import Chat, Counts, Part, Turn
from tests.ui.acts import ask, given, wait_for_end
from tests.ui.conftest import Serve
from tests.ui.slow_model import slow_engine
from tests.ui.words import errors_without_a_pattern, table, texts_of_the_page, texts_of_the_server

PAGE_IN_AN_ANSWER = "```html\n<title>网页</title><script>1</script>\n```"
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
    assert page.evaluate("document.documentElement.lang") == "zh-CN"
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


ENGLISH = """
() => {
  const theirs = '.said, .text, .question .chip, code, pre, kbd, #title, #chats li, iframe, script, [data-theirs]';
  const found = [];
  for (const element of document.querySelectorAll('gradio-app *')) {
    if (element.closest(theirs) || !element.checkVisibility()) continue;
    const own = [...element.childNodes].filter(node => node.nodeType === 3).map(node => node.data);
    const names = ['aria-label', 'title', 'placeholder', 'aria-valuetext'].map(one => element.getAttribute(one) ?? '');
    found.push(...own, ...names);
  }
  return [...found, document.title];
}
"""
# Names of programs, models, tools, settings, files and units, which are the same in Chinese.
NAMES = frozenset(
    re.findall(
        r"\w+",
        """
        glm4lite GLM nano zai org calculator current time unit convert weather MCP Python python CPU KV int4 int8
        nf4 fp4 float native avx2 avxvnni avx512vnni scalar neon neoni8mm glm4 MiB KiB GiB GB TOP Top Min Markdown JSON
        Hugging Face Hub English WebRTC HTML temperature config json safetensors nowhere organisation txt png bad
        GB18030 Schema
        """,
    )
)


def english(texts: list[str]) -> list[str]:
    """Those in which Latin words stand that are no names."""
    words = {text: set(re.findall(r"[A-Za-z][A-Za-z0-9]+", text)) - NAMES for text in texts}
    return sorted(f"{text.strip()} <- {', '.join(sorted(odd))}" for text, odd in words.items() if odd)


def weather(city: str) -> str:
    raise ToolError("没有数据")


CITY = {"type": "object", "properties": {"city": {"type": "string"}}}
CAUTION = "python: this system cannot limit: {limits}. Read the code before you allow it."
WEATHER = Tool(
    "weather",
    "某地的天气。",
    CITY,
    weather,
    needs_approval=True,
    origin=Sentence("MCP server {name}", name="weather"),
    caution=Sentence(CAUTION, limits=[Sentence("network")]),
)


def test_a_walk_through_the_chinese_page_meets_no_english(
    nano: Engine, serve: Serve, visit: Callable[..., Any], tmp_path: Path
) -> None:
    call = 'weather\n{"city": "北京"}'
    site = serve(slow_engine(nano, call), [*BUILTIN_TOOLS, WEATHER], folder=tmp_path / "chats")
    seen, asked = list[str](), list[str]()
    page = visit(site.url, locale="zh-CN")

    def look() -> None:
        seen.extend(text for text in page.evaluate(ENGLISH) if text not in seen)

    def answer(dialog: Any) -> None:
        asked.append(dialog.message)
        dialog.accept("预设" if dialog.type == "prompt" else None)

    page.on("dialog", answer)
    look()
    page.keyboard.press("Control+/")
    look()
    page.keyboard.press("Escape")

    page.click("#open-settings")
    page.fill("#temperature", "-1")
    page.wait_for_selector("#settings .wrong:not([hidden])")
    look()
    page.fill("#temperature", "abc")
    page.wait_for_selector("#settings .wrong >> text=必须是数字")
    page.fill("#temperature", "")
    page.click("#keep-preset")
    page.wait_for_selector("#preset option[value='预设']", state="attached")
    page.click("#use-for-new")
    page.wait_for_selector(".toast.done")
    look()
    page.keyboard.press("Escape")

    page.click("#open-model")
    for source, shown in (
        ("./nowhere", "#load-progress .problem"),
        ("nano", "#planned"),
        ("", "#load-progress .problem"),
    ):
        page.fill("#source", source)
        page.click("#plan")
        page.wait_for_selector(shown)
        look()
    page.fill("#source", "nano")
    page.click("#load button[type=submit]")
    page.wait_for_selector("#load-progress progress")
    look()
    page.wait_for_selector("#load-progress >> text=已加载")
    look()
    site.runtime.worker.engine = slow_engine(nano, call)
    page.keyboard.press("Escape")

    (tmp_path / "bad.json").write_text("{")
    page.set_input_files("#import-file", tmp_path / "bad.json")
    page.wait_for_selector(".toast >> text=无法导入")
    look()
    saved = Chat.of(Turn("问", parts=[Part("text", 0, PAGE_IN_AN_ANSWER, seconds=1.0)]), title="网页", folder="工作")
    failed = Chat.of(*(Turn("问", error=Sentence("it broke")) for _ in range(40)), title="很长")
    for chat in (saved, failed):
        chat.turns[-1].counts = Counts(3, 2, "length", 1.5, 3)
    (tmp_path / "chats.json").write_text(json.dumps([saved.to_json(), failed.to_json(), saved.to_json()]))
    page.set_input_files("#import-file", tmp_path / "chats.json")
    page.wait_for_selector(".toast.done >> text=已导入 2 个对话。跳过 1 个")
    look()

    page.click(f"[data-chat='{failed.id}']")
    page.wait_for_selector("#earlier:not([hidden])")
    page.wait_for_selector(".foot .problem >> text=it broke")
    page.evaluate("document.querySelectorAll('.foot .problem').forEach(one => { one.dataset.theirs = '' })")
    look()
    page.click(f"[data-chat='{saved.id}']")
    page.wait_for_selector(".foot .resume")
    look()
    page.get_by_label("预览").click()
    page.wait_for_selector("#run-scripts")
    look()
    page.click("#pane .close")
    page.get_by_label("网页 的更多操作").click()
    look()
    page.keyboard.press("Escape")

    page.click("#new-chat")
    page.set_input_files("#files", [given("照片.png", b"\x89PNG\r\n\x1a\n"), given("说明.txt", "北京".encode("gbk"))])
    page.wait_for_selector("#chips >> text=说明.txt · GB18030")
    assert page.inner_text("#chips .problem") == "无法读取 照片.png：这是图片，模型只能读取文本"
    look()
    ask(page, "天气怎么样？")
    page.wait_for_selector("#asking h2")
    look()
    page.wait_for_timeout(450)  # until then no key decides
    page.click("[data-decision='approve']")
    page.wait_for_selector("details.call >> text=失败")
    page.click("#stop")
    wait_for_end(page)
    look()
    page.get_by_label("复制消息").hover()
    page.get_by_label("删除这一轮").click()
    ask(page, "长" * 9000)
    page.wait_for_selector("#full:not([hidden])")
    assert "上下文" in page.inner_text(".foot .problem")
    look()
    page.get_by_text("去掉最早的几轮并回答").click()
    page.wait_for_selector(".toast >> text=请缩短")
    look()
    visit.errors.clear()  # type: ignore[attr-defined]  # Chromium logs each answer that is a refusal

    site.close()
    page.wait_for_selector("#lost:not([hidden])", timeout=20_000)
    look()
    visit.errors.clear()  # type: ignore[attr-defined]
    assert len(seen) > 150
    assert english([*seen, *asked]) == []


def test_letters_have_the_forms_of_their_language(serve: Serve, visit: Callable[..., Any]) -> None:
    turns = [Turn(text) for text in ("直接写中文", "直接は日本語です", "직접 한국어로")]
    for locale, page_language, expected in (
        ("zh-CN", "zh-CN", [None, "ja", "ko"]),
        ("zh-TW", "zh-CN", [None, "ja", "ko"]),
        ("en-GB", "en", ["zh-CN", "ja", "ko"]),
    ):
        site = serve()
        site.runtime.store.save(chat := Chat.of(*turns))
        page = visit(f"{site.url}/?chat={chat.id}", locale=locale)
        page.wait_for_selector(".said >> nth=2")
        assert page.evaluate("document.documentElement.lang") == page_language
        said = page.locator(".said").evaluate_all(
            "all => all.map(one => [one.getAttribute('lang'), getComputedStyle(one).fontFamily])"
        )
        assert [language for language, _ in said] == expected
        assert [re.findall("CJK ([A-Z]+)", family) for _, family in said] == [["SC"], ["JP"], ["KR"]]
        page_fonts = page.locator("#message").evaluate("one => getComputedStyle(one).fontFamily")
        assert ("CJK SC" in page_fonts) == (page_language == "zh-CN")
