"""From a function's types and docstring to the JSON schema of its arguments, in the form people write such schemas."""

import functools
import inspect
import json
import re
import typing
from collections.abc import Callable, Iterable, Iterator
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, create_model
from pydantic.fields import FieldInfo

from glm4lite.base.errors import ToolError, one_line

TOOL_NAME = re.compile(r"[\w.-]{1,64}")
MAX_DEPTH = 64  # of a schema's objects and lists; templates print each level
MAX_CHARACTERS = 16_000  # of a tool's description and schema: about 5k tokens, in every prompt


class _Arguments(BaseModel):
    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=False)


class _OpenArguments(BaseModel):
    model_config = ConfigDict(extra="allow")


@functools.lru_cache(maxsize=256)
def arguments_model(function: Callable[..., Any]) -> type[BaseModel]:
    """A pydantic model of the function's parameters; TypeError where one has no type or cannot be named in a call.

    Fields are called arg0, arg1, … with the parameter's name as alias, because names such as "copy" or "_x" are taken
    or forbidden in a pydantic model.
    """
    hints = typing.get_type_hints(function, include_extras=True)
    _, descriptions = parse_docstring(inspect.getdoc(function) or "")
    fields: dict[str, Any] = {}
    base: type[BaseModel] = _Arguments
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            base = _OpenArguments
            continue
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.POSITIONAL_ONLY):
            raise TypeError(f"parameter {parameter.name!r} cannot be passed by name")
        if parameter.name not in hints:
            raise TypeError(f"parameter {parameter.name!r} has no type")
        hint = hints[parameter.name]
        description = _own_description(hint, parameter.default) or descriptions.get(parameter.name)
        default = ... if parameter.default is parameter.empty else parameter.default
        fields[f"arg{len(fields)}"] = (Annotated[hint, Field(alias=parameter.name, description=description)], default)
    return create_model(function.__name__ if hasattr(function, "__name__") else "arguments", __base__=base, **fields)


def _own_description(hint: object, default: object) -> str | None:
    """The text of `Annotated[…, Field(description=…)]` or `= Field(description=…)`."""
    fields = [item for item in (*getattr(hint, "__metadata__", ()), default) if isinstance(item, FieldInfo)]
    return next((field.description for field in reversed(fields) if field.description), None)


def tidy_schema(schema: dict[str, Any]) -> dict[str, Any]:
    """Pydantic's schema without its titles, keys in the order people write them: type, description, properties, …"""
    first = [key for key in ("type", "description", "properties", "required") if key in schema]
    rest = [key for key in schema if key not in first and key not in ("title", "additionalProperties")]
    if schema.get("additionalProperties") not in (None, False):
        rest.append("additionalProperties")
    return {key: _tidy_value(key, schema[key]) for key in first + rest}


def _tidy_value(key: str, value: Any) -> Any:
    if key in ("properties", "$defs"):  # their keys are names, and a parameter may be called "title"
        return {name: tidy_schema(inner) for name, inner in value.items()}
    if key in ("default", "enum", "const", "examples"):
        return value
    if isinstance(value, dict):
        return tidy_schema(value)
    if isinstance(value, list):
        return [_tidy_value("", item) for item in value]
    return value


def parse_docstring(text: str) -> tuple[str, dict[str, str]]:
    """The first paragraph as one line, and the entries of a Google-style "Args:" section."""
    summary = " ".join(text.split("\n\n", 1)[0].split())
    section = re.search(r"^(?:Args|Arguments|Parameters):[ \t]*\n((?:[ \t]+.*\n?|[ \t]*\n)+)", text, re.MULTILINE)
    if section is None:
        return summary, {}
    return ("" if text.startswith(section.group(0)) else summary), dict(_entries(section.group(1)))


def _entries(block: str) -> Iterator[tuple[str, str]]:
    """`name (type): text`, whose continuation lines are indented deeper."""
    lines = [line for line in block.splitlines() if line.strip()]
    margin = min(len(line) - len(line.lstrip()) for line in lines)
    name, words = "", list[str]()
    for line in lines:
        entry = re.match(r"\*{0,2}(\w+)[ \t]*(?:\([^)]*\))?:[ \t]*(.*)", line[margin:])
        if entry is None:
            words.append(line.strip())
            continue
        if name:
            yield name, " ".join(words).strip()
        name, words = entry.group(1), [entry.group(2)]
    if name:
        yield name, " ".join(words).strip()


def described(
    function: Callable[..., Any], name: str | None = None, description: str | None = None
) -> tuple[str, str, dict[str, Any]]:
    """The name, the description (the docstring's first paragraph) and the schema of a function's arguments.

    Raises ToolError when a parameter has no type or one that JSON cannot carry, or a prompt has no room for them.
    """
    name = name or function.__name__
    try:
        schema = tidy_schema(arguments_model(function).model_json_schema())
    except Exception as error:  # evaluating and describing types runs the code of whoever wrote them
        raise ToolError(f"tool {one_line(name)[:80]!r}: {one_line(error)[:500]}") from error
    summary, _ = parse_docstring(inspect.getdoc(function) or "")
    description = description or summary
    check_name(name)
    check_schema(name, description, schema)
    return name, description, schema


def openai_form(name: str, description: str, parameters: dict[str, Any]) -> dict[str, Any]:
    """What templates are shown of a tool, in the key order GLM-4 was trained on."""
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


def check_name(name: str) -> None:
    """Raises ToolError where a name is not one word: the model's call starts with it on a line of its own."""
    if not TOOL_NAME.fullmatch(name):
        raise ToolError(f"tool {name!r}: a tool's name is 1 to 64 letters, digits, '_', '-' or '.'")


def check_schema(name: str, description: str, schema: object) -> None:
    """Raises ToolError where `schema` is no JSON schema of an object, or one that no prompt has room for."""
    where = f"tool {name!r}: its schema"
    if not isinstance(schema, dict) or schema.get("type") != "object":
        raise ToolError(f"{where} must be an object with type 'object'")
    properties, required = schema.get("properties", {}), schema.get("required", [])
    if not isinstance(properties, dict) or not all(isinstance(one, dict | bool) for one in properties.values()):
        raise ToolError(f"{where}'s properties must be an object of schemas")
    if not isinstance(required, list) or not all(isinstance(one, str) and one in properties for one in required):
        raise ToolError(f"{where}'s required must be a list of its properties")
    check_size(name, description, schema)


def check_size(name: str, description: str, schema: object) -> None:
    """Raises ToolError for a schema that no prompt has room for, or that is not JSON."""
    where = f"tool {name!r}: its schema"
    try:
        text = json.dumps(schema, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ToolError(f"{where} is not JSON ({error})") from error
    if _depth(schema) > MAX_DEPTH:
        raise ToolError(f"{where} is nested more than {MAX_DEPTH} levels deep")
    size = len(description) + len(text)
    if size > MAX_CHARACTERS:
        raise ToolError(f"{where} has {size} characters, more than {MAX_CHARACTERS}")


def _depth(value: Any) -> int:
    """Levels of JSON data, counted without recursion."""
    depth, level = 0, [value]
    while level:
        depth += 1
        level = [inner for one in level for inner in _inner(one) if isinstance(inner, dict | list)]
    return depth


def _inner(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value
