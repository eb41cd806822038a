"""Endpoint: what a body is checked with, asked as and answered in, over HTTP and in a batch file alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from glm4lite.engine.engine import Engine
from glm4lite.server.errors import ApiError
from glm4lite.server.question import Question, chat_question, completion_question
from glm4lite.server.replies import ChatReply, CompletionReply, Reply
from glm4lite.server.requests import ChatRequest, CompletionRequest
from glm4lite.text.tokenizer import Tokenizer

Asked = TypeVar("Asked", ChatRequest, CompletionRequest)


@dataclass(frozen=True)
class Endpoint(Generic[Asked]):
    """`form` checks a body, `ask` makes of it what the model gets, `reply` the form in which a named model answers."""

    form: type[Asked]
    ask: Callable[[Engine, Asked], Question]
    reply: Callable[[str, Tokenizer], Reply]

    def read(self, body: dict[str, Any], model: str) -> Asked:
        """The checked body of a request to that model. Raises ApiError, 404 where it names another one."""
        asked = self.form.read(body)
        check_model(asked.model, model)
        return asked


CHAT = Endpoint(ChatRequest, chat_question, ChatReply)
COMPLETION = Endpoint(CompletionRequest, completion_question, CompletionReply)


def check_model(asked: str, model: str) -> None:
    """Raises ApiError where a request names another model than there is."""
    if asked != model:
        message = f"The model {asked[:200]!r} does not exist; the one that answers is {model!r}"
        raise ApiError(message, 404, param="model", code="model_not_found")
