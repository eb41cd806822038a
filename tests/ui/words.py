"""What the page can say: the texts of its scripts and templates, and the sentences the server may send it."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import glm4lite
import glm4lite_ui
from glm4lite.research.browser import Browser, research_tools
from glm4lite.tools.builtin.tools import BUILTIN_TOOLS
from glm4lite.tools.python import python
from glm4lite_ui.markdown import blocks

CORE, PAGE = Path(glm4lite.__file__).parent, Path(glm4lite_ui.__file__).parent
STATIC = PAGE / "static"
_SAID = re.compile(r"\bt\((?:'((?:[^'\\]|\\.)*)'|\"([^\"]*)\")")
_IN_TEMPLATES = re.compile(r'data-(?:t|label|hint)="([^"]*)"')
_LISTED = re.compile(r"const (?:KEYS|FIELDS) = \[\n(.*?)\n\];", re.DOTALL)
_SHORT = re.compile(r"'((?:[^'\\]|\\.)*)'")
_LABEL = re.compile(r'aria-label="([^"]*)"')
_KEY = re.compile(r"^  '((?:[^'\\]|\\.)*)': '((?:[^'\\]|\\.)*)',$")
_ELSEWHERE = ("benchmark", "evaluate", "export", "quantize", "loop")  # commands of the terminal
_TOOLS = (*BUILTIN_TOOLS, python, *research_tools(Browser([]), finish=False))
UNTRUSTED = CORE / "untrusted"
_MARKDOWN = "- [x] a\n- [ ] b\n\n| a |\n|---|\n| b |\n\n```\nc\n```\n\n$$x$$"
_PYTHON_LIMITS = CORE / "tools" / "sandbox" / "jail.py"


def table() -> dict[str, str]:
    """English and Chinese, in the order of words.js, every line of which must be an entry."""
    text = (STATIC / "words.js").read_text(encoding="utf-8").split("const CHINESE = {\n")[1].split("\n};")[0]
    entries = [_KEY.match(line) for line in text.splitlines() if line.strip() and not line.strip().startswith("//")]
    assert all(entries)
    found = [(entry[1].replace("\\'", "'"), entry[2].replace("\\'", "'")) for entry in entries if entry]
    assert len(dict(found)) == len(found)
    return dict(found)


def texts_of_the_page() -> set[str]:
    found = set[str]()
    for script in STATIC.glob("*.js"):
        text = script.read_text(encoding="utf-8")
        found |= {one or other for one, other in _SAID.findall(text)}
        for listed in _LISTED.findall(text):
            rows = [_SHORT.findall(row) for line in listed.splitlines() for row in line.split("], [")]
            found |= {text for words in rows for text in words[1:3]}
    for template in STATIC.glob("*.html"):
        found |= set(_IN_TEMPLATES.findall(template.read_text(encoding="utf-8")))
    found |= set(_LABEL.findall("".join(blocks(_MARKDOWN))))
    return {text.replace("\\'", "'") for text in found if text}


def texts_of_the_server() -> set[str]:
    """Patterns of sentences, what errors of the page say, what progress is called, what tools are for."""
    found = {tool.description.split("\n", 1)[0] for tool in _TOOLS}
    for file, call in _calls():
        kind = _name(call.func)
        own = PAGE in file.parents or UNTRUSTED in file.parents or bool(call.keywords)
        if kind == "Sentence" or (kind in _errors() and own) or (kind == "__init__" and file.stem == "errors"):
            found |= _literals(*call.args[:1])
        elif kind in ("Progress", "Meter") and file.stem not in _ELSEWHERE:
            found |= _literals(*call.args)
        elif kind == "_found":
            found |= _literals(*call.args[1:2])
    found |= set(re.findall(r'left_out\["([^"]+)"\]', (PAGE / "untrusted/messages.py").read_text(encoding="utf-8")))
    found |= set(re.findall(r'^ +"([a-z ]+)": not', _PYTHON_LIMITS.read_text(encoding="utf-8"), re.MULTILINE))
    return {text for text in found if re.search("[A-Za-z]", re.sub(r"\{\w+\}", "", text)) and text != "text"}


def errors_without_a_pattern() -> list[str]:
    """Calls in the page's package that make an error of a text with values in it, which no table can hold."""
    return [
        f"{file.relative_to(PAGE)}:{call.lineno}"
        for file, call in _calls()
        if PAGE in file.parents and _name(call.func) in {*_errors(), "Sentence"} and call.args
        if isinstance(call.args[0], ast.JoinedStr | ast.BinOp)
    ]


def _calls() -> Iterator[tuple[Path, ast.Call]]:
    return ((file, node) for file, node in _nodes() if isinstance(node, ast.Call))


@functools.cache
def _nodes() -> list[tuple[Path, ast.AST]]:
    files = [file for folder in (CORE, PAGE) for file in sorted(folder.rglob("*.py"))]
    return [(file, node) for file in files for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))]


def _name(function: ast.expr) -> str:
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


@functools.cache
def _errors() -> set[str]:
    """The names of all errors that a user can cause."""
    bases = {node.name: {_name(base) for base in node.bases} for _, node in _nodes() if isinstance(node, ast.ClassDef)}
    found, grown = set[str](), {"Glm4liteError"}
    while grown:
        found |= grown
        grown = {name for name, over in bases.items() if over & found} - found
    return found


def _literals(*arguments: ast.expr) -> set[str]:
    found = set[str]()
    for argument in arguments:
        if isinstance(argument, ast.IfExp):
            found |= _literals(argument.body, argument.orelse)
        elif isinstance(argument, ast.Constant) and isinstance(argument.value, str):
            found.add(argument.value)
    return found
