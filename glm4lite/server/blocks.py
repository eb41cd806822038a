"""BlockReply: an answer as a list of thoughts, texts and calls, which are begun, grow and end one after another.

OpenAI's Responses call them output items, Anthropic's Messages content blocks; a chat completion has one of each.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from glm4lite.base.events import Done, TextDelta, ThinkingDelta
from glm4lite.engine.sequence import TokenLogprobs
from glm4lite.server.answer import Piece, Scored, Stopped
from glm4lite.server.question import Question
from glm4lite.server.replies import JSON
from glm4lite.text.output_parser import Call, CallBegun, CallPiece

Kind = Literal["thinking", "text", "call"]


@dataclass
class Block:
    """One of them: `name` and `call_id` are a call's, whose text is its arguments; `scores` belong to the text."""

    kind: Kind
    name: str = ""
    pieces: list[str] = field(default_factory=list)
    scores: list[TokenLogprobs] = field(default_factory=list)
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    call_id: str = field(default_factory=lambda: f"call_{secrets.token_hex(12)}")

    @property
    def text(self) -> str:
        return "".join(self.pieces)


class BlockReply:
    """Feeds each piece to the block it belongs to. A form says what is sent when a block begins, grows and ends."""

    end = b""

    def __init__(self, question: Question) -> None:
        self._question, self._tokenizer = question, question.engine.tokenizer
        self._blocks, self._unsent = list[Block](), list[TokenLogprobs]()
        self._grows = False  # whether the last block may get more
        self._writing = False  # whether it is a call that is being written
        self._done: Done | None = None
        self._stopped: str | None = None  # the stop text that ended the answer

    def chunks(self, piece: Piece) -> Iterator[JSON]:
        """What is sent for this piece; it is remembered for `whole`."""
        match piece:
            case Scored(tokens):
                self._unsent += tokens
            case TextDelta(text):
                yield from self._grow("text", text)
            case ThinkingDelta(text):
                yield from self._grow("thinking", text)
            case CallBegun(name):
                yield from self._begin(Block("call", name))
                self._writing = True
            case CallPiece(text):
                yield from self._grow("call", text)
            case Call(name, arguments):
                if not self._writing:
                    yield from self._begin(Block("call", name))
                    yield from self._grow("call", arguments)
                self._blocks[-1].pieces, self._writing = [arguments], False
                yield from self._end_block()
            case Stopped(text):
                self._stopped = text
            case Done():
                if not self._blocks:
                    yield from self._begin(Block("text"))
                self._done = piece
                yield from self._end_block()
                yield from self.over(piece)

    def last(self, include_usage: bool) -> Iterator[JSON]:
        """Nothing: the counts are part of the answer."""
        return iter(())

    def begun(self, place: int, block: Block) -> Iterator[JSON]:
        """What is sent when the block at that place begins."""
        raise NotImplementedError

    def grown(self, place: int, block: Block, text: str, scores: list[TokenLogprobs]) -> Iterator[JSON]:
        """What is sent when more of it is there, with the log probabilities of its tokens where they were asked for."""
        raise NotImplementedError

    def ended(self, place: int, block: Block) -> Iterator[JSON]:
        """What is sent when it is whole."""
        raise NotImplementedError

    def over(self, done: Done) -> Iterator[JSON]:
        """What is sent behind the last block."""
        raise NotImplementedError

    @property
    def thought_tokens(self) -> int:
        """About how many tokens the thoughts took: their text, tokenized again."""
        thought = "".join(block.text for block in self._blocks if block.kind == "thinking")
        return len(self._tokenizer.ids(thought)) if thought else 0

    def _grow(self, kind: Kind, text: str) -> Iterator[JSON]:
        if not text:
            return
        if not self._grows or self._blocks[-1].kind != kind:
            yield from self._begin(Block(kind))
        block = self._blocks[-1]
        scores: list[TokenLogprobs] = []
        if kind == "text":
            scores, self._unsent = self._unsent, []
        block.pieces.append(text)
        block.scores += scores
        yield from self.grown(len(self._blocks) - 1, block, text, scores)

    def _begin(self, block: Block) -> Iterator[JSON]:
        yield from self._end_block()
        self._blocks.append(block)
        self._grows = True
        yield from self.begun(len(self._blocks) - 1, block)

    def _end_block(self) -> Iterator[JSON]:
        if self._grows:
            self._grows = False
            yield from self.ended(len(self._blocks) - 1, self._blocks[-1])
