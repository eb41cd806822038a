"""What runs on the engine's thread for one request: a Question becomes a stream of pieces, the last one Done."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import dropwhile
from typing import TypeAlias

from glm4lite.base.errors import ModelReplaced
from glm4lite.base.events import Done, Progress, TextDelta, ThinkingDelta
from glm4lite.engine.decoding import Generation
from glm4lite.engine.engine import SEPARATOR, Engine
from glm4lite.engine.sequence import TokenLogprobs
from glm4lite.server.question import Question
from glm4lite.text.output_parser import Call, CallBegun, CallCut, CallPiece, OutputParser, Segment, Text, Thinking


@dataclass(frozen=True)
class Scored:
    """Log probabilities of the tokens that the next text is made of."""

    tokens: tuple[TokenLogprobs, ...]


@dataclass(frozen=True)
class Stopped:
    """The stop text that ended the answer, before Done."""

    text: str


# A call may be told of as it is written (CallBegun, CallPiece); its Call, which follows in any case, is all of it.
Piece: TypeAlias = TextDelta | ThinkingDelta | CallBegun | CallPiece | Call | Scored | Stopped | Progress | Done


def answer(engine: Engine, question: Question, cancel: threading.Event) -> Iterator[Piece]:
    """The answer to one question. finish_reason is "tool_calls" where the model ended with calls.

    Raises ModelReplaced where `engine` is not the question's any more.
    """
    if engine is not question.engine:
        raise ModelReplaced
    generation = engine.generate(question.prompt, question.params, cancel)
    generation.top_logprobs = question.top_logprobs
    if question.constraint is not None:
        generation.constraint = question.constraint.copy()
    yield from engine.prefill(generation)
    called = False
    for piece in _pieces(engine, generation, question) if question.chat else _plain(engine, generation):
        called = called or isinstance(piece, Call)
        yield piece
    if generation.stop_text is not None:
        yield Stopped(generation.stop_text)
    reason = "tool_calls" if called and generation.finish_reason == "stop" else generation.finish_reason
    speed = round(generation.new_tokens / generation.seconds, 2) if generation.seconds else 0.0
    yield Done(len(generation.prompt), generation.new_tokens, reason, speed, generation.prefilled_tokens)


def _pieces(engine: Engine, generation: Generation, question: Question) -> Iterator[Piece]:
    parser = OutputParser(question.tools, question.thinking, certain=question.constraint is not None)
    scores = _Scores(engine, generation)
    for text in engine.pieces(generation):
        segments = parser.separator() if text is None else parser.feed(text)
        for segment in segments:
            yield from scores.before(segment)
            yield _piece(segment)
            if isinstance(segment, Call) and not question.parallel:
                generation.finish_reason = "stop"
                return
    for segment in parser.finish():
        yield from scores.before(segment)
        yield _piece(segment)
        if isinstance(segment, Call) and not question.parallel:
            return


def _plain(engine: Engine, generation: Generation) -> Iterator[Piece]:
    scores = _Scores(engine, generation)
    for text in engine.pieces(generation):
        if text != "":
            said = Text(SEPARATOR if text is None else text)
            yield from scores.before(said)
            yield TextDelta(said.text)


def _piece(segment: Segment) -> Piece:
    match segment:
        case Text(text):
            return TextDelta(text)
        case Thinking(text):
            return ThinkingDelta(text)
        case CallCut(name, arguments):  # the client was told of it; the finish reason says that it is cut
            return Call(name, arguments)
    return segment


class _Scores:
    """Gives each token's log probabilities out once, with its text; calls and thoughts have none."""

    def __init__(self, engine: Engine, generation: Generation) -> None:
        self._tokenizer, self._generation = engine.tokenizer, generation
        self._given, self._begun = 0, False

    def before(self, segment: Segment) -> Iterator[Scored]:
        if self._generation.top_logprobs is None:
            return
        tokens = self._generation.logprobs[self._given :]
        self._given += len(tokens)
        if not isinstance(segment, Text):
            return
        if not self._begun and not segment.text.startswith("\n"):  # the newline that GLM starts every answer with
            tokens = list(dropwhile(lambda token: self._tokenizer.text([token.id]) == "\n", tokens))
        self._begun = True
        if tokens:
            yield Scored(tuple(tokens))
