"""From another API's conversation to a chat request: what the two say in other words, and where each part came from.

Everything that another endpoint does not say otherwise is the chat endpoint's own: a field that is not translated goes
on as it is, is checked there, and refused or ignored there. So an endpoint is a form, a list of messages and a reply;
an error that the chat endpoint finds is told under the name that the client used.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from glm4lite.base.errors import shown
from glm4lite.engine.engine import Engine
from glm4lite.server.errors import ApiError
from glm4lite.server.question import Question, chat_question
from glm4lite.server.replies import JSON
from glm4lite.server.requests import ChatRequest


@dataclass
class Places:
    """Paths of a chat request (`messages[3]`) -> what the client calls that (`input[4]`)."""

    own: dict[str, str] = field(default_factory=dict)

    def named(self, path: str) -> str:
        """The client's name for a path, by the longest part of it that is known."""
        known = [one for one in self.own if path == one or path.startswith((f"{one}.", f"{one}["))]
        longest = max(known, key=len, default="")
        return self.own[longest] + path.removeprefix(longest) if longest else path

    def told(self, error: ApiError) -> ApiError:
        """The error in the client's words."""
        if error.param is None or (own := self.named(error.param)) == error.param:
            return error
        message = error.message.replace(error.param, own, 1)
        return ApiError(message, error.status, own, error.code, error.headers)


@dataclass
class Turns:
    """The messages of a chat request, put together from another API's parts."""

    messages: list[JSON] = field(default_factory=list)
    places: Places = field(default_factory=Places)

    def say(self, role: str, text: str, at: str) -> None:
        """A message; `at` is where it stands in the request."""
        self._add({"role": role, "content": text}, at)

    def call(self, call_id: str, name: str, arguments: str, at: str) -> None:
        """A call of the assistant: one turn with the calls and the text right before it."""
        if not self.messages or self.messages[-1]["role"] != "assistant":
            self._add({"role": "assistant", "content": None}, at)
        calls = self.messages[-1].setdefault("tool_calls", [])
        self.places.own[f"{self._last}.tool_calls[{len(calls)}].function"] = at
        function = {"name": name, "arguments": arguments}
        calls.append({"id": call_id, "type": "function", "function": function})

    def result(self, call_id: str | None, text: str, at: str) -> None:
        """What a call gave."""
        self._add({"role": "tool", "tool_call_id": call_id, "content": text}, at)

    @property
    def _last(self) -> str:
        return f"messages[{len(self.messages) - 1}]"

    def _add(self, message: JSON, at: str) -> None:
        self.messages.append(message)
        self.places.own[self._last] = at


def chat_request(
    body: Mapping[str, Any], known: Mapping[str, Any], said: JSON, places: Places, absent: Collection[str] = ("n",)
) -> ChatRequest:
    """The chat request of a body: what was translated (`said`), and the fields that its form does not know.

    absent: what a chat's answer may have and this API's has no place for. Raises ApiError where one of these is asked
    for, or a field is said in the chat endpoint's words as well, and in the client's words what the chat endpoint
    refuses.
    """
    rest = {name: value for name, value in body.items() if name not in known}
    for name in absent:
        if rest.get(name) not in (None, False, 1) or rest.get(name) is True:
            raise wrong(name, f"{shown(rest[name])} is not supported at this address", "unsupported_value")
    for name in rest.keys() & said.keys():
        own = places.named(name)
        instead = f"use {own}" if own != name else "it is said in another field"
        raise ApiError(f"{name}: {shown(rest[name])} is not supported at this address; {instead}", param=name)
    try:
        return ChatRequest.read({**rest, **said})
    except ApiError as error:
        raise places.told(error) from None


def translated_question(engine: Engine, request: ChatRequest, places: Places) -> Question:
    """As `chat_question`, with errors and what is ignored in the client's words."""
    try:
        question = chat_question(engine, request)
        return replace(question, ignored=tuple(map(places.named, question.ignored)))
    except ApiError as error:
        raise places.told(error) from None


def text_of(content: object, at: str, kinds: Mapping[str, str], between: str = "") -> str:
    """The text of a content: text, or a list of parts, of which `kinds` names the readable types and their field.

    Raises ApiError for a part that is no text, such as an image.
    """
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise wrong(at, f"must be text or a list of parts, found {shown(content)}")
    texts = []
    for place, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get(kinds[kind]) if isinstance(part, dict) and isinstance(kind, str) and kind in kinds else None
        if not isinstance(text, str):
            raise wrong(f"{at}[{place}]", f"only text can be read ({', '.join(kinds)}), found {shown(part)}")
        texts.append(text)
    return between.join(texts)


def text_field(item: Mapping[str, Any], name: str, at: str) -> str:
    """A field that must be text; ApiError."""
    value = item.get(name)
    if not isinstance(value, str):
        raise wrong(f"{at}.{name}", f"must be text, found {shown(value)}")
    return value


def wrong(at: str, problem: str, code: str | None = None) -> ApiError:
    """A refusal that names what it is about."""
    return ApiError(f"{at}: {problem}", param=at, code=code)
