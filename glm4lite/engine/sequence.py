"""Sequence: one answer as the engine computes it: the ids that come next into a step, and what follows from the logits.

Nothing here knows text, or that there are other sequences.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass
from itertools import takewhile

import torch
from torch import Tensor

from glm4lite.base.errors import ContextLengthError, ModelError
from glm4lite.engine.constraint import Constraint
from glm4lite.engine.prefix_pool import PrefixCache
from glm4lite.engine.sampling import NOT_FINITE, Sampler, SamplingParams
from glm4lite.engine.speculation import MOST, Drafts, Speculation
from glm4lite.model.lora import BASE
from glm4lite.model.step import Scored, Span

FEW = MOST + 1
"""Rows that one sequence may have in a step that is not for a prompt: the ids that are certain, and a guess."""


@dataclass(frozen=True)
class TokenLogprobs:
    """A token's log probability as the model gave it (before temperature and the like), and the likeliest ids'.

    Under a constraint it is among what may come; ids that may not are not among the likeliest.
    """

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Drawn:
    """A new id. `put_in`: by the sequence's `replacement`, not by the model."""

    id: int
    put_in: bool = False
    logprobs: TokenLogprobs | None = None


class Sequence:
    """Belongs to whoever steps it (`Scheduler`); a reader takes from `outputs` and looks at `over`.

    `ids` are the prompt and all ids taken so far, `cache` holds the first of them and is None while the sequence waits.
    When it is `over`, `error` is what went wrong, or `finish_reason` is "stop" (a stop id came, `stop_id`, or the
    constraint lets nothing more come), "length" or "cancelled".
    """

    def __init__(
        self,
        prompt: list[int],
        params: SamplingParams,
        context: int,
        vocab_size: int,
        stop_ids: Collection[int] = (),
        cancel: threading.Event | None = None,
        speculation: Speculation | None = None,
    ) -> None:
        """`context`: most ids it may have; `vocab_size`: ids that may be drawn. Raises ContextLengthError."""
        if not prompt:
            raise ContextLengthError("the prompt is empty: there is nothing to go on from")
        if len(prompt) >= context:
            raise ContextLengthError(
                "the prompt has {tokens} tokens and the model's context is {context}; "
                "shorten the conversation or start a new one",
                tokens=str(len(prompt)),
                context=str(context),
            )
        self.prompt, self.params, self.vocab_size = prompt, params, vocab_size
        self.stop_ids, self.cancel = frozenset(stop_ids), cancel or threading.Event()
        self.constraint: Constraint | None = None
        self.replacement: Callable[[int], list[int]] | None = None
        self.top_logprobs: int | None = None
        self.adapter_number = BASE
        self.ids = list(prompt)
        self.limit = len(prompt) + min(params.max_new_tokens or context, context - len(prompt))  # of ids
        self.cache: PrefixCache | None = None
        self.outputs: deque[Drawn] = deque()
        self.over, self.abandoned = False, False  # abandoned: nobody takes outputs any more
        self.finish_reason = "length"
        self.stop_id: int | None = None
        self.error: BaseException | None = None
        self.prefilled, self.to_prefill = 0, len(prompt)  # ids of the prompt that were computed, and that have to be
        self.seconds = 0.0  # from the end of the prompt to the last id
        self.drafts = Drafts(speculation, prompt) if speculation is not None else None
        self.prompt_logprobs: list[TokenLogprobs] = []
        self._to_score = len(prompt)  # the first id of the prompt whose probability is still wanted
        self._score_from, self._score_top = len(prompt), 0
        self._sampler = Sampler(params, len(prompt), self.stop_ids)
        self._certain, self._draft = 0, list[int]()  # the step that is being computed: ids of ours, and guessed ones
        self._first = list[Drawn]()  # ids that could be no others, until the prompt is computed
        self._began: float | None = None

    @property
    def adapter(self) -> str | None:
        """The name of the one that computes it, of those that may be chosen."""
        return self.params.adapter

    @property
    def cached(self) -> int:
        """Ids that are computed."""
        return 0 if self.cache is None else len(self.cache.ids)

    @property
    def todo(self) -> int:
        """Ids that are taken and not computed."""
        return len(self.ids) - self.cached

    def score_prompt(self, first: int, top: int) -> None:
        """`prompt_logprobs` gets an entry for each id of the prompt from `first` (1 or more) on, with `top` others."""
        self._to_score = self._score_from = max(first, 1)
        self._score_top = top

    @property
    def reusable(self) -> list[int]:
        """The ids that may have been computed before: all but those whose rows are still to be scored."""
        return self.ids if self._to_score >= len(self.prompt) else self.ids[: self._to_score]

    def begin(self) -> None:
        """To be called once, before it is computed: what comes first whatever is drawn goes in with the prompt."""
        if self.constraint is not None:
            self._first = [self._scored(token) for token in self._forced(spare=1)]

    def admit(self, cache: PrefixCache) -> None:
        """Goes on over what a cache has of the ids."""
        self.cache = cache
        computed = cache.keep_common_prefix(self.reusable)
        self.to_prefill = min(self.prefilled + len(self.prompt) - computed, len(self.prompt))

    def give_up(self) -> None:
        """Others have what was computed, or its memory; what is still needed is computed again."""
        self.cache = None

    @property
    def room(self) -> int:
        """Ids that may be guessed behind the certain ones."""
        return 0 if self.todo > FEW else max(0, min(self.limit - len(self.ids) - 1, FEW - self.todo))

    def look_up(self, sequences: int, rows: int) -> int:
        """Guesses from what was said before, for a step of so many sequences and rows without it; how many ids."""
        if self.drafts is not None:
            guess = self.drafts.next(self.room, sequences, rows)
            self._draft = self._possible(guess)
            self.drafts.drafted -= len(guess) - len(self._draft)
        return len(self._draft)

    def guess(self, ids: list[int]) -> None:
        """Takes guesses of someone else's into the next step."""
        self._draft = self._possible(ids)
        if self.drafts is not None:
            self.drafts.drafted += len(self._draft)

    @property
    def guessed(self) -> bool:
        """Whether there is a guess for the next step."""
        return bool(self._draft)

    def span(self, most: int) -> Span:
        """What comes into the step: at most `most` of the ids that have to be computed, and the guess behind all."""
        cache = self.held()
        chunk = self.ids[self.cached : self.cached + most]
        self._certain = len(chunk)
        last = self._certain == self.todo
        self._draft = self._draft[: most - self._certain] if last else []
        kept, scored = 1 + len(self._draft) if last else 0, self._scoring(len(chunk))
        return Span([*chunk, *self._draft], cache.kv, kept, scored, self.adapter_number)

    def computed(self, logits: Tensor) -> None:
        """The step was made: [kept, vocab] of its last ids. Draws what can be drawn from them.

        A guess is right where it is what would have been drawn anyway, so what comes is as without.
        """
        cache = self.held()
        in_prompt = max(0, min(self.cached + self._certain, len(self.prompt)) - self.cached)
        cache.ids += self.ids[self.cached : self.cached + self._certain]
        self.prefilled = min(self.prefilled + in_prompt, self.to_prefill)
        draft, self._draft = self._draft, []
        taken = deque[int]()  # ids that came, and of which a guess was computed or not
        for row, guess in zip(logits, [*draft, None], strict=False):  # of a part of a prompt there are no logits
            if self.cancel.is_set():
                return
            if not taken:
                taken.extend(self._draw(row[: self.vocab_size].float()))
            if self.over or not taken or (token := taken.popleft()) != guess:
                return
            cache.ids.append(token)
            if self.drafts is not None:
                self.drafts.accepted += 1

    def settle(self) -> None:
        """Forgets what a step left behind that was stopped half-way, or that guessed wrongly.

        The last id of one that goes on is computed again where nothing was drawn from it.
        """
        if self.cache is not None:
            self.cache.settle(len(self.ids) if self.over else len(self.ids) - 1)

    def fail(self, error: BaseException) -> None:
        """Ends with an error, which the reader gets."""
        self.error, self.over = error, True

    def end(self, reason: str) -> None:
        """Ends, where it is not over already."""
        if not self.over:
            self.finish_reason, self.over = reason, True

    def held(self) -> PrefixCache:
        """The cache, of one that has it."""
        if self.cache is None:
            raise RuntimeError("a sequence that waits, or is over, has no cache")
        return self.cache

    def _scoring(self, count: int) -> Scored | None:
        """Of the next `count` ids' rows those from which ids of the prompt are scored; row r tells of the id r + 1."""
        begin, end = max(self.cached, self._to_score - 1), min(self.cached + count, len(self.prompt) - 1)
        return Scored(range(begin - self.cached, end - self.cached), self._score) if begin < end else None

    def _score(self, row: int, logits: Tensor) -> None:
        """[few, vocab] of rows from `row` of the step on; the whole vocabulary shares the probability, as in `eval`."""
        begin = self.cached + row + 1
        ids = self.prompt[begin : begin + len(logits)]
        logprobs = logits.log_softmax(-1)
        chosen = logprobs.gather(1, torch.tensor(ids, device=logits.device)[:, None])[:, 0]
        values, others = logprobs[:, : self.vocab_size].topk(self._score_top)
        if not bool(chosen.isfinite().all()):
            raise ModelError(NOT_FINITE)
        del self.prompt_logprobs[begin - self._score_from :]
        tops = (tuple(zip(*each, strict=True)) for each in zip(others.tolist(), values.tolist(), strict=True))
        self.prompt_logprobs += map(TokenLogprobs, ids, chosen.tolist(), tops)
        self._to_score = begin + len(ids)

    def _draw(self, logits: Tensor) -> list[int]:
        """The next ids, which are taken; none where the answer is over."""
        began = self._began = self._began or time.perf_counter()
        self.outputs.extend(self._first)
        self._first = []
        if self.constraint is not None:
            logits = self.constraint.masked(logits, self.params.stop_token_ids)
        token = self._sampler(logits, self.ids)
        taken = self.replacement(token) if self.replacement is not None else []
        put_in, taken = bool(taken), taken or [token]
        self.seconds = time.perf_counter() - began
        if not put_in and token in self.stop_ids:
            self.stop_id = token
            self.end("stop")
            return []
        if len(self.ids) + len(taken) > self.limit:
            self.end("length")
            return []
        scored = None if put_in or self.top_logprobs is None else _logprobs(logits, token, self.top_logprobs)
        self.outputs.extend(Drawn(each, put_in, scored) for each in taken)
        self._take(taken)
        if self.constraint is not None:
            self.constraint.accept(taken)
            forced = self._forced()
            self.outputs.extend(map(self._scored, forced))
            taken = [*taken, *forced]
            if self.constraint.complete:
                self.end("stop")
        if len(self.ids) >= self.limit:
            self.end("length")
        return taken

    def _take(self, ids: list[int]) -> None:
        self.ids += ids
        if self.drafts is not None:
            for token in ids:
                self.drafts.take(token)

    def _forced(self, spare: int = 0) -> list[int]:
        """Takes the ids that come next whatever is drawn, as far as the limit allows with `spare` more behind them."""
        if self.constraint is None:
            return []
        ids = self.constraint.forced()[: max(0, self.limit - len(self.ids) - spare)]
        ids = list(takewhile(lambda token: token not in self.stop_ids, ids))  # which is drawn, and ends the answer
        if ids:
            self.constraint.accept(ids)
            self._take(ids)
        if self.replacement is not None:
            for token in ids:
                self.replacement(token)  # which only looks on: what is forced is no part of a thought
        return ids

    def _scored(self, token: int) -> Drawn:
        """One that could be no other."""
        certain = None if self.top_logprobs is None else TokenLogprobs(token, 0.0, ((token, 0.0),)[: self.top_logprobs])
        return Drawn(token, False, certain)

    def _possible(self, ids: list[int]) -> list[int]:
        """As many of guessed ids as the constraint lets come."""
        return ids if self.constraint is None or not ids else ids[: self.constraint.fitting(ids)]


def _logprobs(logits: Tensor, token: int, count: int) -> TokenLogprobs:
    logprobs = logits.log_softmax(-1)
    values, ids = logprobs.topk(count)
    top = zip(ids.tolist(), values.tolist(), strict=True)
    return TokenLogprobs(token, float(logprobs[token]), tuple(each for each in top if each[1] > -math.inf))
