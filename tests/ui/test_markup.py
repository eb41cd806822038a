"""What the page makes of texts that want to be more than text: CommonMark's own parser is the judge, then a browser."""

from __future__ import annotations

import random
import re
import time
from urllib.parse import unquote

import pytest
from markdown_it import MarkdownIt

from glm4lite.base.sentences import Sentence
from glm4lite_ui.chats import Chat, Part, Turn
from glm4lite_ui.export import as_markdown
from glm4lite_ui.formulas import DISPLAY, INLINE, parser
from glm4lite_ui.markup import code_block, literal, safe_markdown, text_html

COMMONMARK = MarkdownIt("commonmark", {"html": True})
GFM = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])

FORM = "<form action=http://127.0.0.1:9/><input name=password><button>log in</button></form>"
KNOWN = [
    "````<img src=http://127.0.0.1:9/x onerror=alert(1)>`",
    "\\![a](http://127.0.0.1:9/x)",
    "`a\n\n<img src=http://127.0.0.1:9/x>`",
    "````<svg onload=1><style>*{}</style>`",
    "$$<img src=http://127.0.0.1:9/x>$$",
    f"````{FORM}`",
    f"http://127.0.0.1:9/`{FORM}`",  # marked takes the backtick for a part of the address
    f"`` $$ `` and `` $$ {FORM} ``",  # Gradio takes out what lies between, with the ends of both pieces of code
    f"$$\n```\n$$ {FORM}\n```",
    f"```mermaid\n{FORM}\n```",  # Gradio makes HTML of a diagram's source
    f"- a\n  ```mermaid\n  {FORM}\n  ```",
    f"*a `` b` *{FORM} ``*",  # marked finds the end of emphasis in code
    f"~~a `b~~{FORM}` c~~",
    f"[a `` b` ](http://127.0.0.1:9/) {FORM} ``](http://127.0.0.1:9/)",
    f"a\n\n    {FORM}",  # what is indented by four is code; Gradio takes the indentation away
    f"|a|b|\n|-|-|\n|`x\\\\|{FORM}`|c|",
    f"~~~~a~~~~\n\n```\n~~~~\n{FORM}\n```",
    f"\ufdd2`\ufdd3{FORM}`",
    f"[a]: <x\n'{FORM}'\n\n[a]",
    f"<!--`-->{FORM}`",
    f"<a title='`'>{FORM}`",
    "![a][b]\n\n[b]: http://127.0.0.1:9/x",
    "[![a](http://127.0.0.1:9/x)](http://127.0.0.1:9/y)",
    "&lt;img src=x&gt; &#60;img src=x>",
    "[x](javascript:alert(1)) [y](data:text/html,<b>) [z](//other.example) <javascript:alert(1)>",
]
FRAGMENTS = [
    *("`", "``", "```", "````", "~~~", "~~", "$$", "\\(", "\\)", "\\[", "\\]", "\\", "\\\\", "*", "**", "_", "***"),
    *("<", "<img src=x>", FORM, "<!--", "-->", "<?x", "?>", "<![CDATA[", "]]>", "<!X ", "<script>", "</script>"),
    *("<br>", "<div>\n", "</pre>", "<a href='x'", "<b style=x", "<http://x/`y>", "http://a.b/`", "www.a/`", "a@b.c`"),
    *("![", "](", "](http://x/)", "[a]", "[a]: http://x/ 'y'\n", "[a]: <x\n", "[^1]", "[^1]: x", "[ ] ", "!", "\\!"),
    *("&lt;", "&#60;", "&amp;", "&#96;", "&#10;", "&#33;", "&#x5b;", "[x](javascript:alert(1))", "[x](//e.x)"),
    *("\n", "\n\n", "\n    ", "\n> ", "\n- ", "\n  ", "\n1. ", "\n7) ", "\n---\n", "\n===\n", "\n# ", "  \n"),
    *("| a | b |\n|---|---|\n", "|", "\\|", "\n```\n", "\n```mermaid\n", "\n```html\n", "\n~~~x\n", "\n````\n"),
    *("\0", "\ufeff", "\r", "\r\n", "\u2028", "\x0c", "\x85", "\xa0", "\u3000", "\ufdd0", "\ufdd2", "\udc80"),
    *("\t", " ", "a", "b c", "文", "，", "“", "€", "😀", "%%%LATEX_BLOCK_0%%%", "1."),
]  # fmt: skip


def nasty(chance: random.Random) -> str:
    return "".join(chance.choices(FRAGMENTS, k=chance.randint(1, 24)))


def drawn(reader: MarkdownIt, text: str) -> list[str]:
    """What the text has drawn that no text may: HTML, pictures, links to anything but pages and mail addresses."""
    tokens = [piece for token in reader.parse(text) for piece in (token, *(token.children or []))]
    addresses = [str(token.attrs["href"]) for token in tokens if token.type == "link_open"]
    found = [token.content for token in tokens if token.type in ("html_block", "html_inline", "image")]
    return found + [address for address in addresses if not re.match("https?://|mailto:", address)]


def check(text: str) -> None:
    for reader in (COMMONMARK, GFM):
        assert not drawn(reader, safe_markdown(text)), text


@pytest.mark.parametrize("text", KNOWN)
def test_no_element_and_no_picture_of_a_text_is_drawn(text: str) -> None:
    for end in range(len(text) + 1):  # as it streams
        check(text[:end])


def test_nor_of_any_other_text() -> None:
    chance = random.Random(1)
    for _ in range(3000):
        check(nasty(chance))


def test_what_is_no_markdown_is_drawn_sign_by_sign() -> None:
    chance = random.Random(4)
    for _ in range(500):
        text = nasty(chance)
        assert {token.type for token in GFM.parse(f"*{literal(text)}*") for token in token.children or []} <= {
            "text", "em_open", "em_close",
        }, text  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_nor_of_a_hundred_thousand_others() -> None:
    chance = random.Random(2)
    for _ in range(100_000):
        check(nasty(chance))


def words(reader: MarkdownIt, text: str) -> str:
    """The letters and digits that a reader sees."""
    tokens = [piece for token in reader.parse(text, {}) for piece in (token.children or [token])]
    return "".join(char for token in tokens if token.type != "inline" for char in token.content if char.isalnum())


def test_no_word_of_a_text_is_lost() -> None:
    chance, reader = random.Random(3), parser()
    for _ in range(1000):
        text = nasty(chance).replace("\udc80", "").replace("](", "")  # an image without a name shows its address
        assert words(GFM, safe_markdown(text)) == words(reader, text), text


@pytest.mark.parametrize(
    "text",
    [
        "# Title\n\nSome **bold**, *it*, ~~struck~~ `a<b>`\\\nand **`<form>`**.\n\n***\n\nUnder\n-----",
        "1. one\n   ```python\n   def f():\n\n       pass\n   ```\n2. two\n   - a\n     - b\n\n     c\n\n3) d\n4) e",
        "> quote\n> > inner\n>\n> ```\n>   \n> ```\n>\n> - a\n> - b\n\n1986\\. A year\n\n- \n- b",
        "| a | b | c |\n|:-|:-:|-:|\n| `x` | **y** | 1 |\n| \\| | | |",
        "你好，**世界**。\n\n* 一\n* 二\n\n&#12288;&#12288;段落",
        "[name](https://a.example/b_(c)?d=e&f=*g*) and ![picture](https://a.example/p.png)",
    ],
)
def test_what_a_text_means_is_kept(text: str) -> None:
    meant = GFM.render(text.replace("![", "["))
    assert unquote(GFM.render(safe_markdown(text))) == meant


def test_bare_addresses_are_links_that_end_before_what_follows_them() -> None:
    shown = GFM.render(safe_markdown("see http://a.example/b(c)?d=1, and (https://a.example/x). 见http://a.example。"))
    assert re.findall('href="([^"]*)"', shown) == [
        "http://a.example/b%28c%29?d=1", "https://a.example/x", "http://a.example",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "formula"),
    [
        ("so \\(a<b_1\\) holds", "a<b_1"),
        ("$$\\frac{a}{b}$$", "\\frac{a}{b}"),
        ("then:\n$$\na &= b % why\n= c\n\n- d\n$$\n", "a &= b % why\n= c\n\n- d"),
        ("- item\n  \\[\n  x\n  \\]", "x"),
    ],
)
def test_formulas_reach_the_page_between_signs_that_no_text_holds(text: str, formula: str) -> None:
    shown = "".join(token.content for token in GFM.parse(safe_markdown(text))[:-1] for token in token.children or [])
    (found,) = re.findall(f"[{INLINE[0]}{DISPLAY[0]}](.*?)[{INLINE[1]}{DISPLAY[1]}]", shown, re.DOTALL)
    assert found == formula


@pytest.mark.parametrize("text", ["`$$ x`", "```\n$$ x $$\n```", "$$ x", "`\\( y` \\)", "$$ $$", "a \ufdd0x\ufdd1"])
def test_what_is_no_formula_is_not_made_one(text: str) -> None:
    assert not re.search("[\ufdd0-\ufdd3]", safe_markdown(text))


def test_code_stays_as_it_is_and_nothing_in_it_can_end_it() -> None:
    code = "a ``` b\n\tc &lt; <d>\n````\n"
    (token,) = COMMONMARK.parse(code_block(code, "c++"))
    assert (token.content, token.info) == (code + "\n", "c++")
    assert code_block("x", "Mermaid").startswith("```\n")
    assert code_block("x", "a b` <").startswith("```\n")
    assert text_html("<{${`\\") == "&lt;&#123;&#36;&#123;&#96;&#92;"


@pytest.mark.parametrize(
    "text",
    ["[" * 20_000, "![" * 20_000, "[a][" * 20_000, "> " * 2000 + "deep", "- " * 2000 + "deep", "word <b> " * 60_000],
)
def test_no_text_takes_long_and_none_is_left_out(text: str) -> None:
    began = time.thread_time()
    shown = safe_markdown(text)
    assert time.thread_time() - began < 4
    assert ("deep" in shown) == ("deep" in text)
    assert "<b" not in shown


@pytest.mark.parametrize("text", KNOWN)
def test_an_exported_chat_draws_nothing_but_its_own_folds(text: str) -> None:
    thought, call = Part("thinking", 0, f"{text}\n</details>"), Part("call", 0, text, text, text, seconds=1)
    parts = [thought, call, Part("text", 0, text), Part("text", 1, "![a] ![b]\n\n[b]: http://127.0.0.1:9/x")]
    shown = as_markdown(Chat.of(Turn(text, parts=parts, error=Sentence(text)), title=text))
    folds = ("<details><summary>", "</details>", "<details>", "<summary>", "</summary>")
    assert not [one for one in drawn(COMMONMARK, shown) if not one.startswith(folds)]


def test_an_export_without_html_is_as_it_was_said() -> None:
    said = "1 < 2 & $$a<b$$, `<form>` *and* [so](http://a.example) on"
    assert said in as_markdown(Chat.of(Turn("Hi", parts=[Part("text", 0, said)])))
    safe = as_markdown(Chat.of(Turn("<b>", parts=[Part("text", 0, "so $$a$$ and \\(b\\)")])))
    assert "so $$a$$ and \\(b\\)" in safe
