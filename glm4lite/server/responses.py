"""`POST /v1/responses`: OpenAI's Responses API, translated to a chat.

A conversation is a list of items: messages, calls, what they gave, thoughts. Thoughts of earlier turns are read over,
as the chat templates do. Source: https://platform.openai.com/docs/api-reference/responses/create.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from glm4lite.base.errors import shown
from glm4lite.engine.engine import Engine
from glm4lite.server.errors import encode
from glm4lite.server.question import Question
from glm4lite.server.replies import JSON
from glm4lite.server.requests import MOST_MESSAGES, ChatRequest, Objects, checked
from glm4lite.server.response_store import Kept, ResponseStore
from glm4lite.server.translation import (
    Places,
    Turns,
    chat_request,
    text_field,
    text_of,
    translated_question,
    wrong,
)

_TEXTS = {"input_text": "text", "output_text": "text", "text": "text", "refusal": "refusal"}
_CHAT_NAMES = {
    "max_tokens": "max_output_tokens",
    "response_format": "text.format",
    "response_format.type": "text.format.type",
    "response_format.json_schema": "text.format",
    "reasoning_effort": "reasoning.effort",
    "logprobs": "include",
    "messages": "input",
}
_LOGPROBS = "message.output_text.logprobs"
# Fields that would change the answer, and the values that ask for nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "background": (None, False),
    "conversation": (None,),
    "prompt": (None,),
    "truncation": (None, "disabled"),
    "context_management": (None, []),
    "moderation": (None,),
}


class _Part(BaseModel):
    model_config = ConfigDict(strict=True)


class TextFormat(_Part):
    """`text.format`: "text", "json_object" or "json_schema"."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None

    @property
    def as_chat(self) -> JSON:
        """As `response_format`."""
        if self.type != "json_schema":
            return {"type": self.type}
        given = {"name": self.name, "description": self.description, "schema": self.schema_, "strict": self.strict}
        return {"type": self.type, "json_schema": {name: one for name, one in given.items() if one is not None}}


class TextConfig(_Part):
    """`text`."""

    format: TextFormat | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class Reasoning(_Part):
    """`reasoning`; "none" is no thought."""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    summary: str | None = None
    generate_summary: str | None = None


class ResponsesBody(_Part):
    """What this endpoint says otherwise than a chat does."""

    model_config = ConfigDict(strict=True, protected_namespaces=())

    model: str | None = None
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None
    input: str | Annotated[Objects, Field(min_length=1, max_length=MOST_MESSAGES)] | None = None
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1, le=2**31)] | None = None
    max_tool_calls: Annotated[int, Field(ge=0)] | None = None  # of tools that the server would run
    tools: Objects | None = None
    tool_choice: str | dict[str, Any] | None = None
    text: TextConfig | None = None
    reasoning: Reasoning | None = None
    include: Annotated[list[str], Field(max_length=64, fail_fast=True)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    metadata: Annotated[dict[str, str], Field(max_length=16)] | None = None
    background: Any = None
    conversation: Any = None
    prompt: Any = None
    truncation: Any = None
    context_management: Any = None
    moderation: Any = None


@dataclass(frozen=True)
class ResponsesRequest:
    """A checked request: `body` as it came, `chat` what it asks of the model.

    `items` is what it adds to a conversation, a list as JSON.
    """

    body: ResponsesBody
    chat: ChatRequest
    places: Places
    items: bytes
    ignored: list[str]
    include_usage: bool = False

    @property
    def model(self) -> str | None:
        return self.body.model

    @property
    def stream(self) -> bool | None:
        return self.body.stream

    def keep(self, store: ResponseStore, response: JSON) -> None:
        """Keeps the response for requests that go on from it, unless the client said `"store": false`."""
        if self.body.store is not False:
            store.keep(Kept.of(response, self.items))


class ResponsesForm:
    """Checks bodies; `store` is where responses are that they go on from."""

    def __init__(self, store: ResponseStore) -> None:
        self._store = store

    def read(self, body: JSON) -> ResponsesRequest:
        """Raises ApiError for the first field that cannot be used, 404 where the response before is not kept."""
        asked = checked(ResponsesBody, body)
        for name, neutral in _NEUTRAL.items():
            value = getattr(asked, name)
            if value not in neutral:
                raise wrong(name, f"{shown(value)} is not supported", "unsupported_value")
        turns = Turns()
        turns.places.own |= _CHAT_NAMES
        if asked.instructions:
            turns.say("system", asked.instructions, "instructions")
        if asked.previous_response_id is not None:
            for item in self._store.conversation(asked.previous_response_id):
                _add(turns, item, "previous_response_id")
        items = self._items(asked)
        for place, item in enumerate(items):
            _add(turns, item, "input" if isinstance(asked.input, str) else f"input[{place}]")
        if not turns.messages:
            raise wrong("input", "is missing")
        chat = chat_request(body, ResponsesBody.model_fields, _said(asked, turns), turns.places)
        return ResponsesRequest(asked, chat, turns.places, encode(items), _ignored(asked, chat))

    def _items(self, asked: ResponsesBody) -> list[JSON]:
        """The items of the request, those that it names by an id in full."""
        if isinstance(asked.input, str):
            return [{"type": "message", "role": "user", "content": asked.input}]
        items = list[JSON]()
        for place, item in enumerate(asked.input or []):
            if item.get("type") == "item_reference":
                name = text_field(item, "id", f"input[{place}]")
                found = self._store.item(name)
                if found is None:
                    raise wrong(f"input[{place}].id", f"no item {name[:100]!r} is kept; send the item itself")
                item = found
            items.append(item)
        return items


def responses_question(engine: Engine, asked: ResponsesRequest) -> Question:
    """As `chat_question`, with errors in the client's words."""
    return translated_question(engine, asked.chat, asked.places)


def _said(asked: ResponsesBody, turns: Turns) -> JSON:
    """The chat request's fields; what the client leaves out is left out."""
    tools = [_tool(tool, place, turns.places) for place, tool in enumerate(asked.tools or [])]
    choice, tools = _choice(asked.tool_choice, tools)
    text, reasoning = asked.text or TextConfig(), asked.reasoning or Reasoning()
    wants_scores = _LOGPROBS in (asked.include or []) or bool(asked.top_logprobs)
    said = {
        "model": asked.model,
        "messages": turns.messages,
        "max_tokens": asked.max_output_tokens,
        "tools": tools or None,
        "tool_choice": choice,
        "response_format": text.format.as_chat if text.format and text.format.type != "text" else None,
        "reasoning_effort": reasoning.effort,
        "logprobs": True if wants_scores else None,
        "top_logprobs": asked.top_logprobs if wants_scores else None,
    }
    return {name: value for name, value in said.items() if value is not None}


def _tool(tool: JSON, place: int, places: Places) -> JSON:
    places.own[f"tools[{place}].function"] = f"tools[{place}]"
    if tool.get("type") != "function":
        raise wrong(f"tools[{place}].type", f"must be 'function', found {shown(tool.get('type'))}")
    names = ("name", "description", "parameters", "strict")
    return {"type": "function", "function": {name: tool[name] for name in names if tool.get(name) is not None}}


def _choice(choice: str | JSON | None, tools: list[JSON]) -> tuple[str | JSON | None, list[JSON]]:
    """The choice in the chat's words, and the tools that it leaves."""
    if not isinstance(choice, dict):
        return choice, tools
    if choice.get("type") == "function" and isinstance(choice.get("name"), str):
        return {"type": "function", "function": {"name": choice["name"]}}, tools
    if choice.get("type") == "allowed_tools" and choice.get("mode") in ("auto", "required"):
        named = choice.get("tools")
        if isinstance(named, list) and all(isinstance(one, dict) for one in named):
            allowed = [one.get("name") for one in named if one.get("type") == "function"]
            return choice["mode"], [tool for tool in tools if tool["function"].get("name") in allowed]
    forms = "{'type': 'function', 'name': …} or {'type': 'allowed_tools', 'mode': …, 'tools': […]}"
    raise wrong("tool_choice", f"must be 'none', 'auto', 'required', {forms}, found {shown(choice)}")


def _add(turns: Turns, item: JSON, at: str) -> None:
    """One item as a message, or as a part of one."""
    match item.get("type"):
        case "message" | None:
            role = item.get("role")
            if role not in ("user", "assistant", "system", "developer"):
                raise wrong(f"{at}.role", f"must be user, assistant, system or developer, found {shown(role)}")
            turns.say(str(role), text_of(item.get("content"), f"{at}.content", _TEXTS), at)
        case "function_call":
            call_id, name = text_field(item, "call_id", at), text_field(item, "name", at)
            turns.call(call_id, name, text_field(item, "arguments", at), at)
        case "function_call_output":
            output = text_of(item.get("output"), f"{at}.output", _TEXTS)
            turns.result(text_field(item, "call_id", at), output, at)
        case "reasoning":
            pass  # templates leave out the thoughts of earlier turns
        case kind:
            known = "message, function_call, function_call_output, reasoning or item_reference"
            raise wrong(f"{at}.type", f"must be {known}, found {shown(kind)}")


def _ignored(asked: ResponsesBody, chat: ChatRequest) -> list[str]:
    """What in the request means nothing here."""
    ignored = [_CHAT_NAMES.get(name, name) for name in chat.ignored]
    reasoning = asked.reasoning or Reasoning()
    if reasoning.summary or reasoning.generate_summary:
        ignored.append("reasoning.summary")
    if asked.text and asked.text.verbosity not in (None, "medium"):
        ignored.append("text.verbosity")
    return ignored
