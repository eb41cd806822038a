"""What a request wants the answer to follow: `response_format`, and the schemas of the tools it declares."""

from __future__ import annotations

from typing import Any

from glm4lite.base.errors import SchemaError, shown
from glm4lite.engine.constraint import Constraint
from glm4lite.engine.engine import Engine
from glm4lite.server.errors import ApiError
from glm4lite.text.grammar import ANY_OBJECT, AnswerForm, Schema, ToolForm, checked_schema

_KINDS = "text, json_object and json_schema"


def wanted_schema(response_format: dict[str, Any] | None) -> Schema | None:
    """The schema of the answer; None where it is text. Raises ApiError.

    OpenAI's forms, and llama.cpp's, which has the schema beside `json_object`.
    """
    if response_format is None:
        return None
    kind, at = response_format.get("type"), "response_format"
    if kind == "text":
        return None
    if kind == "json_object":
        return _checked(response_format.get("schema", ANY_OBJECT), f"{at}.schema")
    if kind != "json_schema":
        raise ApiError(f"{at}.type: {shown(kind)} is not supported; there are {_KINDS}", param=f"{at}.type")
    described = response_format.get("json_schema")
    if not isinstance(described, dict) or "schema" not in described:
        raise ApiError(f"{at}.json_schema: must be an object with a schema", param=f"{at}.json_schema")
    return _checked(described["schema"], f"{at}.json_schema.schema")


def tool_forms(tools: list[dict[str, Any]] | None, names: list[str]) -> tuple[ToolForm, ...]:
    """Of the tools that are declared as they were checked (`declared_tools`), those the model knows of."""
    functions = [tool["function"] for tool in tools or () if tool["function"]["name"] in names]
    return tuple(
        ToolForm(function["name"], function.get("parameters") or ANY_OBJECT, function.get("strict") is True)
        for function in functions
    )


def held(engine: Engine, form: AnswerForm) -> Constraint | None:
    """What holds the answer to that form. Raises ApiError, in llguidance's words, where nothing can."""
    if form.schema is not None and form.must_call:
        raise ApiError(
            "tool_choice and response_format contradict each other: an answer is a call or it follows the format",
            param="tool_choice",
        )
    try:
        return engine.constraint(form)
    except SchemaError as error:
        param = "tools" if str(error).startswith("tool ") or form.schema is None else "response_format"
        raise ApiError(f"{param}: {error}", param=param, code="unsupported_schema") from None


def _checked(schema: object, at: str) -> Schema:
    try:
        return checked_schema(schema)
    except SchemaError as error:
        raise ApiError(f"{at}: {error}", param=at) from None
