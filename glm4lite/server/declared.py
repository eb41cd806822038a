"""The tools a request declares and the tool it wants called, checked before the model sees them."""

from __future__ import annotations

from typing import Any

from glm4lite.base.errors import ToolError, shown
from glm4lite.server.errors import ApiError
from glm4lite.text.tool_schema import TOOL_NAME, check_size

_TYPES = {"string", "number", "integer", "boolean", "object", "array", "null"}
_MAX_DEPTH = 24  # of nested schemas
_MAX_TOOLS = 128  # OpenAI's own limit


def declared_tools(tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The tools in the key order GLM-4 was trained on: name, description, parameters. Raises ApiError."""
    if len(tools) > _MAX_TOOLS:
        raise ApiError(f"tools: at most {_MAX_TOOLS} can be declared, found {len(tools)}", param="tools")
    names, declared = set[str](), list[dict[str, Any]]()
    for place, tool in enumerate(tools):
        at = f"tools[{place}]"
        if tool.get("type") != "function":
            raise _wrong(f"{at}.type", f"must be 'function', found {shown(tool.get('type'))}")
        function = tool.get("function")
        if not isinstance(function, dict):
            raise _wrong(f"{at}.function", "must be an object")
        name = check_name(function.get("name"), f"{at}.function.name")
        if name in names:
            raise _wrong(f"{at}.function.name", f"{name!r} is declared twice")
        names.add(name)
        declared.append({"type": "function", "function": _function(function, f"{at}.function")})
    return declared


def check_name(name: object, at: str) -> str:
    """The name, if it is one word: the model writes it on a line of its own. Raises ApiError."""
    if not isinstance(name, str) or not TOOL_NAME.fullmatch(name):
        raise _wrong(at, f"must be 1 to 64 letters, digits, '_', '-' or '.', found {shown(name)}")
    return name


def forced_names(choice: str | dict[str, Any] | None, names: list[str]) -> tuple[str, ...]:
    """The tools of which one must be called; none for "auto" and "none". Raises ApiError."""
    if choice in (None, "auto", "none"):
        return ()
    if not names:
        raise _wrong("tool_choice", "is only possible with tools")
    if choice == "required":
        return tuple(names)
    function = choice.get("function") if isinstance(choice, dict) and choice.get("type") == "function" else None
    name = function.get("name") if isinstance(function, dict) else None
    if name is None:
        raise _wrong(
            "tool_choice", "must be 'none', 'auto', 'required' or {'type': 'function', 'function': {'name': …}}"
        )
    if name not in names:
        raise _wrong("tool_choice", f"no tool {shown(name)} is declared")
    return (name,)


def _function(function: dict[str, Any], at: str) -> dict[str, Any]:
    description, parameters = function.get("description"), function.get("parameters")
    if description is not None and not isinstance(description, str):
        raise _wrong(f"{at}.description", "must be text")
    if parameters is None:
        parameters = {"type": "object", "properties": {}}
    if not isinstance(parameters, dict) or parameters.get("type", "object") != "object":
        raise _wrong(f"{at}.parameters", "must be a JSON schema of an object")
    try:  # first, so that what follows looks at a bounded schema
        check_size(function["name"], description or "", parameters)
    except ToolError as error:
        raise _wrong(f"{at}.parameters", str(error)) from None
    _check_schema(parameters, f"{at}.parameters", _MAX_DEPTH)
    return {"name": function["name"], "description": description or "", "parameters": parameters}


def _check_schema(schema: Any, at: str, depth: int) -> None:
    """What a template prints and a client's own validator will look at; keywords that are not known pass."""
    if isinstance(schema, bool):
        return
    if not isinstance(schema, dict):
        raise _wrong(at, f"must be a JSON schema, found {shown(schema)}")
    if not depth:
        raise _wrong(at, "is nested too deeply")
    kinds = schema.get("type", [])
    for kind in kinds if isinstance(kinds, list) else [kinds]:
        if not isinstance(kind, str) or kind not in _TYPES:
            raise _wrong(f"{at}.type", f"{shown(kind)} is no type of JSON schema")
    required = schema.get("required", [])
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        raise _wrong(f"{at}.required", "must be a list of names")
    properties = schema.get("properties", {})
    if not isinstance(properties, dict):
        raise _wrong(f"{at}.properties", "must be an object")
    for name, inner in properties.items():
        _check_schema(inner, f"{at}.properties.{name[:80]}", depth - 1)
    if "items" in schema:
        _check_schema(schema["items"], f"{at}.items", depth - 1)
    for key in ("anyOf", "oneOf", "allOf"):
        options = schema.get(key, [])
        if not isinstance(options, list):
            raise _wrong(f"{at}.{key}", "must be a list")
        for place, inner in enumerate(options):
            _check_schema(inner, f"{at}.{key}[{place}]", depth - 1)


def _wrong(at: str, problem: str) -> ApiError:
    return ApiError(f"{at}: {problem}", param=at)
