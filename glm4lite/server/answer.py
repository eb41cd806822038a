"""What runs in a job of the engine for one request: a Question becomes a stream of pieces, the last one Done."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import dropwhile
from typing import TypeAlias

from glm4lite.base.errors import ModelReplaced
from glm4lite.base.events import Done, Progress, TextDelta, ThinkingDelta
from glm4lite.engine.decoding import Generation
from glm4lite.engine.engine import SEPARATOR, Engine
from glm4lite.engine.sequence import TokenLogprobs
from glm4lite.server.question import Question
from glm4lite.server.together import together
from glm4lite.text.output_parser import Call, CallBegun, CallCut, CallPiece, OutputParser, Segment, Text, Thinking


@dataclass(frozen=True)
class Scored:
    """Log probabilities of the tokens that the next text is made of."""

    tokens: tuple[TokenLogprobs, ...]


@dataclass(frozen=True)
class Stopped:
    """The stop text that ended the answer, before Done."""

    text: str


@dataclass(frozen=True)
class Echo:
    """The prompt, with which the text begins. `scores` are of the last of its `ids`; of the first ones there is none,
    or of none where nobody asked."""

    text: str
    ids: tuple[int, ...]
    scores: tuple[TokenLogprobs, ...] | None


@dataclass(frozen=True)
class Choice:
    """A piece of one of several answers."""

    index: int
    piece: Piece


# A call may be told of as it is written (CallBegun, CallPiece); its Call, which follows in any case, is all of it.
Piece: TypeAlias = (
    TextDelta | ThinkingDelta | CallBegun | CallPiece | Call | Scored | Stopped | Echo | Choice | Progress | Done
)


def answer(engine: Engine, question: Question, cancel: threading.Event) -> Iterator[Piece]:
    """The answer to one question. finish_reason is "tool_calls" where the model ended with calls.

    Of several answers each piece is a Choice, and the last one a Done with the counts of all.

    Raises ModelReplaced where `engine` is not the question's any more.
    """
    if engine is not question.engine:
        raise ModelReplaced
    yield from _one(engine, question, cancel) if question.alone else _several(engine, question, cancel)


def _one(engine: Engine, question: Question, cancel: threading.Event) -> Iterator[Piece]:
    generation = engine.generate(question.prompt, question.params, cancel)
    generation.top_logprobs = question.top_logprobs
    if question.constraint is not None:
        generation.constraint = question.constraint.copy()
    if question.echo is not None and question.top_logprobs is not None:
        generation.score_prompt(question.echo, question.top_logprobs)
    yield from engine.prefill(generation)
    if question.echo is not None and not cancel.is_set():
        yield _echo(engine, generation, question)
        if question.silent:
            generation.close()
            engine.totals.add(generation)
            yield Done(len(generation.prompt), 0, "length", 0.0, generation.prefilled_tokens)
            return
    called = False
    for piece in _pieces(engine, generation, question) if question.chat else _plain(engine, generation):
        called = called or isinstance(piece, Call)
        yield piece
    if generation.stop_text is not None:
        yield Stopped(generation.stop_text)
    reason = "tool_calls" if called and generation.finish_reason == "stop" else generation.finish_reason
    speed = round(generation.new_tokens / generation.seconds, 2) if generation.seconds else 0.0
    yield Done(len(generation.prompt), generation.new_tokens, reason, speed, generation.prefilled_tokens)


def _echo(engine: Engine, generation: Generation, question: Question) -> Echo:
    ids = question.prompt[question.echo :]
    scores = None if question.top_logprobs is None else tuple(generation.prompt_logprobs)
    return Echo(engine.tokenizer.text(ids, keep_special=True), tuple(ids), scores)


def _several(engine: Engine, question: Question, cancel: threading.Event) -> Iterator[Piece]:
    """Each answer as it comes; where the best are wanted, those of a prompt once all of them are complete."""
    stop = threading.Event()
    each = question.each()
    answers = [partial(_one, engine, one, stop) for one in each]
    ended = dict[int, Done]()
    held: dict[int, list[Piece]] = {place: [] for place in range(len(each))}
    for place, piece in together(answers, engine.parallel, cancel, stop):
        if isinstance(piece, Progress):
            yield piece
            continue
        if isinstance(piece, Done):
            ended[place] = piece
            if piece.finish_reason == "cancelled":
                continue
        if question.n == question.best_of:
            yield Choice(place, piece)
            continue
        held[place].append(piece)
        prompt = place // question.best_of
        candidates = range(prompt * question.best_of, (prompt + 1) * question.best_of)
        if all(one in ended for one in candidates):
            best = sorted(candidates, key=lambda one: -_likelihood(held[one]))[: question.n]
            for index, one in enumerate(best, prompt * question.n):
                yield from (Choice(index, kept) for kept in _asked_for(held[one], question))
            for one in candidates:
                held[one] = []
    yield _counts(question, ended, "cancelled" if cancel.is_set() else "stop")


def _likelihood(pieces: list[Piece]) -> float:
    """The mean log probability of a token."""
    scores = [token.logprob for piece in pieces if isinstance(piece, Scored) for token in piece.tokens]
    return sum(scores) / len(scores) if scores else -math.inf


def _asked_for(pieces: list[Piece], question: Question) -> list[Piece]:
    """Without the log probabilities by which the best was found, where nobody asked for them."""
    if question.top_logprobs is not None:
        return pieces
    unscored = (replace(piece, scores=None) if isinstance(piece, Echo) else piece for piece in pieces)
    return [piece for piece in unscored if not isinstance(piece, Scored)]


def _counts(question: Question, ended: Mapping[int, Done], finish_reason: str) -> Done:
    """Of all answers; a prompt counts once, and as computed as far as any of its answers had to compute it."""
    prompts: dict[int, list[Done]] = {}
    for place, done in ended.items():
        prompts.setdefault(place // question.best_of, []).append(done)
    return Done(
        sum(dones[0].prompt_tokens for dones in prompts.values()),
        sum(done.new_tokens for done in ended.values()),
        finish_reason,
        round(sum(done.tokens_per_s for done in ended.values()), 2),
        sum(max(done.prefilled_tokens for done in dones) for dones in prompts.values()),
    )


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
