"""`POST /v1/messages`: Anthropic's Messages API, translated to a chat.

A message's content is text or a list of blocks: texts, calls (`tool_use`) and what they gave (`tool_result`, in a
message of the user). Thoughts of earlier turns are read over, as the chat templates do. A thought is given only where
it was asked for, as in Anthropic's API. Source: https://docs.anthropic.com/en/api/messages.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from glm4lite.base.errors import shown
from glm4lite.engine.engine import Engine
from glm4lite.server.errors import ApiError
from glm4lite.server.question import Question
from glm4lite.server.replies import JSON
from glm4lite.server.requests import MOST_MESSAGES, ChatRequest, Objects, StopText, checked
from glm4lite.server.translation import (
    Places,
    Turns,
    chat_request,
    text_field,
    text_of,
    translated_question,
    wrong,
)

_TEXT = {"text": "text"}
_READ = {"user": "text or tool_result", "assistant": "text, tool_use or thinking", "system": "text"}
_BETWEEN = "\n"  # blocks are paragraphs
_CHAT_NAMES = {
    "stop": "stop_sequences",
    "response_format": "output_config.format",
    "reasoning_effort": "output_config.effort",
    "parallel_tool_calls": "tool_choice.disable_parallel_tool_use",
}


class _Part(BaseModel):
    model_config = ConfigDict(strict=True)


class Thinking(_Part):
    """`thinking`: "adaptive" leaves it to the model."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    display: str | None = None


class ToolChoice(_Part):
    """`tool_choice`."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class OutputConfig(_Part):
    """`output_config`."""

    effort: str | None = None
    format: dict[str, Any] | None = None


class MessagesBody(_Part):
    """What this endpoint says otherwise than a chat does."""

    model_config = ConfigDict(strict=True, protected_namespaces=())

    model: str | None = None
    stream: bool | None = None
    messages: Annotated[Objects, Field(min_length=1, max_length=MOST_MESSAGES)]
    system: str | Objects | None = None
    stop_sequences: Annotated[list[StopText], Field(max_length=16, fail_fast=True)] | None = None
    tools: Objects | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    mcp_servers: Any = None
    container: Any = None


@dataclass(frozen=True)
class MessagesRequest:
    """A checked request: `body` as it came, `chat` what it asks of the model."""

    body: MessagesBody
    chat: ChatRequest
    places: Places
    include_usage: bool = False

    @classmethod
    def read(cls, body: JSON) -> MessagesRequest:
        """Raises ApiError for the first field that cannot be used."""
        asked = checked(MessagesBody, body)
        for name in ("mcp_servers", "container"):
            if getattr(asked, name):
                raise wrong(name, "is not supported: this server runs no tools itself", "unsupported_value")
        turns = Turns()
        turns.places.own |= _CHAT_NAMES
        if system := text_of(asked.system, "system", _TEXT, _BETWEEN):
            turns.say("system", system, "system")
        for place, message in enumerate(asked.messages):
            _add(turns, message, f"messages[{place}]")
        if turns.messages[-1]["role"] == "assistant":
            at = f"messages[{len(asked.messages) - 1}].role"
            raise wrong(at, "the last message must be the user's; going on with an answer is not supported")
        absent = ("n", "logprobs", "top_logprobs")
        chat = chat_request(body, MessagesBody.model_fields, _said(asked, turns), turns.places, absent)
        return cls(asked, chat, turns.places)

    @property
    def model(self) -> str | None:
        return self.body.model

    @property
    def stream(self) -> bool | None:
        return self.body.stream

    @property
    def ignored(self) -> list[str]:
        """Names in the body that mean nothing here."""
        ignored = [_CHAT_NAMES.get(name, name) for name in self.chat.ignored]
        thinking, config = self.body.thinking, self.body.output_config
        if thinking is not None and thinking.display:
            ignored.append("thinking.display")
        if config is not None and config.effort and not _is_adaptive(thinking):
            ignored.append("output_config.effort")
        return ignored


def messages_question(engine: Engine, asked: MessagesRequest) -> Question:
    """As `chat_question`, with errors in the client's words."""
    try:
        return translated_question(engine, asked.chat, asked.places)
    except ApiError as error:
        if error.code == "context_length_exceeded":  # the words that clients of this API look for
            error.message = f"prompt is too long: {error.message}"
        raise


def _said(asked: MessagesBody, turns: Turns) -> JSON:
    """The chat request's fields; what the client leaves out is left out."""
    choice, config = asked.tool_choice, asked.output_config or OutputConfig()
    said = {
        "model": asked.model,
        "messages": turns.messages,
        "stop": asked.stop_sequences or None,
        "tools": [_tool(tool, place, turns.places) for place, tool in enumerate(asked.tools or [])] or None,
        "tool_choice": _choice(choice) if choice else None,
        "parallel_tool_calls": False if choice and choice.disable_parallel_tool_use else None,
        "thinking": _thinking(asked.thinking),
        "response_format": _format(config.format),
        # Where the thought has a length of its own, or there is none, nothing is left to say.
        "reasoning_effort": config.effort if _is_adaptive(asked.thinking) else None,
    }
    return {name: value for name, value in said.items() if value is not None}


def _is_adaptive(thinking: Thinking | None) -> bool:
    return thinking is not None and thinking.type == "adaptive"


def _thinking(thinking: Thinking | None) -> JSON | None:
    if thinking is None or thinking.type == "disabled":
        return {"type": "disabled"}
    if thinking.type == "adaptive":
        return None
    if thinking.budget_tokens is None:
        raise wrong("thinking.budget_tokens", "is missing")
    return {"type": "enabled", "budget_tokens": thinking.budget_tokens}


def _format(form: JSON | None) -> JSON | None:
    if form is None:
        return None
    if form.get("type") != "json_schema" or not isinstance(form.get("schema"), dict):
        raise wrong("output_config.format", f"must be {{'type': 'json_schema', 'schema': …}}, found {shown(form)}")
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": form["schema"], "strict": True}}


def _choice(choice: ToolChoice) -> str | JSON:
    if choice.type == "tool":
        if choice.name is None:
            raise wrong("tool_choice.name", "is missing")
        return {"type": "function", "function": {"name": choice.name}}
    return {"auto": "auto", "any": "required", "none": "none"}[choice.type]


def _tool(tool: JSON, place: int, places: Places) -> JSON:
    at = f"tools[{place}]"
    places.own |= {f"{at}.function": at, f"{at}.function.parameters": f"{at}.input_schema"}
    if tool.get("type", "custom") not in ("custom", None):
        raise wrong(f"{at}.type", f"must be 'custom', found {shown(tool['type'])}: this server runs no tools itself")
    function = {"name": tool.get("name"), "description": tool.get("description")}
    function |= {"parameters": tool.get("input_schema"), "strict": tool.get("strict")}
    return {"type": "function", "function": {name: one for name, one in function.items() if one is not None}}


def _add(turns: Turns, message: JSON, at: str) -> None:
    """One message, as the messages of a chat: what calls gave stands in messages of its own there."""
    role, content = message.get("role"), message.get("content")
    if role not in ("user", "assistant", "system"):
        raise wrong(f"{at}.role", f"must be user, assistant or system, found {shown(role)}")
    blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(blocks, list):
        raise wrong(f"{at}.content", f"must be text or a list of blocks, found {shown(content)}")
    texts, before = list[str](), len(turns.messages)

    def say() -> None:
        if texts:
            turns.say(str(role), _BETWEEN.join(texts), at)
            texts.clear()

    for place, block in enumerate(blocks):
        where = f"{at}.content[{place}]"
        match block.get("type") if isinstance(block, dict) else None:
            case "text":
                texts.append(text_field(block, "text", where))
            case "mid_conv_system" if role == "user":
                say()
                turns.say("system", text_of(block.get("content"), f"{where}.content", _TEXT, _BETWEEN), where)
            case "tool_result" if role == "user":
                say()
                result = text_of(block.get("content"), f"{where}.content", _TEXT, _BETWEEN)
                failed = "error" if block.get("is_error") is True else ""
                turns.result(text_field(block, "tool_use_id", where), result or failed, where)
            case "tool_use" if role == "assistant":
                say()
                arguments = json.dumps(block.get("input"), ensure_ascii=False)
                turns.call(text_field(block, "id", where), text_field(block, "name", where), arguments, where)
            case "thinking" | "redacted_thinking" if role == "assistant":
                pass  # templates leave out the thoughts of earlier turns
            case _:
                raise wrong(where, f"only {_READ[str(role)]} can be read, found {shown(block)}")
    say()
    if len(turns.messages) == before and role == "user":
        turns.say("user", "", at)
