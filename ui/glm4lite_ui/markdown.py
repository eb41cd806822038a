"""Markdown as the HTML that the page shows: a list of blocks, each of which a sanitizer has seen.

markdown-it reads a text without HTML, so that no tag is the text's own; what is rendered still passes nh3 (ammonia),
with the few tags and attributes that are used here. A text that grows is read again only from its last block on.
"""

from __future__ import annotations

import functools
import html
import re
from collections.abc import Iterator, MutableMapping, Sequence
from typing import Any

import nh3
from markdown_it.renderer import RendererHTML
from markdown_it.token import Token
from markdown_it.utils import OptionsDict

from glm4lite_ui.formulas import DISPLAY, NESTED, parser

LONGEST = 300_000  # characters that are read as Markdown: more than a context holds
LONGEST_CODE = 50_000  # characters that are highlighted
GROWING_CODE = 4_000  # and of a block that is still being written, which is drawn again and again
LONGEST_FORMULA = 2_000

_MATH = {
    "math", "mrow", "mi", "mo", "mn", "mtext", "mspace", "mfrac", "msqrt", "mroot", "msub", "msup", "msubsup", "munder",
    "mover", "munderover", "mtable", "mtr", "mtd", "mstyle", "mpadded", "mphantom", "menclose",
}  # fmt: skip
_MATH_ATTRIBUTES = {
    "display", "displaystyle", "scriptlevel", "stretchy", "fence", "form", "accent", "columnalign", "rowspacing",
    "columnspacing", "notation", "width", "lspace", "rspace", "minsize", "maxsize", "mathvariant", "linethickness",
}  # fmt: skip
_TEXT = "p h1 h2 h3 h4 h5 h6 ul ol li blockquote hr br em strong s a code pre span div table thead tbody tr th td"
_SANITIZER = nh3.Cleaner(
    tags={*_TEXT.split(), *_MATH},
    attributes={
        "*": {"dir"},
        "a": {"href", "title"},
        "ol": {"start"},
        "code": {"data-language"},
        "span": {"class", "role", "aria-label"},
        "div": {"class", "tabindex", "role", "aria-label"},
        "th": {"class"},
        "td": {"class"},
        **dict.fromkeys(_MATH, _MATH_ATTRIBUTES),
    },
    set_tag_attribute_values={"a": {"target": "_blank"}},
    url_schemes={"http", "https", "mailto"},
    url_relative="deny",
    link_rel="noopener noreferrer nofollow",
)
_ADDRESS = re.compile(r"https?://[!#-;=?-\[\]_a-z~]+", re.IGNORECASE)
_LANGUAGE = re.compile(r"[\w+#.-]{1,30}", re.ASCII)
_TASK = re.compile(r"\[([ xX])\] ")
_TURNED = {"paragraph_open", "heading_open", "list_item_open", "blockquote_open", "th_open", "td_open"}


def plain(text: str) -> str:
    """A text as it stands, as HTML."""
    return html.escape(text.encode("utf-8", "replace").decode())


@functools.lru_cache(256)  # a chat is drawn again whenever one of its turns changes
def blocks(text: str) -> tuple[str, ...]:
    """The blocks of a whole text, each as HTML."""
    return tuple(block for _, block in _read(text, {}))


def code(text: str, language: str = "", longest: int = LONGEST_CODE) -> str:
    """A block of code, highlighted where its language is known."""
    named = language if _LANGUAGE.fullmatch(language) else ""
    return _SANITIZER.clean(_code(text, named, longest))


class Growing:
    """The blocks of a text that only grows. What stands before its last block is read once."""

    def __init__(self) -> None:
        self._settled: list[str] = []
        self._begin = 0  # of the text that is not settled
        self._env: dict[str, Any] = {"growing": True}

    def blocks(self, text: str) -> list[str]:
        read = list(_read(text[self._begin :], self._env))
        if len(read) > 1:
            self._settled += [block for _, block in read[:-1]]
            self._begin += read[-1][0]
        return [*self._settled, *(block for _, block in read[-1:])]


def _read(text: str, env: dict[str, Any]) -> Iterator[tuple[int, str]]:
    """The blocks with the place in the text at which each begins."""
    text = text.encode("utf-8", "replace").decode()
    tokens = _PARSER.parse(text, env) if len(text) <= LONGEST else []
    if text and (not tokens or any(token.level >= NESTED - 1 for token in tokens)):
        if text.strip():
            yield 0, f'<p dir="auto" class="plain">{plain(text)}</p>'
        return
    begins = [0]
    begins += [found.end() for found in re.finditer(r"\r\n?|\n", text)]
    for group in _groups(tokens):
        line = group[0].map[0] if group[0].map else 0
        yield begins[line], _SANITIZER.clean(_RENDERER.render(group, _PARSER.options, env))


def _groups(tokens: Sequence[Token]) -> Iterator[list[Token]]:
    """The tokens of each block that lies in no other."""
    group: list[Token] = []
    for token in tokens:
        group.append(token)
        if token.level == 0 and token.nesting <= 0:
            yield group
            group = []


# How tokens are written


class _Renderer(RendererHTML):
    """What differs from markdown-it's own HTML."""

    def fence(self, tokens: Sequence[Token], idx: int, options: OptionsDict, env: MutableMapping[str, Any]) -> str:
        token = tokens[idx]
        named = (token.info.split() or [""])[0]
        longest = GROWING_CODE if env.get("growing") else LONGEST_CODE
        return _code(token.content, named if _LANGUAGE.fullmatch(named) else "", longest)

    code_block = fence

    def formula(self, tokens: Sequence[Token], idx: int, options: OptionsDict, env: MutableMapping[str, Any]) -> str:
        token = tokens[idx]
        return _formula(token.content, token.meta["between"] == DISPLAY)

    def table_open(self, tokens: Sequence[Token], idx: int, options: OptionsDict, env: MutableMapping[str, Any]) -> str:
        return '<div class="wide" tabindex="0" role="region" aria-label="table"><table>'

    def table_close(
        self, tokens: Sequence[Token], idx: int, options: OptionsDict, env: MutableMapping[str, Any]
    ) -> str:
        return "</table></div>"

    def task(self, tokens: Sequence[Token], idx: int, options: OptionsDict, env: MutableMapping[str, Any]) -> str:
        done = tokens[idx].content != " "
        return f'<span class="task" role="img" aria-label="{"done" if done else "open"}">{"☑" if done else "☐"}</span> '


def _code(text: str, language: str, longest: int) -> str:
    named = f' data-language="{language}"' if language else ""
    inner = _highlighted(text, language) if language and len(text) <= longest else plain(text)
    pre = f"<pre><code{named}>{inner}</code></pre>"
    return f'<div class="code"><div class="lines" tabindex="0" role="region" aria-label="code">{pre}</div></div>'


def _highlighted(text: str, language: str) -> str:
    from pygments import highlight
    from pygments.formatters.html import HtmlFormatter
    from pygments.lexers import get_lexer_by_name
    from pygments.util import ClassNotFound

    try:
        lexer = get_lexer_by_name({"svg": "xml"}.get(language.lower(), language), stripnl=False, ensurenl=False)
    except ClassNotFound:
        return plain(text)
    shown = str(highlight(text.encode("utf-8", "replace").decode(), lexer, HtmlFormatter(nowrap=True)))
    return shown if text.endswith("\n") else shown.removesuffix("\n")


@functools.lru_cache(512)
def _formula(source: str, display: bool) -> str:
    """MathML; what cannot be read as LaTeX stands as it was written."""
    from latex2mathml.converter import convert

    # Inside of \[ and $$ the library knows an aligned block only under its name outside of them.
    known = source.replace("{aligned}", "{align*}").replace("{gathered}", "{gather*}")
    try:
        if len(source) > LONGEST_FORMULA:
            raise ValueError
        made = str(convert(known, display="block" if display else "inline"))
    except Exception:  # of a stranger's formula the library raises whatever it met
        return f"<code>{plain(source)}</code>"
    if not display:
        return made
    return f'<div class="wide formula" tabindex="0" role="region" aria-label="formula">{made}</div>'


# What is changed in the tokens before


def _polished(state: Any) -> None:
    """The direction of each block from its text, tasks, addresses as links, pictures as links to them."""
    for place, token in enumerate(state.tokens):
        if token.type in _TURNED:
            token.attrSet("dir", "auto")
        if token.type in ("th_open", "td_open") and (style := token.attrs.pop("style", None)):
            token.attrSet("class", str(style).replace("text-align:", "to-"))
        if token.type == "inline":
            token.children = list(_linked(token.children or []))
            if state.tokens[place - 2].type == "list_item_open":
                _mark_task(token.children)


def _mark_task(children: list[Token]) -> None:
    if children and children[0].type == "text" and (found := _TASK.match(children[0].content)):
        children[0].content = children[0].content[found.end() :]
        children.insert(0, Token("task", "", 0, content=found[1]))


def _linked(children: Sequence[Token]) -> Iterator[Token]:
    depth = 0
    for token in children:
        depth += token.nesting if token.type.startswith("link") else 0
        if token.type == "image":
            label, address = token.content or str(token.attrs["src"]), str(token.attrs["src"])
            yield from [_text(label)] if depth else _link(label, address)
        elif token.type == "text" and not depth and "://" in token.content:
            yield from _addresses(token.content)
        else:
            yield token


def _addresses(text: str) -> Iterator[Token]:
    end = 0
    for found in _ADDRESS.finditer(text):
        address = found.group().rstrip(".,;:!?'*~])" if "(" not in found.group() else ".,;:!?'*~]")
        yield _text(text[end : found.start()])
        yield from _link(address, address)
        end = found.start() + len(address)
    yield _text(text[end:])


def _link(label: str, address: str) -> Iterator[Token]:
    yield Token("link_open", "a", 1, attrs={"href": address})
    yield _text(label)
    yield Token("link_close", "a", -1)


def _text(content: str) -> Token:
    return Token("text", "", 0, content=content)


_PARSER = parser()
_PARSER.core.ruler.push("polished", _polished)
_RENDERER = _Renderer(_PARSER)
