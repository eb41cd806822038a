"""Generation: one answer in ids, for whoever reads it: chunked prefill over the kept prefix, then id after id.

Nothing here knows text; sessions turn ids into text and events.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator

from glm4lite.base.errors import SamplingError
from glm4lite.engine.constraint import Constraint
from glm4lite.engine.prefix_pool import PrefixCache
from glm4lite.engine.sampling import SamplingParams
from glm4lite.engine.scheduler import Scheduler
from glm4lite.engine.sequence import Sequence, TokenLogprobs
from glm4lite.engine.speculation import Drafts, Speculation
from glm4lite.model.causal_lm import CausalLM


class Generation:
    """Iterate `prefill()` for progress, then the object itself for new ids (stop ids are not given).

    After iteration: `finish_reason` is "stop" (a stop id came), "length" or "cancelled"; `new_tokens` counts all ids
    that were given, and the stop id; `stop_id` is the one that came, `stop_text` the text at which `Engine.pieces`
    ended; `prefilled_tokens` were not in the kept prefix.
    Raises ContextLengthError at once when the prompt leaves no room in the model's context.

    May be set before iteration: `constraint`, which says what may come; `replacement`, which is given each drawn id
    first and returns ids to take in its place, all of them, or none; `top_logprobs`, with which `logprobs` gets an
    entry for each drawn id, stop ids left out. The first two are called by the thread that makes the steps.
    `is_replaced`: whether the id that was given last came from `replacement`. An answer whose constraint lets nothing
    more come ends with "stop" and without a stop id.

    One that nobody holds any more is not computed further.

    The engine may have computed more than was read; what is not read is neither counted nor part of the answer.
    """

    _begun = False

    def __init__(
        self,
        model: CausalLM,
        prompt: list[int],
        params: SamplingParams,
        stop_ids: Collection[int] = (),
        vocab_size: int | None = None,
        cache: PrefixCache | None = None,
        cancel: threading.Event | None = None,
        speculation: Speculation | None = None,
        scheduler: Scheduler | None = None,
    ) -> None:
        """`vocab_size`: ids the tokenizer knows; the padded rest of the model's vocabulary is never drawn.

        `speculation`: guesses ids, which changes how long it takes, not what comes; None: nothing is guessed.
        `scheduler`: who computes it together with others; None: it is computed alone, over `cache` or a new one.
        """
        vocab = min(vocab_size or model.config.vocab_size, model.config.vocab_size)
        self._sequence = Sequence(prompt, params, model.context, vocab, stop_ids, cancel, speculation)
        if params.adapter is not None:
            self._sequence.adapter_number = model.adapter_number(params.adapter)
        if scheduler is None:
            scheduler, cache = (
                Scheduler(model, speculation=speculation),
                cache or PrefixCache(model.new_cache(), params.adapter),
            )
        self._scheduler = scheduler
        self._sequence.cache = cache
        self.prompt, self.params, self.cancel = prompt, params, self._sequence.cancel
        self.ids: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self.is_replaced = False
        self.finish_reason = "length"
        self.stop_id: int | None = None
        self.stop_text: str | None = None

    @property
    def new_tokens(self) -> int:
        return len(self.ids) + (self.stop_id is not None)

    @property
    def stop_ids(self) -> frozenset[int]:
        return self._sequence.stop_ids

    @property
    def prefilled_tokens(self) -> int:
        """Ids of the prompt that were computed."""
        return self._sequence.prefilled

    @property
    def known_tokens(self) -> int:
        """Ids of the prompt that were computed, or found computed: all of it, but where it was stopped on the way."""
        return len(self.prompt) - self._sequence.to_prefill + self._sequence.prefilled

    @property
    def seconds(self) -> float:
        """Spent on new tokens, prefill not counted."""
        return self._sequence.seconds

    @property
    def drafts(self) -> Drafts | None:
        """What was guessed; None where nothing is."""
        return self._sequence.drafts

    @property
    def cache(self) -> PrefixCache:
        """What is computed, with the ids it was computed from, of one that is computed alone."""
        return self._sequence.held()

    @cache.setter
    def cache(self, cache: PrefixCache) -> None:
        self._sequence.cache = cache

    @property
    def constraint(self) -> Constraint | None:
        return self._sequence.constraint

    @constraint.setter
    def constraint(self, constraint: Constraint | None) -> None:
        if constraint is not None and self.params.ignore_eos:
            raise SamplingError("ignore_eos: what follows a schema has an end")
        self._sequence.constraint = constraint

    @property
    def replacement(self) -> Callable[[int], list[int]] | None:
        return self._sequence.replacement

    @replacement.setter
    def replacement(self, replacement: Callable[[int], list[int]] | None) -> None:
        self._sequence.replacement = replacement

    @property
    def top_logprobs(self) -> int | None:
        return self._sequence.top_logprobs

    @top_logprobs.setter
    def top_logprobs(self, count: int | None) -> None:
        self._sequence.top_logprobs = count

    @property
    def prompt_logprobs(self) -> list[TokenLogprobs]:
        """Of a prompt that is scored; all of them once `prefill` is through."""
        return self._sequence.prompt_logprobs

    def score_prompt(self, first: int = 1, top: int = 0) -> None:
        """Before iteration: the prompt's ids from `first` on get their log probabilities, with those of the `top`
        likeliest ids. Nothing kept is used for them, since each id's logits are wanted.
        """
        self._sequence.score_prompt(first, top)

    def begin(self) -> None:
        """Joins what is computed, if it has not; the first look at it does the same."""
        if not self._begun:
            self._begun = True
            self._sequence.begin()
            self._scheduler.add(self._sequence)

    def close(self) -> None:
        """Nobody reads on: what was computed is given back."""
        self._scheduler.remove(self._sequence)

    def __del__(self) -> None:
        if self._begun:
            self.close()

    def prefill(self) -> Iterator[tuple[int, int]]:
        """Computes the prompt; yields (tokens done, tokens to do) after each chunk."""
        self.begin()
        sequence, told = self._sequence, 0
        while True:
            self._scheduler.wait(sequence, told)
            if sequence.prefilled > told:
                told = sequence.prefilled
                yield told, sequence.to_prefill
            elif sequence.outputs or sequence.over or self.cancel.is_set():
                break
        self._raise()

    def __iter__(self) -> Iterator[int]:
        self.begin()
        sequence = self._sequence
        try:
            while True:
                self._scheduler.wait(sequence)
                if self.cancel.is_set():
                    self.finish_reason = "cancelled"
                    return
                if not sequence.outputs:
                    break
                drawn = sequence.outputs.popleft()
                self.is_replaced = drawn.put_in
                if drawn.logprobs is not None:
                    self.logprobs.append(drawn.logprobs)
                self.ids.append(drawn.id)
                yield drawn.id
            self._raise()
            self.finish_reason, self.stop_id = sequence.finish_reason, sequence.stop_id
        finally:
            self.close()

    def _raise(self) -> None:
        if self._sequence.error is not None and not self._sequence.outputs:
            raise self._sequence.error
