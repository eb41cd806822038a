"""Messages of a conversation, with OpenAI's field names (chat completions API).

GLM's own forms (the `observation` role, one `metadata` message per call) exist only inside template.py.

    >>> Message.from_dict({"role": "user", "content": "Hi"})
    Message(role='user', content='Hi', tool_calls=(), tool_call_id=None, name=None)
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from glm4lite.base.errors import Glm4liteError, shown

# Other spellings of OpenAI's roles that clients and GLM's own examples use.
_ROLE_ALIASES = {"developer": "system", "observation": "tool", "function": "tool"}
_ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class ToolCall:
    """One call the model made. `arguments` is JSON text as the model wrote it, as in OpenAI's API.

    GLM's calls always hold an object: what clients send back for a call without arguments ("", null) is `{}`. Other
    text that is no object stays, so that the model sees what it wrote.
    """

    id: str
    name: str
    arguments: str

    def __post_init__(self) -> None:
        if self.arguments.strip() in ("", "null"):
            object.__setattr__(self, "arguments", "{}")

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "ToolCall":
        """Read OpenAI's `{"id", "type": "function", "function": {"name", "arguments"}}`; raises Glm4liteError."""
        function = data.get("function") if isinstance(data, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise Glm4liteError(f"tool_calls: expected an object with function.name, found {shown(data)}")
        arguments = function.get("arguments")
        if not isinstance(arguments, str):  # some clients send the object itself
            try:
                arguments = json.dumps(arguments, ensure_ascii=False)
            except (TypeError, ValueError, RecursionError) as error:
                raise Glm4liteError(f"tool_calls: the arguments of {shown(function['name'])} are not JSON") from error
        return cls(id=str(data.get("id") or ""), name=function["name"], arguments=arguments)

    def to_dict(self) -> dict[str, Any]:
        """OpenAI's form of this call."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


@dataclass(frozen=True)
class Message:
    """One turn: role is "system", "user", "assistant" or "tool".

    An assistant's `tool_calls` come after its `content`. A tool's message holds what the call `tool_call_id` of the
    tool `name` gave. Source: messages of OpenAI's chat completions, which `from_dict` and `to_dict` read and write.
    """

    role: str
    content: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    name: str | None = None

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Message":
        """Read one message of OpenAI's form; raises Glm4liteError naming the key that cannot be used."""
        if not isinstance(data, Mapping):
            raise Glm4liteError(f"message: expected an object with role and content, found {shown(data)}")
        role = data.get("role")
        role = _ROLE_ALIASES.get(role, role) if isinstance(role, str) else role
        if role not in _ROLES:
            raise Glm4liteError(f"message: role must be one of {', '.join(_ROLES)}; found {shown(data.get('role'))}")
        calls = data.get("tool_calls") or ()
        if not isinstance(calls, Sequence) or isinstance(calls, str):
            raise Glm4liteError(f"message: tool_calls must be a list, found {shown(calls)}")
        return cls(
            role=role,
            content=_content_text(data.get("content")),
            tool_calls=tuple(ToolCall.from_dict(call) for call in calls),
            tool_call_id=_optional_text(data, "tool_call_id"),
            name=_optional_text(data, "name"),
        )

    def to_dict(self) -> dict[str, Any]:
        """OpenAI's form; keys that say nothing are left out."""
        data: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.tool_calls:
            data["tool_calls"] = [call.to_dict() for call in self.tool_calls]
        if self.tool_call_id is not None:
            data["tool_call_id"] = self.tool_call_id
        if self.name is not None:
            data["name"] = self.name
        return data


def _content_text(content: object) -> str:
    """Text of a message: a string, null, or a list of `{"type": "text", "text": …}` parts."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise Glm4liteError(f"message: content must be text, found {shown(content)}")
    pieces = []
    for part in content:
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise Glm4liteError(f"message: only text parts can be read, found {shown(part)}")
        pieces.append(part["text"])
    return "".join(pieces)


def _optional_text(data: Mapping[str, Any], key: str) -> str | None:
    value = data.get(key)
    if value is not None and not isinstance(value, str):
        raise Glm4liteError(f"message: {key} must be text, found {shown(value)}")
    return value
