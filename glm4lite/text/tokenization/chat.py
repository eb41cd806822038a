"""A conversation as `apply_chat_template` takes it: messages in the template's own form, as a script wrote them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from glm4lite.base.errors import TokenizerError, shown
from glm4lite.text.messages import Message
from glm4lite.text.template import ChatTemplate

_REASONING = ("reasoning_content", "thinking", "reasoning")
_END = "\U0010fffd"  # stands behind a message that is to be continued; no filter changes a private character


def conversations(given: Any) -> tuple[list[list[dict[str, Any]]], bool]:
    """One conversation or a batch of them as plain data, and whether it was a batch. Raises TokenizerError."""
    if not isinstance(given, Sequence) or isinstance(given, str) or not given:
        raise TokenizerError(f"conversation must be a list of messages, or of such lists, found {shown(given)}")
    batched = isinstance(given[0], list | tuple)
    return [_messages(one) for one in (given if batched else [given])], batched


def _messages(given: Any) -> list[dict[str, Any]]:
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise TokenizerError(f"a conversation must be a list of messages, found {shown(given)}")
    messages = []
    for message in map(plain, given):
        if not isinstance(message, dict):
            raise TokenizerError(f"a message must be a dict with role and content, found {shown(message)}")
        message = {key: value for key, value in message.items() if value is not None}
        thought = next((message[key] for key in _REASONING if key in message), None)
        if thought is not None:  # templates differ in how they call it
            message = {"thinking": thought, **message, "reasoning_content": thought}
        messages.append(message)
    return messages


def plain(value: Any) -> Any:
    """As JSON data: dataclasses, pydantic's models and numpy's numbers too. Raises TokenizerError for anything else."""
    if value is None or isinstance(value, bool):
        return value
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind.__str__(value) if kind is str else kind(value)  # of an enumeration, what it holds
    if isinstance(value, Message):
        return value.to_dict()
    if isinstance(value, Mapping):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if callable(getattr(value, "model_dump", None)):
        return plain(value.model_dump())
    if getattr(value, "shape", None) == ():
        return plain(value.item())
    raise TokenizerError(f"messages, tools and the template's variables are text and numbers, found {shown(value)}")


def tool_schemas(tools: Any) -> list[Any] | None:
    """Schemas as they are, of functions and of `glm4lite.tool`s theirs. Raises TokenizerError, ToolError."""
    if tools is None:
        return None
    if not isinstance(tools, Sequence) or isinstance(tools, str):
        raise TokenizerError(f"tools must be a list of functions or of their JSON schemas, found {shown(tools)}")
    return [_schema(tool) for tool in tools]


def _schema(given: Any) -> Any:
    from glm4lite.text.tool_schema import described, openai_form  # pydantic, where it is needed

    if isinstance(given, Mapping):
        return plain(given)
    if callable(getattr(given, "schema", None)):
        return plain(given.schema())
    if not callable(given):
        raise TokenizerError(f"a tool must be a function or its JSON schema, found {shown(given)}")
    return plain(openai_form(*described(given)))


def rendered(
    template: ChatTemplate,
    messages: list[dict[str, Any]],
    variables: Mapping[str, Any],
    names: Mapping[str, str],
    continued: str | None,
    specials: Collection[str] | None,
) -> tuple[str, Callable[[str], str]]:
    """The text, with stand-ins where there are `specials`, and what turns them back.

    continued: the field of the last message behind which the text ends. Raises TokenizerError, TemplateError.
    """
    if continued is None:
        return template.render_given(messages, variables, names, specials)
    final, marked = _marked(messages, continued, template.sources["default"])
    text, restore = template.render_given(marked, variables, names, specials)
    head, mark, rest = text.rpartition(_END)
    if not mark or final.strip() not in restore(head):
        raise TokenizerError("continue_final_message: the chat template does not write the last message as it is")
    return head if rest.startswith(" ") else head.rstrip(), restore  # a template that trims takes the message's spaces


def _marked(messages: list[dict[str, Any]], field: str, source: str) -> tuple[str, list[dict[str, Any]]]:
    """What is continued, and the messages with a mark behind it."""
    *before, last = messages or [{}]
    final = last.get(field)
    if final is None:
        raise TokenizerError(f"continue_final_message: the last message has no {field!r} to continue")
    same = [name for name in _REASONING if last.get(name) == final] if field in _REASONING else [field]
    if not any(name in source for name in same):
        raise TokenizerError(f"continue_final_message: the chat template does not read {field!r}")
    if isinstance(final, str):
        return final, [*before, last | dict.fromkeys(same, f"{final}{_END} ")]
    parts = list(final) if isinstance(final, list) else []
    texts = [place for place, part in enumerate(parts) if isinstance(part, dict) and isinstance(part.get("text"), str)]
    if not texts:
        raise TokenizerError(f"continue_final_message: the last message's {field} holds no text")
    part = parts[texts[-1]]
    parts[texts[-1]] = part | {"text": f"{part['text']}{_END} "}
    return part["text"], [*before, last | {field: parts}]
