"""An answer's pieces as OpenAI's objects: whole, or chunk by chunk as server-sent events carry them."""

from __future__ import annotations

import copy
import secrets
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

from glm4lite import __version__
from glm4lite.base.events import Done, TextDelta, ThinkingDelta
from glm4lite.engine.sequence import TokenLogprobs
from glm4lite.server.answer import Choice, Echo, Piece, Scored
from glm4lite.server.errors import ApiError
from glm4lite.text.output_parser import Call, CallBegun, CallPiece
from glm4lite.text.tokenizer import Tokenizer

JSON = dict[str, Any]


class Reply(Protocol):
    """One endpoint's form. Feed it every piece; it gives the chunks of a stream, and at the end the whole."""

    def first(self) -> Iterator[JSON]:
        """Chunks before the first piece."""
        ...

    def chunks(self, piece: Piece) -> Iterator[JSON]:
        """Chunks that this piece makes; it is remembered for `whole`."""
        ...

    def whole(self) -> JSON:
        """The answer in one object."""
        ...

    def last(self, include_usage: bool) -> Iterator[JSON]:
        """Chunks behind the last piece's; with the counts where the client asked for them."""
        ...

    def failed(self, error: ApiError) -> Iterator[JSON]:
        """Chunks that say what went wrong on the way; nothing follows."""
        ...

    @property
    def end(self) -> bytes:
        """What ends a stream that went well."""
        ...


class _Form:
    """What both endpoints' objects share. Of several answers each has a form of its own within the first."""

    kind, stream_kind, prefix = "", "", ""
    end = b"data: [DONE]\n\n"

    def __init__(self, model: str, tokenizer: Tokenizer) -> None:
        self._tokenizer, self._index, self._choices = tokenizer, 0, dict[int, _Form]()
        self._head = {"id": f"{self.prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}
        self._head["system_fingerprint"] = f"glm4lite-{__version__}"
        self._begin()

    def _begin(self) -> None:
        """Nothing was said yet."""
        self._done, self._text = Done(0, 0, "stop", 0.0, 0), list[str]()

    def chunks(self, piece: Piece) -> Iterator[JSON]:
        if isinstance(piece, Choice):
            if piece.index not in self._choices:
                form = self._choices[piece.index] = copy.copy(self)
                form._index, form._choices = piece.index, {}
                form._begin()
            yield from self._choices[piece.index].chunks(piece.piece)
        elif isinstance(piece, Done) and self._choices:
            self._done = piece
        else:
            yield from self._chunks(piece)

    def whole(self) -> JSON:
        forms = [self._choices[index] for index in sorted(self._choices)] or [self]
        choices = [form._choice() for form in forms]
        return {**self._head, "object": self.kind, "choices": choices, "usage": self._usage()}

    def _chunks(self, piece: Piece) -> Iterator[JSON]:
        raise NotImplementedError

    def _choice(self) -> JSON:
        raise NotImplementedError

    def last(self, include_usage: bool) -> Iterator[JSON]:
        if include_usage:
            yield {**self._head, "object": self.stream_kind, "choices": [], "usage": self._usage()}

    def failed(self, error: ApiError) -> Iterator[JSON]:
        yield error.body()

    def _usage(self) -> JSON:
        prompt, new = self._done.prompt_tokens, self._done.new_tokens
        cached = {"cached_tokens": prompt - self._done.prefilled_tokens}
        counts = {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}
        return {**counts, "prompt_tokens_details": cached}

    def _token(self, token: int) -> tuple[str, list[int]]:
        return token_text(self._tokenizer, token)


def token_text(tokenizer: Tokenizer, token: int) -> tuple[str, list[int]]:
    """A token's text and bytes; half a character has no text of its own."""
    written = tokenizer.token_bytes(token)
    return written.decode("utf-8", "replace"), list(written)


def scored(tokenizer: Tokenizer, token: TokenLogprobs) -> JSON:
    """A token with its log probability and those of its alternatives, as chats and Responses have it."""

    def one(token_id: int, logprob: float) -> JSON:
        text, written = token_text(tokenizer, token_id)
        return {"token": text, "bytes": written, "logprob": max(logprob, -9999.0)}  # JSON has no infinity

    return {**one(token.id, token.logprob), "top_logprobs": [one(*other) for other in token.top]}


class ChatReply(_Form):
    """`chat.completion` and its chunks."""

    kind, stream_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def _begin(self) -> None:
        super()._begin()
        self._thought, self._calls, self._scores = list[str](), list[JSON](), list[JSON]()
        self._unsent = list[JSON]()  # scores that go out with the next text
        self._opened = False
        self._writing = False  # the last call is being written

    def first(self) -> Iterator[JSON]:
        self._opened = True
        yield self._chunk({"role": "assistant", "content": ""})

    def _chunks(self, piece: Piece) -> Iterator[JSON]:
        if self._index and not self._opened:  # `first` is of the answer with the number 0
            yield from self.first()
        match piece:
            case Scored(tokens):
                self._unsent += [scored(self._tokenizer, token) for token in tokens]
            case TextDelta(text):
                self._text.append(text)
                self._scores += self._unsent
                scores, self._unsent = self._unsent, []
                yield self._chunk({"content": text}, logprobs={"content": scores, "refusal": None} if scores else None)
            case ThinkingDelta(text):
                self._thought.append(text)
                yield self._chunk({"reasoning_content": text})
            case CallBegun(name):
                yield self._call(name)
            case CallPiece(text):
                yield self._arguments(text)
            case Call(name, arguments):
                if not self._writing:
                    yield self._call(name)
                    yield self._arguments(arguments)
                self._calls[-1]["function"]["arguments"], self._writing = arguments, False
            case Done():
                self._done = piece
                yield self._chunk({}, piece.finish_reason)

    def _call(self, name: str) -> JSON:
        """A call begins: its name, and no arguments yet, as in OpenAI's streams."""
        call: JSON = {"id": f"call_{secrets.token_hex(12)}", "type": "function"}
        self._calls.append({**call, "function": {"name": name, "arguments": ""}})
        self._writing = True
        place = {"index": len(self._calls) - 1}
        return self._chunk({"tool_calls": [{**place, **call, "function": {"name": name, "arguments": ""}}]})

    def _arguments(self, text: str) -> JSON:
        return self._chunk({"tool_calls": [{"index": len(self._calls) - 1, "function": {"arguments": text}}]})

    def _choice(self) -> JSON:
        message: JSON = {"role": "assistant", "content": "".join(self._text) or (None if self._calls else "")}
        if self._thought:
            message["reasoning_content"] = "".join(self._thought)
        if self._calls:
            message["tool_calls"] = self._calls
        scores = {"content": self._scores, "refusal": None} if self._scores else None
        return {
            "index": self._index,
            "message": message,
            "logprobs": scores,
            "finish_reason": self._done.finish_reason,
        }

    def _chunk(self, delta: JSON, finish_reason: str | None = None, logprobs: JSON | None = None) -> JSON:
        choice = {"index": self._index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        return {**self._head, "object": self.stream_kind, "choices": [choice]}


class _Entry(NamedTuple):
    """One token of a completion; the first of a prompt has no probability."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class CompletionReply(_Form):
    """`text_completion`, whole and in chunks of the same name."""

    kind, stream_kind, prefix = "text_completion", "text_completion", "cmpl"

    def _begin(self) -> None:
        super()._begin()
        self._scores, self._unsent, self._length = list[_Entry](), list[_Entry](), 0

    def first(self) -> Iterator[JSON]:
        return iter(())

    def _chunks(self, piece: Piece) -> Iterator[JSON]:
        match piece:
            case Scored(tokens):
                self._unsent += [_Entry(token.id, token.logprob, token.top) for token in tokens]
            case Echo(text, ids, scores):
                if scores is not None:
                    self._unsent += [_Entry(token) for token in ids[: len(ids) - len(scores)]]
                    self._unsent += [_Entry(token.id, token.logprob, token.top) for token in scores]
                yield self._said(text)
            case TextDelta(text):
                yield self._said(text)
            case Done():
                self._done = piece
                yield self._chunk("", None, piece.finish_reason)

    def _said(self, text: str) -> JSON:
        offset, self._length = self._length, self._length + len(text)
        self._text.append(text)
        self._scores += self._unsent
        scores, self._unsent = self._unsent, []
        return self._chunk(text, self._logprobs(scores, offset))

    def _choice(self) -> JSON:
        return self._part("".join(self._text), self._logprobs(self._scores, 0), self._done.finish_reason)

    def _part(self, text: str, logprobs: JSON | None, finish_reason: str | None) -> JSON:
        return {"index": self._index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}

    def _chunk(self, text: str, logprobs: JSON | None, finish_reason: str | None = None) -> JSON:
        choices = [self._part(text, logprobs, finish_reason)]
        return {**self._head, "object": self.kind, "choices": choices}

    def _logprobs(self, scores: Sequence[_Entry], offset: int) -> JSON | None:
        if not scores:
            return None
        texts, offsets = [self._token(score.id)[0] for score in scores], list[int]()
        for text in texts:
            offsets.append(offset)
            offset += len(text)
        logprobs = [None if score.logprob is None else max(score.logprob, -9999.0) for score in scores]
        top = [None if score.logprob is None else self._top(score) for score in scores]
        return {"tokens": texts, "token_logprobs": logprobs, "top_logprobs": top, "text_offset": offsets}

    def _top(self, score: _Entry) -> JSON:
        """By text, of which several tokens may have the same (parts of characters): the likeliest one's."""
        return {self._token(token)[0]: max(value, -9999.0) for token, value in reversed(score.top)}
