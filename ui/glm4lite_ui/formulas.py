"""Markdown as the page reads it: CommonMark with tables, struck text and formulas, without HTML."""

from __future__ import annotations

import re

from markdown_it import MarkdownIt
from markdown_it.rules_block import StateBlock
from markdown_it.rules_inline import StateInline, image, link

# What a formula is written between for the page: signs that no text may hold, so that none but this makes a formula.
INLINE, DISPLAY = ("\ufdd0", "\ufdd1"), ("\ufdd2", "\ufdd3")
NESTED = 100  # quotes and lists in each other; the parser drops what lies deeper
LINKS = 3000  # attempts at one; each may look through the rest of its paragraph
_DOLLARS = re.compile(r"\$(?![\s$])((?:[^$\\\n]|\\.){0,500}?)(?<!\s)\$(?![\d$])")
_FORMULAS = [("$$", "$$", DISPLAY), ("\\[", "\\]", DISPLAY), ("\\(", "\\)", INLINE)]


def parser() -> MarkdownIt:
    """A node "formula" holds what stands between its signs; its meta says what to write it between."""
    parser = MarkdownIt("commonmark", {"html": False, "maxNesting": NESTED}).enable(["table", "strikethrough"])
    parser.inline.ruler.before("escape", "formula", _formula_in_line)
    parser.inline.ruler.at("link", _link)
    parser.inline.ruler.at("image", _image)
    parser.block.ruler.before("fence", "formula", _formula_block, {"alt": ["paragraph", "blockquote", "list"]})
    return parser


def _formula_in_line(state: StateInline, silent: bool) -> bool:
    for left, right, between in _FORMULAS:
        if not state.src.startswith(left, state.pos):
            continue
        begin = state.pos + len(left)
        end = state.src.find(right, begin, state.posMax)
        if end < 0 or not state.src[begin:end].strip():
            return False
        if not silent:
            state.push("formula", "", 0).meta["between"] = between
            state.tokens[-1].content = state.src[begin:end].strip()
        state.pos = end + len(right)
        return True
    return _formula_between_dollars(state, silent)


def _formula_between_dollars(state: StateInline, silent: bool) -> bool:
    """`$x < y$`, but not what costs $5 or 6$: as in Pandoc, the formula touches its signs and no digit follows."""
    found = _DOLLARS.match(state.src, state.pos, state.posMax)
    if not found:
        return False
    if not silent:
        state.push("formula", "", 0).meta["between"] = INLINE
        state.tokens[-1].content = found[1]
    state.pos = found.end()
    return True


def _formula_block(state: StateBlock, start: int, end: int, silent: bool) -> bool:
    """A formula that begins a line and ends one, whatever lies between: a line of it may look like a list."""
    if state.is_code_block(start):
        return False
    opening = state.src[state.bMarks[start] + state.tShift[start] : state.eMarks[start]]
    for left, right, between in _FORMULAS[:2]:
        if not opening.startswith(left):
            continue
        last = _line_that_ends(state, right, start, end, len(left))
        if last is None:
            return False
        text = state.getLines(start, last + 1, state.blkIndent, False).strip()
        content = text.removeprefix(left).removesuffix(right).strip()
        if not content:
            return False
        if not silent:
            token = state.push("formula", "", 0)
            token.content, token.meta, token.map = content, {"between": between}, [start, last + 1]
            state.line = last + 1
        return True
    return False


def _line_that_ends(state: StateBlock, right: str, start: int, end: int, begin: int) -> int | None:
    """The line at whose end the formula does; None where it does not, or where text follows."""
    for line in range(start, end):
        if line > start and state.sCount[line] < state.blkIndent and not state.isEmpty(line):
            return None
        text = state.src[state.bMarks[line] + state.tShift[line] : state.eMarks[line]]
        if (found := text.find(right, begin if line == start else 0)) >= 0:
            return None if text[found + len(right) :].strip() else line
    return None


def _link(state: StateInline, silent: bool) -> bool:
    return _in_bounds(state) and link(state, silent)


def _image(state: StateInline, silent: bool) -> bool:
    return _in_bounds(state) and image(state, silent)


def _in_bounds(state: StateInline) -> bool:
    state.env["links"] = state.env.get("links", 0) + 1
    return bool(state.env["links"] <= LINKS)
