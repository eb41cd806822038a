"""Endpoint: what a body is checked with, asked as and answered in, over HTTP and in a batch file alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Generic, Protocol, TypeVar

from glm4lite.engine.engine import Engine
from glm4lite.server.errors import ApiError
from glm4lite.server.question import Question, chat_question, completion_question
from glm4lite.server.replies import ChatReply, CompletionReply, Reply
from glm4lite.server.requests import ChatRequest, CompletionRequest


class Request(Protocol):
    """What every checked body has; `ignored` are names in it that mean nothing here."""

    @property
    def model(self) -> str | None: ...
    @property
    def stream(self) -> bool | None: ...
    @property
    def include_usage(self) -> bool: ...
    @property
    def ignored(self) -> list[str]: ...


Asked = TypeVar("Asked", bound=Request)
Read = TypeVar("Read", bound=Request, covariant=True)


class Form(Protocol[Read]):
    """What checks a body."""

    def read(self, body: dict[str, Any]) -> Read:
        """Raises ApiError for the first field that cannot be used."""
        ...


@dataclass(frozen=True)
class ModelNames:
    """What requests may call the model. `own` is its name, a function where another model may be loaded.

    `aliases` are other names for it; with `any_name` whatever a request says means this model. `adapters` are the names
    of LoRA adapters, each behind the model's name and a colon: the model with that adapter.
    """

    own: str | Callable[[], str]
    aliases: tuple[str, ...] = ()
    any_name: bool = False
    adapters: tuple[str, ...] = ()

    @property
    def now(self) -> str:
        """The name of the model that answers."""
        return self.own if isinstance(self.own, str) else self.own()

    @property
    def all(self) -> list[str]:
        """The own one first."""
        names = list(dict.fromkeys([self.now, *self.aliases]))
        return names + [f"{name}:{adapter}" for name in names for adapter in self.adapters]

    def adapter(self, asked: str | None) -> str | None:
        """The one that a request names."""
        last = (asked or "").rpartition(":")[2]
        return last if asked in self.all and last in self.adapters and asked not in (self.now, *self.aliases) else None

    def answering(self, asked: str | None) -> str:
        """The name under which a request is answered."""
        adapter = self.adapter(asked)
        return self.now if adapter is None else f"{self.now}:{adapter}"

    def check(self, asked: str | None) -> None:
        """Raises ApiError, 404, where a request names another model than there is; it may also name none."""
        if asked and not self.any_name and asked not in self.all:
            known = " or ".join(map(repr, self.all))
            message = f"The model {asked[:200]!r} does not exist; the one that answers is {known}"
            raise ApiError(message, 404, param="model", code="model_not_found")


@dataclass(frozen=True)
class Endpoint(Generic[Asked]):
    """`form` checks a body, `made` makes of it what the model gets, `reply` the form in which a named model answers."""

    form: Form[Asked]
    made: Callable[[Engine, Asked], Question]
    reply: Callable[[str, Question, Asked], Reply]

    def read(self, body: dict[str, Any], names: ModelNames) -> Asked:
        """The checked body of a request to that model. Raises ApiError, 404 where it names another one."""
        asked = self.form.read(body)
        names.check(asked.model)
        return asked

    def ask(self, engine: Engine, asked: Asked, names: ModelNames) -> Question:
        """What the model gets, with the adapter that the request names. Raises ApiError."""
        question, adapter = self.made(engine, asked), names.adapter(asked.model)
        return question if adapter is None else replace(question, params=replace(question.params, adapter=adapter))


CHAT = Endpoint[ChatRequest](
    ChatRequest, chat_question, lambda name, question, _: ChatReply(name, question.engine.tokenizer)
)
COMPLETION = Endpoint[CompletionRequest](
    CompletionRequest, completion_question, lambda name, question, _: CompletionReply(name, question.engine.tokenizer)
)
