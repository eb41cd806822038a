"""Token ids in, token ids out: chunked prefill over the kept prefix, then one token at a time.

Nothing here knows text; sessions turn ids into text and events.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from copy import copy
from dataclasses import dataclass

import torch

from glm4lite.base.errors import ContextLengthError, DeviceError
from glm4lite.engine.sampling import Sampler, SamplingParams
from glm4lite.engine.speculation import MOST, Drafts, Speculation
from glm4lite.model.causal_lm import CausalLM
from glm4lite.runtime.out_of_memory import ran_out


class PrefixCache:
    """A KVCache and the ids it was computed from, so that the next prompt only pays for what is new."""

    def __init__(self, model: CausalLM) -> None:
        self.kv = model.new_cache()
        self.ids: list[int] = []

    def common_prefix(self, ids: list[int]) -> int:
        """Length of the longest common prefix with `ids` (short of its last id, which must be computed)."""
        length, limit = 0, min(len(self.ids), len(ids) - 1)
        while length < limit and self.ids[length] == ids[length]:
            length += 1
        return length

    def keep_common_prefix(self, ids: list[int]) -> int:
        """Cuts back to the longest common prefix with `ids`."""
        length = self.common_prefix(ids)
        self._cut(length)
        return length

    def copy(self, length: int) -> PrefixCache:
        """Another one with the first `length` ids."""
        made = copy(self)
        made.kv, made.ids = self.kv.copy(length), self.ids[:length]
        return made

    def _cut(self, length: int) -> None:
        self.kv.truncate(length)
        del self.ids[length:]

    def settle(self) -> None:
        """After a forward pass that was stopped half-way, or of guesses: keep what every layer has and `ids` names."""
        self._cut(min(self.kv.get_seq_length(), len(self.ids)))


@dataclass(frozen=True)
class TokenLogprobs:
    """A new token's log probability as the model gave it (before temperature and the like), and the likeliest ids'."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class _Stopped(Exception):
    """Raised between the layers when generation is cancelled; never leaves this module."""


class Generation:
    """One answer in ids. Iterate `prefill()` for progress, then the object itself for new ids (stop ids are not given).

    After iteration: `finish_reason` is "stop" (a stop id came), "length" or "cancelled"; `new_tokens` counts all ids
    drawn, the stop id included; `stop_id` is the one that came; `prefilled_tokens` were not in the kept prefix.
    Raises ContextLengthError at once when the prompt leaves no room in the model's context.

    May be set before iteration: `constraint`, which is given each drawn id and its logits and returns the id to take;
    `replacement`, which is given each drawn id first and returns ids to take in its place, all of them, or none;
    `top_logprobs`, with which `logprobs` gets an entry for each drawn id, stop ids left out.
    `is_replaced`: whether the id that was given last came from `replacement`.
    """

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
    ) -> None:
        """`vocab_size`: ids the tokenizer knows; the padded rest of the model's vocabulary is never drawn.

        `speculation`: guesses ids, which changes how long it takes, not what comes; None: nothing is guessed.
        """
        context = model.context
        if not prompt:
            raise ContextLengthError("the prompt is empty: there is nothing to go on from")
        if len(prompt) >= context:
            raise ContextLengthError(
                "the prompt has {tokens} tokens and the model's context is {context}; "
                "shorten the conversation or start a new one",
                tokens=str(len(prompt)),
                context=str(context),
            )
        self.model, self.prompt, self.params = model, prompt, params
        self.stop_ids = frozenset(stop_ids)
        self.vocab_size = min(vocab_size or model.config.vocab_size, model.config.vocab_size)
        self.cache = cache or PrefixCache(model)
        self.cancel = cancel or threading.Event()
        self.constraint: Callable[[int, torch.Tensor], int] | None = None
        self.replacement: Callable[[int], list[int]] | None = None
        self.is_replaced = False
        self.top_logprobs: int | None = None
        self.logprobs: list[TokenLogprobs] = []
        self.limit = min(params.max_new_tokens or context, context - len(prompt))
        self.ids: list[int] = []
        self.finish_reason = "length"
        self.stop_id: int | None = None
        self.prefilled_tokens = 0
        self.seconds = 0.0  # spent on new tokens, prefill not counted
        self.drafts = Drafts(speculation, prompt) if speculation is not None else None
        self._began, self._rows = 0.0, 0  # when the last step began, and of how many ids it was
        self._prefilled = False
        self._logits: torch.Tensor | None = None  # of the next id
        self._guessed: list[tuple[int, torch.Tensor]] = []  # ids computed behind it, each with the next one's

    @property
    def new_tokens(self) -> int:
        return len(self.ids) + (self.stop_id is not None)

    def prefill(self) -> Iterator[tuple[int, int]]:
        """Computes the prompt; yields (tokens done, tokens to do) after each chunk."""
        self._prefilled = True
        start = self.cache.keep_common_prefix(self.prompt)
        todo = self.prompt[start:]
        step = self.model.chunk
        for begin in range(0, len(todo), step):
            chunk = todo[begin : begin + step]
            if not self._forward(chunk):
                return
            self.prefilled_tokens += len(chunk)
            yield self.prefilled_tokens, len(todo)

    def __iter__(self) -> Iterator[int]:
        if not self._prefilled:
            for _ in self.prefill():
                pass
        sampler, seen, started = Sampler(self.params), list(self.prompt), time.perf_counter()
        while self._logits is not None and not self.cancel.is_set():
            token = sampler(self._logits, seen)
            self._measured()
            taken = self.replacement(token) if self.replacement is not None else []
            self.is_replaced = bool(taken)
            if not taken:
                token = self.constraint(token, self._logits) if self.constraint is not None else token
                taken = [token]
            self.seconds = time.perf_counter() - started
            if not self.is_replaced and token in self.stop_ids:
                self.finish_reason, self.stop_id = "stop", token
                return
            if len(self.ids) + len(taken) > self.limit:
                return
            if self.top_logprobs is not None and not self.is_replaced:
                self.logprobs.append(_logprobs(self._logits, token, self.top_logprobs))
            for token in taken:
                self.ids.append(token)
                seen.append(token)
                yield token
            if len(self.ids) >= self.limit:
                return
            self._step(taken)
        self.finish_reason = "cancelled"

    def _step(self, ids: list[int]) -> None:
        """Computes ids that were taken, and what is guessed to follow; nothing where a guess was right."""
        if self.drafts is None:
            self._forward(ids)
            return
        for token in ids:
            self.drafts.take(token)
        if len(ids) == 1 and self._guessed and self._guessed[0][0] == ids[0]:
            self._logits = self._guessed.pop(0)[1]
            self.cache.ids += ids
            self.drafts.accepted += 1
            return
        left = min(self.limit - len(self.ids), self.model.context - len(self.cache.ids) - len(ids)) - 1
        draft = self.drafts.next(min(left, MOST + 1 - len(ids)))  # ids that were put in take rows of the step, too
        self._began, self._rows = time.perf_counter(), len(ids) + len(draft)
        self._forward(ids, draft)

    def _measured(self) -> None:
        """The step is over when an id was drawn from it: a GPU still computes when `_forward` comes back."""
        if self.drafts is not None and self._rows:
            self.drafts.measured(self._rows, time.perf_counter() - self._began)
            self._rows = 0

    @torch.inference_mode()
    def _forward(self, ids: list[int], draft: Sequence[int] = ()) -> bool:
        """Adds ids to the cache and keeps the last position's logits, and a draft's; False when it was cancelled.

        A draft's keys and values lie behind what the cache is known to hold, until they are taken or written over.
        """
        self._logits, self._guessed = None, []
        self.cache.settle()
        inputs, kept = torch.tensor([[*ids, *draft]], device=self.model.device), 1 + len(draft)
        try:
            self.model.model.interrupt = self._stop_if_cancelled
            output = self.model(inputs, past_key_values=self.cache.kv, logits_to_keep=kept, use_cache=True)
        except BaseException as error:
            self.cache.settle()
            if isinstance(error, _Stopped):
                return False
            failure = _device_failure(error, len(self.cache.ids) + len(ids))
            if failure is not None:
                raise failure from error
            raise
        finally:
            self.model.model.interrupt = None
        self.cache.ids += ids
        logits = output.logits[0, -kept:, : self.vocab_size].float()
        self._logits = logits[0]
        self._guessed = list(zip(draft, logits[1:], strict=True))
        return True

    def _stop_if_cancelled(self) -> None:
        if self.cancel.is_set():
            raise _Stopped


def _logprobs(logits: torch.Tensor, token: int, count: int) -> TokenLogprobs:
    logprobs = logits.log_softmax(-1)
    values, ids = logprobs.topk(count)
    return TokenLogprobs(token, float(logprobs[token]), tuple(zip(ids.tolist(), values.tolist(), strict=True)))


def _device_failure(error: BaseException, tokens: int) -> DeviceError | None:
    """What a user is told where a device gave out; None where the error is another one."""
    if where := ran_out(error):
        return DeviceError(
            "{where} ran out at {tokens} tokens; shorten the conversation, or load with kv int8",
            where=where,
            tokens=str(tokens),
        )
    if isinstance(error, getattr(torch, "AcceleratorError", ())):
        why = str(error).partition("\n")[0][:200]
        return DeviceError(f"the GPU failed ({why}); start again, or use --device cpu")
    return None
