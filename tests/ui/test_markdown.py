"""Markdown as the page's HTML: what it means, that nothing else gets in, and that a text that grows ends the same."""

from __future__ import annotations

import random
import time
from html.parser import HTMLParser

import pytest

from glm4lite_ui.markdown import Growing, blocks, code
from tests.ui.test_markup import KNOWN, nasty

TAGS = {
    "p", "h1", "h2", "h3", "h4", "h5", "h6", "ul", "ol", "li", "blockquote", "hr", "br", "em", "strong", "s", "a",
    "code", "pre", "span", "div", "table", "thead", "tbody", "tr", "th", "td",
}  # fmt: skip


def html(text: str) -> str:
    return "".join(blocks(text))


class Tags(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def check(text: str) -> None:
    for tag, attributes in Tags(html(text)).found:
        assert tag in TAGS or tag.startswith("m"), (tag, text)  # or of MathML
        assert not [name for name in attributes if name.startswith("on") or name in ("style", "id", "src")], text
        address = attributes.get("href")
        assert address is None or address.startswith(("http://", "https://", "mailto:")), text


@pytest.mark.parametrize("text", KNOWN)
def test_nothing_but_what_markdown_means_becomes_html(text: str) -> None:
    check(text)


def test_nor_of_a_thousand_texts_that_want_to_be_more() -> None:
    chance = random.Random(11)
    for _ in range(1000):
        check(nasty(chance))


@pytest.mark.parametrize("step", [1, 7])
def test_a_text_that_grows_ends_as_the_whole(step: int) -> None:
    chance = random.Random(12)
    texts = ["# A\n\n- a\n- b\n\n  c\n\n```py\nx = 1\n\ny\n```\n\n| a |\n|---|\n| b |\n\n$$\nx\n$$\n\nend", *KNOWN]
    for text in [*texts, *("\n\n".join(nasty(chance) for _ in range(3)) for _ in range(20))]:
        growing = Growing()
        for end in range(step, len(text), step):
            growing.blocks(text[:end])
        last = growing.blocks(text)
        # A definition of a link that came late is seen by the whole alone, which is drawn at the end.
        if "]:" not in text:
            assert "".join(last) == html(text), text


def test_only_the_last_block_is_read_again() -> None:
    growing, text, began = Growing(), "", time.thread_time()
    for _ in range(1500):
        text += "A paragraph of a few words, *and more*.\n\n"
        growing.blocks(text)
    assert time.thread_time() - began < 5
    assert len(growing.blocks(text)) == 1500


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("$x < y$", "<mo>&lt;</mo>"),
        ("a $5 and $10 b", "$5 and $10"),
        ("\\(a\\) \\[b\\]", "<mi>a</mi>"),
        ("$$\n\\begin{aligned} a &= b \\end{aligned}\n$$", "<mtable"),
        ("$\\undefined{$", "<code>\\undefined{</code>"),
        ("H~2~O", "H~2~O"),
        ("~~gone~~", "<s>gone</s>"),
        ("- [x] done", 'aria-label="done"'),
        ("![a picture](http://a.example/p.png)", '<a href="http://a.example/p.png"'),
        ("see http://a.example/b(c), so", 'href="http://a.example/b(c)"'),
        ("مرحبا", '<p dir="auto">'),
        ("| a |\n|--:|\n| 1 |", 'class="to-right"'),
    ],
)
def test_what_is_shown(text: str, shown: str) -> None:
    assert shown in html(text)


def test_code_is_kept_to_the_last_sign() -> None:
    class Text(Tags):
        said = ""

        def handle_data(self, data: str) -> None:
            self.said += data

    for text in ("\n\n  a\tb\n\n", "x", "<b>&lt;\n", "def f():\n\n\treturn 1\n"):
        for language in ("", "python", "no-such", "html"):
            assert Text(code(text, language)).said == text


@pytest.mark.parametrize(
    "text",
    [
        "[" * 20_000,
        "![" * 20_000,
        "> " * 2000 + "deep",
        "- " * 2000 + "deep",
        "$" * 20_000,
        "$a " * 20_000,
        "\\(" * 9000,
        "word <b> " * 60_000,
        "$$" + "{" * 1900 + "$$",
        "```python\n" + "'''" * 20_000 + "\n```",
    ],
)
def test_no_text_takes_long(text: str) -> None:
    began = time.thread_time()
    shown = html(text)
    assert time.thread_time() - began < 6
    assert ("deep" in shown) == ("deep" in text)
