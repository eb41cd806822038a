"""Tools: typed Python functions a model can call, and how one call is run.

    @tool
    def weather(city: str, days: int = 1) -> str:
        '''Forecast for a city.

        Args:
            city: Name of the city.
            days: How many days ahead.
        '''

`weather.schema()` is what the template shows the model; `run_tool(weather, call)` never raises: a bad argument, an
exception, an unserializable result or a timeout becomes an observation that starts with "Error: ".
"""

import asyncio
import functools
import inspect
import json
import re
import threading
import time
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, overload

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model
from pydantic.errors import PydanticUserError
from pydantic.fields import FieldInfo

from glm4lite.builtin_tools import arithmetic, clock, units
from glm4lite.errors import ToolError, one_line
from glm4lite.messages import ToolCall

MAX_RESULT_CHARACTERS = 16_000  # about 5k tokens; more would crowd the conversation out of the context
TOOL_NAME = re.compile(r"[\w.-]{1,64}")  # one word: the model's call starts with the name on a line of its own


@dataclass(frozen=True)
class ToolResult:
    """What a call gave: the text the model observes, and whether the tool failed."""

    content: str
    error: bool


@dataclass(frozen=True)
class Tool:
    """A function the model may call. `parameters` is the JSON schema of its arguments."""

    name: str
    description: str
    parameters: dict[str, Any]
    function: Callable[..., Any]

    def __post_init__(self) -> None:
        if not TOOL_NAME.fullmatch(self.name):
            raise ToolError(f"tool {self.name!r}: a tool's name is 1 to 64 letters, digits, '_', '-' or '.'")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def schema(self) -> dict[str, Any]:
        """OpenAI's form, in the key order GLM-4 was trained on."""
        function = {"name": self.name, "description": self.description, "parameters": self.parameters}
        return {"type": "function", "function": function}


@overload
def tool(function: Callable[..., Any]) -> Tool: ...
@overload
def tool(*, name: str | None = None, description: str | None = None) -> Callable[[Callable[..., Any]], Tool]: ...
def tool(
    function: Callable[..., Any] | None = None, *, name: str | None = None, description: str | None = None
) -> Tool | Callable[[Callable[..., Any]], Tool]:
    """Make a Tool of a function with typed parameters; usable as `@tool` and as `@tool(name=…, description=…)`.

    The description is the docstring's first paragraph; a parameter's is its pydantic `Field(description=…)`, else its
    entry under "Args:". Raises ToolError when a parameter has no type or one that JSON cannot carry.
    """

    def declare(function: Callable[..., Any]) -> Tool:
        tool_name = name or function.__name__
        try:
            schema = _arguments_model(function).model_json_schema()
        except (PydanticUserError, TypeError, NameError) as error:
            raise ToolError(f"tool {tool_name!r}: {one_line(error)}") from error
        summary, _ = _parse_docstring(inspect.getdoc(function) or "")
        return Tool(tool_name, description or summary, _tidy_schema(schema), function)

    return declare if function is None else declare(function)


def run_tool(
    tool: Tool | None, call: ToolCall, timeout_s: float = 30.0, cancel: threading.Event | None = None
) -> ToolResult:
    """Run one call in a thread of its own and wait at most `timeout_s` seconds, or until `cancel`; never raises.

    `tool` is None when the model named a tool that was not declared. A call that is too slow is abandoned: Python
    cannot stop a thread, so the daemon thread goes on until its function returns and its result is dropped.
    (No SIGALRM: it works in the main thread only.)
    """
    if tool is None:
        return ToolResult(f"Error: there is no tool named {call.name}", error=True)
    declared, results = tool, list[ToolResult]()

    def work() -> None:
        try:
            results.append(ToolResult(_truncate(_result_text(_invoke(declared, call.arguments))), error=False))
        except ToolError as error:
            results.append(_failure(one_line(error)))
        except BaseException as error:  # also SystemExit: whatever a tool does, the conversation goes on
            results.append(_failure(one_line(f"{type(error).__name__}: {error}")))

    thread = threading.Thread(target=work, name=f"tool-{tool.name}", daemon=True)
    thread.start()
    deadline = time.monotonic() + timeout_s
    while thread.is_alive() and not (cancel and cancel.is_set()) and (left := deadline - time.monotonic()) > 0:
        thread.join(min(left, 0.1))
    if results:
        return results[0]
    return _failure(
        f"{tool.name} was stopped by the user"
        if cancel and cancel.is_set()
        else f"{tool.name} did not finish within {timeout_s:g} s"
    )


def _failure(reason: str) -> ToolResult:
    return ToolResult(_truncate(f"Error: {reason}"), error=True)


def _invoke(tool: Tool, arguments: str) -> Any:
    try:
        values = json.loads(arguments) if arguments.strip() else {}
    except (ValueError, RecursionError) as error:
        raise ToolError(f"the arguments of {tool.name} are not JSON: {one_line(error)}") from error
    if not isinstance(values, dict):
        raise ToolError(f"the arguments of {tool.name} must be a JSON object, found {type(values).__name__}")
    _check_names(tool, values)
    try:
        checked = _arguments_model(tool.function).model_validate(values)
    except ValidationError as error:
        raise ToolError(f"{tool.name}: {_first_problem(error)}") from error
    keywords = {field.alias or key: getattr(checked, key) for key, field in type(checked).model_fields.items()}
    result = tool.function(**keywords, **(checked.model_extra or {}))
    return asyncio.run(_awaited(result)) if inspect.isawaitable(result) else result


async def _awaited(result: typing.Awaitable[Any]) -> Any:
    return await result


def _check_names(tool: Tool, values: Mapping[str, Any]) -> None:
    """The schema the model saw decides which arguments exist, also for a function with **kwargs."""
    properties = tool.parameters.get("properties", {})
    extra = [name for name in values if name not in properties]
    if extra and tool.parameters.get("additionalProperties") in (None, False):
        known = ", ".join(properties) or "none"
        raise ToolError(f"{tool.name} has no argument {extra[0]!r} (its arguments: {known})")
    missing = [name for name in tool.parameters.get("required", ()) if name not in values]
    if missing:
        raise ToolError(f"{tool.name} needs the argument {missing[0]!r}")


def _first_problem(error: ValidationError) -> str:
    problem = error.errors(include_url=False, include_context=False)[0]
    where = ".".join(str(part) for part in problem["loc"])
    return one_line(f"{where}: {problem['msg']}, found {str(problem['input'])[:80]!r}")


def _result_text(result: object) -> str:
    """Text as it is, everything else as JSON. Lone surrogates, which UTF-8 cannot carry, become "?"."""
    try:
        text = str(result) if isinstance(result, str) else json.dumps(result, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ToolError(f"the tool's result ({type(result).__name__}) is not JSON: {one_line(error)}") from error
    return text.encode("utf-8", "replace").decode("utf-8")


def _truncate(text: str) -> str:
    if len(text) <= MAX_RESULT_CHARACTERS:
        return text
    return f"{text[:MAX_RESULT_CHARACTERS]}\n[truncated: the first {MAX_RESULT_CHARACTERS} of {len(text)} characters]"


class _Arguments(BaseModel):
    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=False)


class _OpenArguments(BaseModel):
    model_config = ConfigDict(extra="allow")


@functools.lru_cache(maxsize=256)
def _arguments_model(function: Callable[..., Any]) -> type[BaseModel]:
    """A pydantic model of the function's parameters.

    Fields are called arg0, arg1, … with the parameter's name as alias, because names such as "copy" or "_x" are taken
    or forbidden in a pydantic model.
    """
    hints = typing.get_type_hints(function, include_extras=True)
    _, descriptions = _parse_docstring(inspect.getdoc(function) or "")
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


def _tidy_schema(schema: dict[str, Any]) -> dict[str, Any]:
    """Pydantic's schema without its titles, keys in the order people write them: type, description, properties, …"""
    first = [key for key in ("type", "description", "properties", "required") if key in schema]
    rest = [key for key in schema if key not in first and key not in ("title", "additionalProperties")]
    if schema.get("additionalProperties") not in (None, False):
        rest.append("additionalProperties")
    return {key: _tidy_value(key, schema[key]) for key in first + rest}


def _tidy_value(key: str, value: Any) -> Any:
    if key in ("properties", "$defs"):  # their keys are names, and a parameter may be called "title"
        return {name: _tidy_schema(inner) for name, inner in value.items()}
    if key in ("default", "enum", "const", "examples"):
        return value
    if isinstance(value, dict):
        return _tidy_schema(value)
    if isinstance(value, list):
        return [_tidy_value("", item) for item in value]
    return value


def _parse_docstring(text: str) -> tuple[str, dict[str, str]]:
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


@tool
def calculator(expression: str) -> str:
    """Evaluate an arithmetic expression exactly.

    Args:
        expression: Arithmetic, for example 2 * (3 + 4).
    """
    return arithmetic.evaluate(expression)


@tool
def current_time(city: str) -> str:
    """Current date and time in a city.

    Args:
        city: City name or IANA time zone, for example Paris.
    """
    return clock.local_time(city)


@tool
def unit_convert(value: float, from_unit: str, to_unit: str) -> str:
    """Convert a value from one unit to another.

    Args:
        value: Value to convert.
        from_unit: Unit of the value, for example km.
        to_unit: Unit wanted, for example mile.
    """
    return units.convert(value, from_unit, to_unit)


BUILTIN_TOOLS: tuple[Tool, ...] = (calculator, current_time, unit_convert)
