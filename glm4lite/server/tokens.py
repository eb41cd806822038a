"""`/tokenize`, `/detokenize` (vLLM's and llama.cpp's forms) and `/v1/messages/count_tokens` (Anthropic's)."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from glm4lite.base.errors import shown
from glm4lite.engine.engine import Engine
from glm4lite.server.errors import ApiError
from glm4lite.server.messages import MessagesRequest, messages_question
from glm4lite.server.question import chat_question
from glm4lite.server.replies import JSON
from glm4lite.server.requests import ChatRequest, checked


class TokenizeBody(BaseModel):
    """A text (`prompt` for vLLM, `content` for llama.cpp), or a chat as in a request of one."""

    model_config = ConfigDict(strict=True, protected_namespaces=())

    model: str | None = None
    prompt: str | None = None
    content: str | None = None
    messages: Any = None
    add_special_tokens: bool | None = None
    add_special: bool | None = None
    return_token_strs: bool | None = None
    with_pieces: bool | None = None


class DetokenizeBody(BaseModel):
    """Token ids."""

    model_config = ConfigDict(strict=True, protected_namespaces=())

    model: str | None = None
    tokens: Annotated[list[int], Field(fail_fast=True)]


def tokenize(engine: Engine, body: JSON) -> JSON:
    """The ids that a completion of the text, or the chat, has as its prompt. Raises ApiError.

    GLM's prefix is before a `prompt` unless `add_special_tokens` is false, and before `content` where `add_special` is
    true, as the two servers do it.
    """
    asked = checked(TokenizeBody, body)
    given = [name for name in ("prompt", "content", "messages") if getattr(asked, name) is not None]
    if len(given) != 1:
        raise ApiError(f"prompt: give one of prompt, content and messages, found {len(given)}", param="prompt")
    if given == ["messages"]:
        chat = {name: value for name, value in body.items() if name not in _OWN}
        ids = chat_question(engine, ChatRequest.read(chat)).prompt
    else:
        text = asked.prompt if asked.prompt is not None else asked.content or ""
        prefixed = asked.add_special_tokens is not False if asked.prompt is not None else bool(asked.add_special)
        ids = (engine.tokenizer.prefix_ids if prefixed else []) + engine.tokenizer.ids(text)
    answer: JSON = {"count": len(ids), "max_model_len": engine.model.context, "tokens": ids}
    if asked.return_token_strs or asked.with_pieces:
        pieces = [engine.tokenizer.token_bytes(token).decode("utf-8", "replace") for token in ids]
        if asked.return_token_strs:
            answer["token_strs"] = pieces
        else:
            answer["tokens"] = [{"id": token, "piece": piece} for token, piece in zip(ids, pieces, strict=True)]
    return answer


def detokenize(engine: Engine, body: JSON) -> JSON:
    """The text of ids, special tokens as they are written. Raises ApiError for what is no token."""
    tokens, size = checked(DetokenizeBody, body).tokens, engine.tokenizer.size
    wrong = next((token for token in tokens if not 0 <= token < size), None)
    if wrong is not None:
        raise ApiError(f"tokens: {shown(wrong)} is no token of this model", param="tokens")
    text = engine.tokenizer.text(tokens, keep_special=True)
    return {"prompt": text, "content": text}


def count_tokens(engine: Engine, body: JSON) -> JSON:
    """How long the prompt of a request to `/v1/messages` is. Raises ApiError, also where it is too long."""
    return {"input_tokens": len(messages_question(engine, MessagesRequest.read(body)).prompt)}


_OWN = TokenizeBody.model_fields.keys() - {"model", "messages"}
