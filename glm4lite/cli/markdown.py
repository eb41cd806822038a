"""Markdown drawn on a terminal while it is still being written.

A text is cut into blocks (a paragraph, an item of a list, a table, a block of code). A block is final once the next one
has a whole line; only the last one is drawn again as it grows, and of that only the lines that changed and are still on
the screen. So nothing flickers, what scrolled away stays as it is, and an answer's length costs nothing. A block that
takes long to draw is drawn less often: drawing takes a tenth of the time at most.

What a model writes is untrusted: no escape sequence of its own reaches the terminal, also not as an HTML entity, links
are shown with their address, and HTML is text.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, TextIO

from markdown_it import MarkdownIt
from markdown_it.token import Token
from rich.cells import chop_cells
from rich.console import Console, ConsoleDimensions, ConsoleOptions, RenderResult
from rich.markdown import CodeBlock, Heading, Markdown, MarkdownElement
from rich.segment import Segment, Segments
from rich.syntax import Syntax
from rich.text import Text

from glm4lite.cli.printable import printable

SHORTEST_S = 0.03  # between two drawings
SHARE = 9  # times as long as a drawing took passes until the next

Line = list[Segment]


def can_draw(out: TextIO) -> bool:
    """Whether `out` is a terminal whose cursor can be moved."""
    named = os.environ.get("TERM", "windows" if sys.platform == "win32" else "")
    if not out.isatty() or named in ("", "dumb", "unknown"):
        return False
    return not Console(file=out).legacy_windows


def last_block(text: str) -> str:
    """The end of a text from where its last block begins."""
    *_, last = "", *(block.text for block in _blocks(text))
    return last


class MarkdownStream:
    """Draws one text on a terminal as its pieces come; `finish` ends it, and the next one begins anew."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._console = Console(file=out, highlight=False, emoji=False, markup=False)
        self._begin()

    def _begin(self) -> None:
        self._pending = ""  # what belongs to blocks that are not final
        self._shown: list[Line] = []  # their lines on the screen, the cursor below them
        self._gap = False  # whether an empty line goes before the next block
        self._next_s = 0.0

    def feed(self, text: str) -> None:
        """Adds a piece, and draws what it changes unless that was done just now."""
        self._pending += text
        started = time.monotonic()
        if started < self._next_s:
            return
        self._draw(last=False)
        self._next_s = time.monotonic() + max(SHORTEST_S, SHARE * (time.monotonic() - started))

    def finish(self) -> None:
        """Draws what is left; the cursor is then at the start of a line."""
        self._draw(last=True)
        self._begin()

    def _draw(self, last: bool) -> None:
        held = "\r" if self._pending.endswith("\r") and not last else ""  # its \n may follow
        text = printable(self._pending.removesuffix(held))
        self._measure()
        blocks = list(_blocks(text))
        final = len(blocks) if last else _final(text)
        lines: list[Line] = []
        done, gap = 0, self._gap
        for index, block in enumerate(blocks):
            drawn = self._lines(block.text)
            lines += [[], *drawn] if gap and drawn else drawn
            gap = block.gap
            if index < final:
                done, self._gap = len(lines), gap
        self._show(lines)
        del self._shown[:done]
        self._pending = "\n".join(block.text for block in blocks[final:]) + held if blocks else text.lstrip("\n") + held
        self._out.flush()

    def _measure(self) -> None:
        """Takes the size from `out` itself: standard streams, which rich asks, may lead elsewhere."""
        try:
            columns, rows = os.get_terminal_size(self._out.fileno())
        except (OSError, ValueError):
            return
        if columns > 1 and rows > 1:
            self._console.size = ConsoleDimensions(columns, rows)

    def _lines(self, source: str) -> list[Line]:
        """A block as it is drawn, without empty lines around it."""
        try:
            segments = list(self._console.render(_Block(source)))
        except Exception:  # of rich, for markup nobody thought of: the text is shown as it is
            segments = [Segment(source)]
        lines = [_tidy(line) for line in Segment.split_lines(segments)]
        while lines and not lines[0]:
            del lines[0]
        while lines and not lines[-1]:
            del lines[-1]
        return lines

    def _show(self, lines: list[Line]) -> None:
        """Replaces the lines on the screen that are not final by these, from the first that differs on."""
        same = 0
        while same < min(len(lines), len(self._shown)) and lines[same] == self._shown[same]:
            same += 1
        width, height = self._console.size
        reachable = len(self._shown)
        rows = 0
        while reachable > same and rows + _rows(self._shown[reachable - 1], width) < height:
            reachable -= 1
            rows += _rows(self._shown[reachable], width)
        with self._console.capture() as drawn:  # written at once, so that nothing is seen half drawn
            for line in lines[reachable:]:
                self._console.print(Segments([*line, Segment.line()]), soft_wrap=True, end="")
        self._out.write((f"\x1b[{rows}A\r\x1b[J" if rows else "") + drawn.get())
        self._shown = self._shown[:reachable] + lines[reachable:]


@dataclass(frozen=True)
class _PartOfText:
    """One block's source; `gap`: an empty line follows it."""

    text: str
    gap: bool


def _blocks(text: str) -> Iterator[_PartOfText]:
    """The text cut where a block or an item of an outermost list begins."""
    placed = [(token, token.map[0]) for token in _PARSER.parse(text) if token.map]
    firsts = {line for token, line in placed if token.level == 0}
    starts = sorted(firsts | {line for token, line in placed if token.level == 1 and token.type == "list_item_open"})
    lines = text.split("\n")
    for start, end in pairwise((*starts, len(lines))):
        part = lines[start:end]
        yield _PartOfText("\n".join(part), end in firsts or not part[-1].strip())


def _final(text: str) -> int:
    """How many blocks of a text that goes on are final: by its whole lines, all but the last."""
    whole = text[: text.rfind("\n") + 1]
    return max(len(list(_blocks(whole))) - 1, 0)


def _tidy(line: Line) -> Line:
    """Without control characters that came as entities, and without the spaces that fill it up."""
    kept = [segment._replace(text=printable(segment.text)) for segment in line if not segment.control]
    while kept and not kept[-1].text.strip(" "):
        kept.pop()
    if kept:
        kept[-1] = kept[-1]._replace(text=kept[-1].text.rstrip(" "))
    return kept


def _rows(line: Line, width: int) -> int:
    """Rows of the screen that a line takes: one of code may be longer than one, and no wide character is cut in two."""
    return max(1, len(chop_cells("".join(segment.text for segment in line), width)))


_PARSER = MarkdownIt("commonmark", {"html": False}).enable("strikethrough").enable("table")


class _Code(CodeBlock):
    """Code between its fences, in the terminal's own colors. Long lines are the terminal's to wrap: a copy is exact."""

    fence: str = ""
    info: str = ""

    @classmethod
    def create(cls, markdown: Markdown, token: Token) -> _Code:
        code = cls(token.info.partition(" ")[0] or "text", "ansi_dark")
        code.fence, code.info = token.markup, token.info.strip()
        return code

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        code = Syntax(str(self.text), self.lexer_name, theme=self.theme).highlight(str(self.text).rstrip("\n"))
        code.rstrip()
        if options.max_width >= console.width:
            code.no_wrap, code.overflow = True, "ignore"
        if self.fence:
            yield Text(self.fence + self.info, "dim")
        yield code
        if self.fence:
            yield Text(self.fence, "dim")


class _Heading(Heading):
    LEVEL_ALIGN: ClassVar = dict.fromkeys(Heading.LEVEL_ALIGN, "left")


class _Block(Markdown):
    """rich's Markdown with lines that end where the model ended them, and nothing hidden."""

    elements: ClassVar[dict[str, type[MarkdownElement]]] = Markdown.elements | {
        "fence": _Code,
        "code_block": _Code,
        "heading_open": _Heading,
    }

    def __init__(self, source: str) -> None:
        super().__init__("", hyperlinks=False)
        self.parsed = _PARSER.parse(source)
        for token in self.parsed:
            for child in token.children or ():
                if child.type == "softbreak":
                    child.type = "hardbreak"
