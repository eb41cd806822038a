"""The answer to `POST /v1/messages`: a message whole, or its events in Anthropic's order.

    message_start
    content_block_start, content_block_delta …, content_block_stop
    message_delta, message_stop

Source: https://docs.anthropic.com/en/docs/build-with-claude/streaming.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator

from glm4lite.base.events import Done
from glm4lite.engine.sequence import TokenLogprobs
from glm4lite.server.blocks import Block, BlockReply
from glm4lite.server.errors import ApiError
from glm4lite.server.messages import MessagesRequest
from glm4lite.server.question import Question
from glm4lite.server.replies import JSON

_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
# Anthropic signs a thought, so that it comes back unchanged; here it is not looked at, and clients drop one without.
_SIGNATURE = "unsigned"


class MessagesReply(BlockReply):
    """`message`, and its events."""

    def __init__(self, model: str, question: Question, asked: MessagesRequest) -> None:
        super().__init__(question)
        self._head = {"id": f"msg_{secrets.token_hex(12)}", "type": "message", "role": "assistant", "model": model}

    def first(self) -> Iterator[JSON]:
        # How much of the prompt is kept shows when it is read; the last event says it.
        usage = {**_usage(len(self._question.prompt), 0), "output_tokens": 0}
        yield {"type": "message_start", "message": {**self._head, "content": [], **self._ending(), "usage": usage}}

    def begun(self, place: int, block: Block) -> Iterator[JSON]:
        empty = {
            "text": {"type": "text", "text": ""},
            "thinking": {"type": "thinking", "thinking": "", "signature": ""},
            "call": {"type": "tool_use", "id": _call_id(block), "name": block.name, "input": {}},
        }
        yield {"type": "content_block_start", "index": place, "content_block": empty[block.kind]}

    def grown(self, place: int, block: Block, text: str, scores: list[TokenLogprobs]) -> Iterator[JSON]:
        yield _delta(place, *_DELTAS[block.kind], text)

    def ended(self, place: int, block: Block) -> Iterator[JSON]:
        if block.kind == "thinking":
            yield _delta(place, "signature_delta", "signature", _SIGNATURE)
        yield {"type": "content_block_stop", "index": place}

    def over(self, done: Done) -> Iterator[JSON]:
        yield {"type": "message_delta", "delta": self._ending(), "usage": self._counts(done)}
        yield {"type": "message_stop"}

    def failed(self, error: ApiError) -> Iterator[JSON]:
        yield error.anthropic_body()

    def whole(self) -> JSON:
        """The message, once it is complete."""
        content = [_content(block) for block in self._blocks]
        counts = self._counts(self._done) if self._done else {}
        return {**self._head, "content": content, **self._ending(), "usage": counts}

    def _ending(self) -> JSON:
        """Why it ended; a stop text is one of those that were asked for."""
        reason = None if self._done is None else _REASONS.get(self._done.finish_reason, self._done.finish_reason)
        most = self._question.params.max_new_tokens
        if reason == "max_tokens" and self._done is not None and (most is None or self._done.new_tokens < most):
            reason = "model_context_window_exceeded"
        if reason == "end_turn" and self._stopped is not None:
            return {"stop_reason": "stop_sequence", "stop_sequence": self._stopped}
        return {"stop_reason": reason, "stop_sequence": None}

    def _counts(self, done: Done) -> JSON:
        kept = done.prompt_tokens - done.prefilled_tokens
        thought = {"output_tokens_details": {"thinking_tokens": self.thought_tokens}}
        return {**_usage(done.prefilled_tokens, kept), "output_tokens": done.new_tokens, **thought}


_DELTAS = {
    "text": ("text_delta", "text"),
    "thinking": ("thinking_delta", "thinking"),
    "call": ("input_json_delta", "partial_json"),
}


def _delta(place: int, kind: str, name: str, text: str) -> JSON:
    return {"type": "content_block_delta", "index": place, "delta": {"type": kind, name: text}}


def _call_id(block: Block) -> str:
    return f"toolu_{block.id}"


def _content(block: Block) -> JSON:
    match block.kind:
        case "text":
            return {"type": "text", "text": block.text}
        case "thinking":
            return {"type": "thinking", "thinking": block.text, "signature": _SIGNATURE}
        case "call":
            return {"type": "tool_use", "id": _call_id(block), "name": block.name, "input": _parsed(block.text)}


def _parsed(arguments: str) -> JSON:
    """A call's arguments. One that was cut is no JSON; the stop reason says that, and a stream has its text."""
    try:
        value = json.loads(arguments)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _usage(read: int, kept: int) -> JSON:
    """Tokens of the prompt: those that were computed, and those that were found in a kept prefix."""
    return {"input_tokens": read, "cache_read_input_tokens": kept, "cache_creation_input_tokens": 0}
