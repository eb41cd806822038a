"""The process in which chat templates run. A template is code from a downloaded checkpoint: jinja2's immutable sandbox
keeps it from files and Python's internals, but `'a' * 10**10` or an endless loop would still take the whole program
down, and neither a trace function nor a table of forbidden filters catches every such expression inside C code.
A process of its own can be limited in memory and killed.

Run by template.py as a script, so it imports nothing of glm4lite. It reads one JSON request a line and answers
each with one line: `{"text": …}`, `{"openers": …}` or `{"error": …, "line": …}`.

Rendering is Hugging Face's (transformers/utils/chat_template_utils.py): same environment, filters and globals.
"""

import json
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils

OPENERS_LIMIT = 200  # different ones, each of which takes a pass through the conversation; GLM's templates have one
ERROR_LIMIT = 1000  # characters of a template's own words about what it refuses
ORPHAN_LIMIT_S = 30  # this process ends itself if the parent is gone and cannot


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's words for training; here it renders its body."""

    tags = {"generation"}  # noqa: RUF012  # jinja2's own declaration

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Callable[[], str]) -> str:
        return caller()


class _Namespace(jinja2.utils.Namespace):
    """jinja2's namespace without underscore names, through which a template could reach Python's internals."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # so that `namespace(self=…)` works
        self, *rest = args
        values = dict(*rest, **kwargs)
        for name in values:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace cannot hold {name!r}: it starts with an underscore")


class _Dict:
    """`dict` for templates, without the class's own attributes."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def _raise_exception(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Unlike jinja2's own filter this escapes neither Chinese nor `<`."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """The environment Hugging Face renders chat templates in; it has no loader, so `include` finds nothing."""
    env = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    env.filters["tojson"] = _tojson
    env.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now, dict=_Dict(), namespace=_Namespace)
    return env


# Methods whose argument is looked for in a text.
_LOOKING = {
    *(
        "split",
        "rsplit",
        "partition",
        "rpartition",
        "replace",
        "startswith",
        "endswith",
        "removeprefix",
        "removesuffix",
    ),
    *("find", "rfind", "index", "rindex", "count"),
}
_STRIPPING = {"strip", "lstrip", "rstrip"}


def openers(tree: jinja2.nodes.Template) -> str:
    """The first characters of the strings that a template may look for in a text, such as `</think>`.

    Any string that is not a plain word counts, wherever it stands, as it may get to a `split` through a variable; of
    plain words, which mostly name roles and keys, those that a text is searched for.
    """
    found = {text.lstrip()[:1] for text in _texts(tree) if not re.fullmatch(r"[\w\s]*", text)}
    for call in tree.find_all(jinja2.nodes.Call):
        method = call.node.attr if isinstance(call.node, jinja2.nodes.Getattr) else ""
        for text in (text for argument in call.args for text in _texts(argument)):
            found.update({text.lstrip()[:1]} if method in _LOOKING else text if method in _STRIPPING else ())
    for compared in tree.find_all(jinja2.nodes.Compare):
        if any(operand.op in ("in", "notin") for operand in compared.ops):
            found.update(text.lstrip()[:1] for text in _texts(compared.expr))
    for replaced in tree.find_all(jinja2.nodes.Filter):
        if replaced.name == "replace":
            found.update(text.lstrip()[:1] for argument in replaced.args for text in _texts(argument))
    return "".join(sorted(letter for letter in found if letter and not letter.isspace()))


def _texts(node: jinja2.nodes.Node) -> list[str]:
    constants = [node] if isinstance(node, jinja2.nodes.Const) else node.find_all(jinja2.nodes.Const)
    return [constant.value for constant in constants if isinstance(constant.value, str)]


class Renderer:
    """Compiled templates by name, and the answer to each request."""

    def __init__(self) -> None:
        self._environment = environment()
        self._templates: dict[str, jinja2.Template] = {}

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Compile `{"name", "source"}` or render `{"name", "limit", "variables"}`; an error is an answer as well."""
        try:
            if "source" in request:
                tree = self._environment.parse(request["source"])
                self._templates[request["name"]] = self._environment.from_string(tree)
                found = openers(tree)
                if len(found) > OPENERS_LIMIT:
                    return {"error": f"looks for strings with {len(found)} first characters, more than {OPENERS_LIMIT}"}
                return {"openers": found}
            return self._render(self._templates[request["name"]], request["limit"], request["variables"])
        except jinja2.exceptions.TemplateSyntaxError as error:
            return {"error": f"is not valid Jinja: {_short(error)}", "line": error.lineno}
        except jinja2.exceptions.SecurityError as error:
            return {"error": f"did what a chat template may not: {_short(error)}"}
        except jinja2.exceptions.UndefinedError as error:
            return {"error": f"failed: {_short(error)}"}
        except jinja2.exceptions.TemplateError as error:
            return {"error": f"refused the conversation: {_short(error)}"}
        except MemoryError:
            return {"error": "needed too much memory"}
        except RecursionError:
            return {"error": "is nested too deeply"}
        except Exception as error:  # a template can raise whatever Python can; the parent tells the user
            return {"error": f"failed: {type(error).__name__}: {_short(error)}"}

    def _render(self, template: jinja2.Template, limit: int, variables: dict[str, Any]) -> dict[str, Any]:
        pieces, size = list[str](), 0
        for piece in template.generate(**variables):
            pieces.append(piece)
            size += len(piece)
            if size > limit:
                return {"error": f"wrote more than {limit} characters for this conversation"}
        return {"text": "".join(pieces)}


def _short(error: jinja2.exceptions.TemplateError | Exception) -> str:
    message = error.message if isinstance(error, jinja2.exceptions.TemplateError) else str(error)
    return str(message)[:ERROR_LIMIT]


def _limit_process(memory: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    if sys.platform == "win32":  # it has none of the limits: the parent looks at time and memory
        return
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = memory if hard == resource.RLIM_INFINITY else min(memory, hard)
    try:
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    except (OSError, ValueError):  # macOS may refuse it
        return


@contextmanager
def _orphan_limit() -> Iterator[None]:
    """In here the process ends itself after ORPHAN_LIMIT_S: the parent may be gone and cannot."""
    if sys.platform == "win32":
        timer = threading.Timer(ORPHAN_LIMIT_S, os._exit, [1])
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
    else:
        signal.alarm(ORPHAN_LIMIT_S)
        yield
        signal.alarm(0)


def _write(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer, ensure_ascii=False) + "\n")  # escapes take the reader ten times as long
    sys.stdout.flush()


def main() -> None:
    """Answer requests until stdin ends, which it does when the parent does."""
    _limit_process(int(sys.argv[1]))
    for stream in (sys.stdin, sys.stdout):
        stream.reconfigure(encoding="utf-8", errors="surrogatepass")  # type: ignore[union-attr]
    renderer = Renderer()
    _write({"text": "ready"})
    for line in sys.stdin:
        with _orphan_limit():
            _write(renderer.answer(json.loads(line)))


if __name__ == "__main__":
    main()
