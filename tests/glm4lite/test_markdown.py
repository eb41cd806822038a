"""Markdown drawn as it comes: piece by piece the screen shows what the whole shows, and obeys nothing of a model's."""

from __future__ import annotations

import io
import logging
import random
import re
import time
from pathlib import Path

import pyte
import pytest
from rich.segment import Segment

from glm4lite.base.events import Event, TextDelta, ThinkingDelta
from glm4lite.cli import markdown
from glm4lite.cli.markdown import MarkdownStream, _rows, can_draw
from glm4lite.cli.terminal import Notices, Terminal

ROOT = Path(__file__).parents[2]
WIDTH, HEIGHT = 60, 15
ANSWER = '''# Title

Some *text*, **bold**, `code`, a [link](http://x.y/z) and <b>html</b>.
The second line.

- one
- two goes on and on and on until it has to be wrapped behind the right edge
  - nested
* **another** list

1. first

   ```python
   def f(x):
       return x
   ```
2. second

| a | b |
|---|--:|
| 1 | 2 |

```python
def hello():
    """Says hello.

    More."""
    return "a line of code that is longer than the screen is wide, which is the terminal's to wrap"
```

> quoted
> twice

***

The end.'''


class FakeTerminal(io.StringIO):
    """Keeps what is written to it, and says that it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"TERM": "xterm-256color", "COLUMNS": str(WIDTH), "LINES": str(HEIGHT)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NO_COLOR", raising=False)


@pytest.fixture
def each_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every piece is drawn, however quickly they come."""
    monkeypatch.setattr(markdown, "SHORTEST_S", 0)
    monkeypatch.setattr(markdown, "SHARE", 0)


def written(*pieces: str) -> str:
    out = FakeTerminal()
    stream = MarkdownStream(out)
    for piece in pieces:
        stream.feed(piece)
    stream.finish()
    return out.getvalue()


def shown(output: str, height: int = HEIGHT) -> list[str]:
    """All lines of a screen that got `output`, also those that scrolled away."""
    screen = pyte.HistoryScreen(WIDTH, height, history=10_000)
    screen.set_mode(pyte.modes.LNM)
    pyte.Stream(screen).feed(output)
    scrolled = ["".join(row[x].data for x in range(WIDTH)) for row in screen.history.top]
    lines = [line.rstrip() for line in (*scrolled, *screen.display)]
    while lines and not lines[-1]:
        lines.pop()
    return lines


def pieces(text: str, seed: int) -> list[str]:
    """The text in pieces as short as tokens."""
    draw, found = random.Random(seed), []
    while text:
        size = draw.randint(1, 7)
        found.append(text[:size])
        text = text[size:]
    return found


LONG = (ROOT / "docs/security.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("text", "seed"), [(ANSWER, 0), (ANSWER, 1), (ANSWER, 2), (LONG[: len(LONG) // 2], 0)])
def test_piece_by_piece_is_drawn_what_the_whole_is(text: str, seed: int, each_piece: None) -> None:
    assert shown(written(*pieces(text, seed))) == shown(written(text))


def test_what_is_drawn_reads_well() -> None:
    lines = shown(written(ANSWER))
    assert lines[:5] == [
        "Title",
        "",
        "Some text, bold, code, a link (http://x.y/z) and",
        "<b>html</b>.",
        "The second line.",
    ]
    text = "\n".join(lines)
    for part in (
        " • one\n • two goes on",
        "\n    • nested\n",
        " 1 first\n",
        " a  b\n",
        "▌ quoted\n▌ twice",
        "\nThe end.",
    ):
        assert part in text


def test_code_is_shown_as_it_is_so_that_it_can_be_copied() -> None:
    code = ANSWER.split("```python\ndef hello")[1].split("```")[0]
    output = re.sub(r"\x1b\[[0-9;]*m", "", written(ANSWER))
    assert "```python\ndef hello" + code + "```" in output


def test_a_block_longer_than_the_screen_is_written_once(each_piece: None) -> None:
    text = "```\n" + "".join(f"line {number}\n" for number in range(100)) + "```\n"
    output = written(*pieces(text, 1))
    assert shown(output) == text.strip().split("\n")
    assert output.count("line 10\n") < HEIGHT + 1


EVIL = [
    "\x1b[2J\x1b[31mred",
    "&#x1b;[2J&#27;[31m&#155;1A",
    "&#13;over&#x202e;&#8;&#7;",
    "[a](http://x/\x1b]8;;y\x07)",
    "[a](<http://x/&#27;]0;t&#7;>)",
    "![\x1b[1A](x\x9b1A)",
    "```\x1b[2J\n\x1b]0;title\x07\n```",
    "`\x1b[2J`\x9b1A\u202e",
    "| \x1b[2J | b |\n|---|---|\n| &#27; | \r |",
    "1. \x1b[1A\n   > \x9b2J",
]


@pytest.mark.parametrize("text", EVIL)
def test_no_escape_of_a_model_reaches_the_terminal(text: str, each_piece: None) -> None:
    allowed = r"\x1b\[[0-9;]*m|\x1b\[\d+A\r\x1b\[J"  # colors, and our own way back to the start of the block
    for parts in ([text], list(text), ["before\n\n", *text, "\n\nafter"]):
        left = re.sub(allowed, "", written(*parts))
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]", left), left


MARKUP = [
    "#",
    "*",
    "**",
    "_",
    "`",
    "```",
    "\n",
    "\n\n",
    " ",
    "- ",
    "1. ",
    "> ",
    "|",
    "---",
    "[",
    "]",
    "(",
    ")",
    "!",
    "<",
]
MARKUP += ["~~", "\\", "&", "word", "é", "\t", "    ", "\r\n", "https://a.b", "|-|-|", "===", "![", "](", "&#13;"]


@pytest.mark.parametrize("seed", [*range(10), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(10, 60))])
def test_any_markup_is_drawn_piece_by_piece_as_in_whole(seed: int, each_piece: None) -> None:
    draw = random.Random(seed)
    text = "".join(draw.choice(MARKUP) for _ in range(120))
    assert shown(written(*pieces(text, seed)), 1000) == shown(written(text), 1000)


def test_rows_are_counted_as_a_terminal_wraps_them() -> None:
    for text, rows in [
        ("", 1),
        ("a" * 60, 1),
        ("a" * 61, 2),
        ("a" * 59 + "中", 2),
        ("中" * 30, 1),
        ("a" + "中" * 60, 3),
    ]:
        assert _rows([Segment(text)], WIDTH) == rows, text


def test_drawing_costs_a_small_part_of_the_time_however_long_an_answer_is() -> None:
    text = "A word, a **second** and more of them in one paragraph. " * 1500
    started, used = time.monotonic(), time.process_time()
    out = FakeTerminal()
    stream = MarkdownStream(out)
    for piece in re.findall(r"\S+ ", text):
        stream.feed(piece)
    fed = time.process_time() - used
    stream.finish()
    assert fed < 3, (fed, time.monotonic() - started)
    assert len(out.getvalue()) < 40 * len(text)


def test_an_answer_of_many_blocks_costs_no_more_for_its_length(each_piece: None) -> None:
    def drawn(count: int) -> int:
        return len(written(*pieces("A paragraph of some words.\n\n" * count, 1)))

    assert drawn(200) < 12 * drawn(20)


def test_thoughts_and_answers_take_turns_on_the_screen() -> None:
    screen = FakeTerminal()
    events: list[Event] = [
        ThinkingDelta("Hm"),
        TextDelta("**One"),
        TextDelta("**"),
        ThinkingDelta("So"),
        TextDelta("Two\n"),
    ]
    Terminal(screen, screen).show_all(iter(events))
    assert shown(screen.getvalue()) == ["Hm", "One", "So", "Two"]


def test_a_notice_amid_an_answer_stands_on_a_line_of_its_own() -> None:
    screen = FakeTerminal()
    terminal = Terminal(screen, screen)
    terminal.show(TextDelta("One\ntwo"))
    Notices(screen, terminal.end_line).emit(logging.makeLogRecord({"msg": "careful"}))
    terminal.show_all(iter([TextDelta("three"), TextDelta(" four")]))
    assert shown(screen.getvalue()) == ["One", "two", "careful", "three four"]


@pytest.mark.parametrize("term", ["dumb", "unknown", ""])
def test_a_terminal_without_a_cursor_gets_the_text(term: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", term)
    out = FakeTerminal()
    assert not can_draw(out)
    assert not can_draw(io.StringIO())
    Terminal(out, io.StringIO()).show_all(iter([TextDelta("**a**\x1b[2J")]))
    assert out.getvalue() == "**a**\ufffd[2J\n"
