"""ThinkingBudget: ends a thought that has taken as many tokens as it may, by writing what the model would end it with.

`</think>` is no special token in GLM's vocabulary, but text of several that is joined in more than one way, so thoughts
are found in the text, and counted in tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from enum import Enum, auto

from glm4lite.engine.sampling import SamplingParams
from glm4lite.text.stop_strings import partial_end
from glm4lite.text.template import END_OF_THOUGHT
from glm4lite.text.tokenization.codec import Codec
from glm4lite.text.tokenization.streaming import StreamingDetokenizer

_OPEN, _CLOSE = "<think>", "</think>"
_LATE = 3  # tokens that may still come to make a character whole
ANSWER_ROOM = 1024
"""Tokens that a thought without another limit leaves to the answer, or a quarter where there are fewer than four times
as many."""


def with_an_end(params: SamplingParams, prompt: Sequence[int], context: int) -> SamplingParams:
    """The parameters of an answer behind this prompt, in which a thought that never ends cannot take all the context.

    max_new_tokens counts the thought, too: where it is said, it is what ends the answer, as in OpenAI's API.
    """
    if params.max_new_tokens is not None:
        return params
    left = max(context - len(prompt), 0)
    most = left - min(ANSWER_ROOM, left // 4)
    budget = most if params.thinking_budget is None else min(params.thinking_budget, most)
    return replace(params, thinking_budget=budget)


class _State(Enum):
    START = auto()  # nothing but white space and perhaps a part of "<think>" so far
    THINKING = auto()
    ANSWERING = auto()


class ThinkingBudget:
    """The rule for one generation; ask it for every drawn token, in order.

    A thought is what follows a `<think>` that begins the answer, whether the prompt ends with it or the model writes
    it. What the prompt already holds of the thought, when an answer is gone on with, is counted too. The model may
    finish a `</think>` or a character that it has begun.
    """

    def __init__(self, tokenizer: Codec, prompt: Sequence[int], budget: int) -> None:
        self._tokenizer, self._left = tokenizer, budget
        self._end = tokenizer.ids(END_OF_THOUGHT, special=True)
        # GLM's tags are text; where another family's are special tokens, they stand within a part of the answer too.
        self._borders = {token for text, token in tokenizer.special.items() if text not in (_OPEN, _CLOSE)}
        self._state, self._text = _State.START, ""  # what is still looked at of the part of the answer
        self._detokenizer = self._new_detokenizer()
        border = next((place for place in range(len(prompt), 0, -1) if prompt[place - 1] in self._borders), 0)
        begun = tokenizer.text(prompt[border:], keep_special=True)
        begun = begun.removeprefix("\\n")  # a line end that one shipped template writes out
        self._read(begun)
        if self._state is _State.THINKING:
            self._left -= len(tokenizer.ids(begun.partition(_OPEN)[2]))

    def __call__(self, drawn: int) -> list[int]:
        """The ids that end the thought, to be taken in place of `drawn`; none where `drawn` may stand."""
        thinking = self._state is _State.THINKING
        if drawn in self._borders and not (thinking and self._left <= 0):
            self._state, self._text = _State.START, ""  # another part of the answer, or its end
            self._detokenizer = self._new_detokenizer()
            return []
        if self._state is _State.ANSWERING:
            return []
        unfinished = self._detokenizer.unfinished
        piece = self._detokenizer.add(drawn)
        if thinking and self._left <= 0 and not self._may_finish(piece, unfinished):
            self._state = _State.ANSWERING
            return self._end
        self._left -= thinking
        self._read(piece)
        return []

    def _new_detokenizer(self) -> StreamingDetokenizer:
        return StreamingDetokenizer(self._tokenizer, keep_special=True)

    def _read(self, piece: str) -> None:
        self._text += piece
        if self._state is _State.START:
            begun = self._text.lstrip()
            if begun.startswith(_OPEN):
                self._state, self._text = _State.THINKING, begun.removeprefix(_OPEN)
            elif not _OPEN.startswith(begun):
                self._state = _State.ANSWERING
        if self._state is _State.THINKING:
            if _CLOSE in self._text:
                self._state = _State.ANSWERING
            self._text = self._text[-len(_CLOSE) :]

    def _may_finish(self, piece: str, unfinished: bool) -> bool:
        """Whether a token beyond the budget only completes what was begun within it, going further than the last."""
        begun, text = partial_end(self._text, _CLOSE), self._text + piece
        closes = bool(begun) and (_CLOSE in text or len(partial_end(text, _CLOSE)) > len(begun))
        return closes or (unfinished and self._left > -_LATE)
