"""What programs and scripts may rely on is what `public_surface.txt` records: a change of it is a decision.

A line that goes, or says something else than before, breaks somebody's script; a new one is a promise. Both belong into
CHANGELOG.md. What an event holds is a promise within its version (glm4lite/base/events.py).
"""

from __future__ import annotations

import ast
import difflib
import inspect
import json
from collections.abc import Callable, Iterator
from inspect import Parameter
from pathlib import Path
from typing import Any

import typer

import glm4lite
import glm4lite_quant
from glm4lite import ChatSession, Completion, Engine, Glm4ForCausalLM, SamplingParams, Tool, load, tool
from glm4lite.cli.app import add_commands, app

RECORD = Path(__file__).with_name("public_surface.txt")
KINDS: dict[Any, str] = {Parameter.KEYWORD_ONLY: " (by name)", Parameter.VAR_KEYWORD: " (others by name)"}
SCHEMA = Path(__file__).parents[2] / "docs" / "events.schema.json"


def parameters(name: str, function: Callable[..., Any]) -> Iterator[str]:
    """One line for each; keyword-only ones and those with a default say so."""
    for parameter in inspect.signature(function).parameters.values():
        if parameter.name == "self":
            continue
        kind = KINDS.get(parameter.kind, "")
        default = "" if parameter.default is parameter.empty else f" = {_value(parameter.default)}"
        yield f"{name}({parameter.name}){kind}{default}"


def options(name: str, command: Any) -> Iterator[str]:  # of click, or of typer's own copy of it
    """One line for each argument and option of a command, with what stands for it where it is not given."""
    for parameter in command.params:
        said = "/".join((*parameter.opts, *parameter.secondary_opts))
        if parameter.param_type_name == "argument":
            said = parameter.name.upper()
        kind = " (switch)" if getattr(parameter, "is_flag", False) else " (repeated)" if parameter.multiple else ""
        variable = f" (or ${parameter.envvar})" if parameter.envvar else ""
        default = " (required)" if parameter.required else f" = {_value(parameter.default)}"
        yield f"{name} {said}{kind}{variable}{default}"


def fields(place: str, schema: dict[str, Any]) -> Iterator[str]:
    """One line for each field of an event, with all that the schema says of its values."""
    for name, described in schema["properties"].items():
        said = {key: value for key, value in described.items() if key not in ("description", "title")}
        needed = "" if name in schema["required"] else " (may be missing)"
        yield f"{place}.{name}{needed} {json.dumps(said, sort_keys=True)}"


def surface() -> Iterator[str]:
    for package in (glm4lite, glm4lite_quant):
        yield from (f"{package.__name__}.{name}" for name in sorted(package.__all__))
    classes = (ChatSession, Completion, SamplingParams, Tool)
    loading = (load, Glm4ForCausalLM.from_pretrained, Engine.load, ChatSession.load)
    for entry in (*classes, *loading, ChatSession.send, ChatSession.ask, Completion.run, tool):
        yield from parameters(entry.__qualname__, entry)
    add_commands()
    program: Any = typer.main.get_command(app)
    yield from options("glm4lite", program)
    for name, command in sorted(program.commands.items()):
        yield f"glm4lite {name}"
        yield from options(f"glm4lite {name}", command)
    for name, schema in json.loads(SCHEMA.read_text(encoding="utf-8"))["$defs"].items():
        yield from fields(f"event {name}", schema)


def _value(default: Any) -> str:
    if callable(default):
        return str(default.__name__)
    return json.dumps(default) if default is None or isinstance(default, str | bool | int) else repr(default)


def test_the_public_surface_is_the_recorded_one() -> None:
    recorded, found = RECORD.read_text(encoding="utf-8").splitlines(), list(surface())
    changed = [line for line in difflib.ndiff(recorded, found) if line[0] in "+-"]
    said = f"decide, then write it into {RECORD.name} and CHANGELOG.md:"
    assert not changed, "\n".join([said, *changed])


def test_type_checkers_see_the_names_that_are_imported_on_first_use() -> None:
    tree = ast.parse(Path(glm4lite.__file__).read_text(encoding="utf-8"))
    guarded = next(node for node in tree.body if isinstance(node, ast.If)).orelse
    imports = [node for node in guarded if isinstance(node, ast.ImportFrom)]
    shown = {(alias.asname, node.module) for node in imports for alias in node.names}
    assert shown == {(name, f"glm4lite.{home}") for name, home in glm4lite._HOMES.items()}
