"""The answer to `POST /v1/responses`: a response whole, or its events in OpenAI's order, numbered from 0.

    created, in_progress
    output_item.added, content_part.added, output_text.delta …, output_text.done, content_part.done, output_item.done
    output_item.added, function_call_arguments.delta …, function_call_arguments.done, output_item.done
    completed | incomplete | failed

Source: https://platform.openai.com/docs/api-reference/responses-streaming. A thought is an item with its text, as
OpenAI's own open models have it (`reasoning_text`).
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator

from glm4lite.base.events import Done
from glm4lite.engine.sequence import TokenLogprobs
from glm4lite.server.blocks import Block, BlockReply
from glm4lite.server.errors import ApiError
from glm4lite.server.question import Question
from glm4lite.server.replies import JSON, scored
from glm4lite.server.response_store import ResponseStore
from glm4lite.server.responses import ResponsesRequest

_PREFIXES = {"thinking": "rs", "text": "msg", "call": "fc"}


class ResponsesReply(BlockReply):
    """`response`, and its events."""

    def __init__(self, model: str, question: Question, asked: ResponsesRequest, store: ResponseStore) -> None:
        super().__init__(question)
        self._asked, self._store, self._sent = asked, store, 0
        head = {"id": f"resp_{secrets.token_hex(24)}", "object": "response", "created_at": int(time.time())}
        self._told = head | _echoed(model, question, asked)
        self._whole: JSON = {}

    def first(self) -> Iterator[JSON]:
        response = self._response("in_progress")
        yield self._event("response.created", response=response)
        yield self._event("response.in_progress", response=response)

    def begun(self, place: int, block: Block) -> Iterator[JSON]:
        yield self._event("response.output_item.added", output_index=place, item=self._item(block, "in_progress"))
        if block.kind != "call":
            yield self._of(place, block, "response.content_part.added", part=self._part(block))

    def grown(self, place: int, block: Block, text: str, scores: list[TokenLogprobs]) -> Iterator[JSON]:
        logprobs = {"logprobs": self._scores(scores)} if block.kind == "text" else {}
        yield self._of(place, block, f"{_STREAMS[block.kind]}.delta", delta=text, **logprobs)

    def ended(self, place: int, block: Block) -> Iterator[JSON]:
        name = f"{_STREAMS[block.kind]}.done"
        match block.kind:
            case "call":
                yield self._of(place, block, name, arguments=block.text)
            case "thinking":
                yield self._of(place, block, name, text=block.text)
            case "text":
                yield self._of(place, block, name, text=block.text, logprobs=self._scores(block.scores))
        if block.kind != "call":
            yield self._of(place, block, "response.content_part.done", part=self._part(block))
        yield self._event("response.output_item.done", output_index=place, item=self._item(block, self._status(block)))

    def over(self, done: Done) -> Iterator[JSON]:
        self._whole = self._response("incomplete" if self._is_cut else "completed")
        self._asked.keep(self._store, self._whole)
        yield self._event(f"response.{self._whole['status']}", response=self._whole)

    def failed(self, error: ApiError) -> Iterator[JSON]:
        said = {"code": "server_error", "message": error.message}
        yield self._event("response.failed", response=self._response("failed") | {"error": said})

    def whole(self) -> JSON:
        """The response, once it is complete."""
        return self._whole

    @property
    def _is_cut(self) -> bool:
        return self._done is not None and self._done.finish_reason == "length"

    def _response(self, status: str) -> JSON:
        items = [self._item(block, self._status(block)) for block in self._blocks]
        cut = {"reason": "max_output_tokens"} if status == "incomplete" else None
        response = self._told | {"status": status, "output": items, "incomplete_details": cut, "usage": self._usage()}
        return response | ({"completed_at": int(time.time())} if status == "completed" else {})

    def _usage(self) -> JSON | None:
        if self._done is None:
            return None
        prompt, new = self._done.prompt_tokens, self._done.new_tokens
        return {
            "input_tokens": prompt,
            "input_tokens_details": {"cached_tokens": prompt - self._done.prefilled_tokens, "cache_write_tokens": 0},
            "output_tokens": new,
            "output_tokens_details": {"reasoning_tokens": self.thought_tokens},
            "total_tokens": prompt + new,
        }

    def _status(self, block: Block) -> str:
        if self._grows and block is self._blocks[-1]:
            return "in_progress"
        return "incomplete" if self._is_cut and block is self._blocks[-1] else "completed"

    def _item(self, block: Block, status: str) -> JSON:
        head = {"id": _id(block), "status": status}
        content = [self._part(block)] if block.pieces or status != "in_progress" else []
        match block.kind:
            case "call":
                call = {"call_id": block.call_id, "name": block.name, "arguments": block.text}
                return {**head, "type": "function_call", **call}
            case "thinking":
                return {**head, "type": "reasoning", "summary": [], "content": content, "encrypted_content": None}
            case "text":
                return {**head, "type": "message", "role": "assistant", "content": content}

    def _part(self, block: Block) -> JSON:
        if block.kind == "thinking":
            return {"type": "reasoning_text", "text": block.text}
        scores = self._scores(block.scores)
        return {"type": "output_text", "text": block.text, "annotations": [], "logprobs": scores}

    def _scores(self, scores: list[TokenLogprobs]) -> list[JSON]:
        return [scored(self._tokenizer, score) for score in scores]

    def _of(self, place: int, block: Block, kind: str, **more: object) -> JSON:
        """An event of one item's text."""
        content = {} if block.kind == "call" else {"content_index": 0}
        return self._event(kind, item_id=_id(block), output_index=place, **content, **more)

    def _event(self, kind: str, **more: object) -> JSON:
        self._sent += 1
        return {"type": kind, "sequence_number": self._sent - 1, **more}


_STREAMS = {
    "thinking": "response.reasoning_text",
    "text": "response.output_text",
    "call": "response.function_call_arguments",
}


def _id(block: Block) -> str:
    return f"{_PREFIXES[block.kind]}_{block.id}"


def _echoed(model: str, question: Question, asked: ResponsesRequest) -> JSON:
    """What a response says of its request."""
    body, params = asked.body, question.params
    text = body.text.model_dump(by_alias=True, exclude_none=True) if body.text else {}
    tools = [{"parameters": None, "strict": False, **tool} for tool in body.tools or []]
    return {
        "background": False,
        "error": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": body.max_tool_calls,
        "metadata": body.metadata or {},
        "model": model,
        "parallel_tool_calls": question.parallel,
        "previous_response_id": body.previous_response_id,
        "reasoning": {"effort": body.reasoning.effort if body.reasoning else None, "summary": None},
        "service_tier": "default",
        "store": body.store is not False,
        "temperature": params.temperature,
        "text": {"format": {"type": "text"}, **text},
        "tool_choice": body.tool_choice or "auto",
        "tools": tools,
        "top_logprobs": body.top_logprobs or 0,
        "top_p": params.top_p,
        "truncation": "disabled",
    }
