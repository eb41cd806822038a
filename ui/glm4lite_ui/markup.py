"""Markdown in, Markdown out: what a text says, written anew so that every reader finds the same in it. For exports.

Readers of Markdown differ. What one takes for code is HTML to the next: some link bare addresses before they look for
code, take formulas out before they look for anything, or make HTML of diagrams. So a text is parsed once, by
markdown-it and without HTML, and what was found is written in its plainest form: a sign that could mean something
stands as its entity, code lies in fences that nothing in it can close, pictures become links.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Sequence
from urllib.parse import quote

from markdown_it.tree import SyntaxTreeNode

from glm4lite_ui.formulas import NESTED, parser

LONGEST = 300_000  # characters that are read as Markdown: more than a context holds
_PARSER = parser()
_RESERVED = dict.fromkeys(range(0xFDD0, 0xFDF0), "\ufffd")  # what Unicode keeps for a program's own use
_MEANS_SOMETHING = re.compile(r"[\\`*_\[\]<>&~|:@!]|(?<=www)\.", re.IGNORECASE)
_ADDRESS = re.compile(r"https?://[!#-;=?-\[\]_a-z~]+", re.IGNORECASE)
_LANGUAGE = re.compile(r"[\w+#.-]{1,30}", re.ASCII)


def literal(text: str) -> str:
    """Markdown of one line that is shown as `text`, sign by sign."""
    return _guarded(_escaped(_showable(text)))


def code_block(text: str, language: str = "") -> str:
    """A fence that is longer than any inside. Some readers make HTML of a diagram's source, so none is called one."""
    runs = (len(run) for run in re.findall(r"`{3,}", text))
    fence = "`" * (max(runs, default=2) + 1)
    named = language if _LANGUAGE.fullmatch(language) and language.casefold() != "mermaid" else ""
    return f"{fence}{named}\n{_showable(text)}\n{fence}"


def text_html(text: object) -> str:
    """For HTML that Gradio reads as a template too: nothing of it may look like one."""
    escaped = html.escape(str(text))
    return escaped.translate({ord(sign): f"&#{ord(sign)};" for sign in "{}$`\\"})


def safe_markdown(text: str) -> str:
    """The same Markdown without HTML and pictures; see the module."""
    text = _showable(text)
    if len(text) > LONGEST:
        return _paragraphs(text)
    tokens = _PARSER.parse(text, {})
    if any(token.level >= NESTED - 1 for token in tokens):
        return _paragraphs(text)
    return "\n".join(_blocks(SyntaxTreeNode(tokens).children))


def _showable(text: str) -> str:
    """Without halves of signs, and without what the page writes for itself."""
    return text.encode("utf-8", "replace").decode("utf-8").translate(_RESERVED)


def _paragraphs(text: str) -> str:
    return "\n".join(map(literal, text.splitlines()))


# Blocks: each is a list of lines, so that what holds them can write its prefix before each


def _blocks(nodes: Sequence[SyntaxTreeNode], tight: bool = False) -> list[str]:
    """With a blank line between two, except in a list that has none."""
    lines: list[str] = []
    for block in filter(None, map(_block, nodes)):
        lines += ["", *block] if lines and not tight else block
    return lines


def _block(node: SyntaxTreeNode) -> list[str]:
    match node.type:
        case "paragraph":
            return [line for line in _guarded(_inline(node)).split("\n") if line]
        case "heading":
            title = " ".join(_inline(node).replace("\\\n", "\n").split("\n"))
            return [f"{'#' * int(node.tag[1])} {re.sub('#$', '&#35;', title)}"]
        case "blockquote":
            return [f"> {line}" if line else ">" for line in _blocks(node.children)]
        case "bullet_list" | "ordered_list":
            return _list(node)
        case "fence" | "code_block":
            return code_block(node.content.removesuffix("\n"), node.info.split(" ")[0]).split("\n")
        case "table":
            return _table(node)
        case "formula":
            return [_formula(node)]
        case _:
            return ["___"]


def _list(node: SyntaxTreeNode) -> list[str]:
    lines: list[str] = []
    tight = not any(child.type == "paragraph" and not child.hidden for item in node.children for child in item.children)
    items = [_blocks(item.children, tight) for item in node.children]
    for number, item in enumerate(items, int(node.attrs.get("start", 1))):
        marker = node.markup if node.type == "bullet_list" else f"{number % 10**9}{node.markup}"
        if lines and not tight:
            lines.append("")
        first, *others = item or [""]
        lines.append(f"{marker} {first}" if first else marker)
        lines += [" " * (len(marker) + 1) + line if line else "" for line in others]
    return lines


def _table(node: SyntaxTreeNode) -> list[str]:
    rows = [[_cell(cell) for cell in row.children] for part in node.children for row in part.children]
    ruler = [_RULERS.get(str(cell.attrs.get("style", "")), "---") for cell in node.children[0].children[0].children]
    return [f"| {' | '.join(row)} |" for row in (rows[0], ruler, *rows[1:])]


_RULERS = {"text-align:left": ":--", "text-align:center": ":-:", "text-align:right": "--:"}


def _cell(node: SyntaxTreeNode) -> str:
    """Readers disagree about a bar in code, so that is written as text."""
    return _inline(node, barred="|").replace("\\\n", " ").replace("\n", " ")


def _guarded(written: str) -> str:
    """Lines none of which begins a list, a heading or an underline."""
    lines = (line.strip(" ") for line in written.split("\n"))
    return "\n".join(re.sub(r"^(\d{1,9}(?=[.)])|(?=[-+=#]))", r"\1\\", line) for line in lines)


# Inside a block. `barred` are signs that code may not hold there, `within` the kinds of node around a piece.


def _inline(node: SyntaxTreeNode, barred: str = "") -> str:
    """What a paragraph, a heading or a cell holds. Code with a barred sign in it is written as text.

    So is code with backticks in it beside emphasis and links: marked looks for their ends inside of such code.
    """
    nodes = node.children[0].children if node.children else []
    if any(child.type not in ("text", "code_inline", "softbreak") for child in nodes):
        barred += "`"
    return _pieces(nodes, barred, frozenset())


def _pieces(nodes: Sequence[SyntaxTreeNode], barred: str, within: frozenset[str]) -> str:
    return "".join(_piece(node, barred, within) for node in nodes)


def _piece(node: SyntaxTreeNode, barred: str, within: frozenset[str]) -> str:
    match node.type:
        case "text":
            return _escaped(node.content) if "link" in within else _addresses_linked(node.content)
        case "code_inline":
            barred_here = any(sign in node.content for sign in barred)
            return _escaped(node.content) if barred_here else _code_span(node.content)
        case "softbreak" | "hardbreak":
            return "\n" if node.type == "softbreak" else "\\\n"
        case "formula":
            return _formula(node)
        case "image":
            label, address = _escaped(node.content or str(node.attrs["src"])), str(node.attrs["src"])
            return label if "link" in within else _link(label, address)
        case _:
            return _around(node, barred, within)


_MARKS = {"em": "*", "strong": "**", "s": "~~"}


def _around(node: SyntaxTreeNode, barred: str, within: frozenset[str]) -> str:
    """Emphasis or a link; only what it holds, where marked might see its end inside of code."""
    inner = _pieces(node.children, barred, within | {node.type})
    ends = "[]" if node.type == "link" else _MARKS[node.type][0]
    code = (piece.content for piece in node.walk() if piece.type == "code_inline")
    if node.type in within or not inner.strip() or any(sign in text for text in code for sign in ends):
        return inner
    if node.type == "link":
        return _link(inner, str(node.attrs["href"]))
    return _MARKS[node.type] + inner + _MARKS[node.type]


def _link(label: str, address: str) -> str:
    """A link to another machine's page or a mail address; of any other, the label."""
    if not re.match(r"https?://|mailto:", address, re.IGNORECASE):
        return label
    return f"[{label}]({quote(address, safe='%/:?#=&;+,@').replace('&', '&amp;')})"


def _addresses_linked(text: str) -> str:
    pieces, end = [], 0
    for found in _ADDRESS.finditer(text):
        address = found.group().rstrip(".,;:!?'*~])" if "(" not in found.group() else ".,;:!?'*~]")
        pieces += [_escaped(text[end : found.start()]), _link(_escaped(address), address)]
        end = found.start() + len(address)
    return "".join([*pieces, _escaped(text[end:])])


def _code_span(content: str) -> str:
    runs = {len(run) for run in re.findall("`+", content)}
    fence = "`" * next(length for length in range(1, len(content) + 2) if length not in runs)
    blank = content.strip(" ") == ""
    edged = content.startswith("`") or content.endswith("`") or (content[0] == content[-1] == " " and not blank)
    return f"{fence} {content} {fence}" if edged else f"{fence}{content}{fence}"


def _formula(node: SyntaxTreeNode) -> str:
    left, right = node.meta["between"]
    return left + "&#10;".join(map(_escaped, node.content.split("\n"))) + right


def _escaped(text: str) -> str:
    """Text in which nothing means anything, on one line."""
    return "".join(map(_sign, _MEANS_SOMETHING.sub(lambda found: f"&#{ord(found.group())};", text)))


def _sign(sign: str) -> str:
    if sign.isprintable():
        return sign
    if sign in "\t\n\r":
        return " "
    return "\ufffd" if unicodedata.category(sign) == "Cc" else f"&#{ord(sign)};"
