"""Scheduler: which sequences compute what in the next step, and the step itself.

Every running sequence gets its next id from each step (continuous batching, Yu et al. 2022), beside at most one part of
one prompt, which is as long as others can wait for it. Reading the weights takes most of a step, however many rows go
through them, so several answers at once cost little more time than one. A sequence whose keys and values find no room
waits, or gives its own up and is computed again later; none is cut.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable

import torch

from glm4lite.base.errors import DeviceError, one_line
from glm4lite.engine.draft_model import DraftModel
from glm4lite.engine.prefix_pool import PrefixCache, PrefixPool
from glm4lite.engine.sequence import FEW, Sequence
from glm4lite.engine.speculation import Speculation
from glm4lite.model.causal_lm import CausalLM
from glm4lite.model.step import Span
from glm4lite.runtime.out_of_memory import ran_out

logger = logging.getLogger("glm4lite")

PARALLEL = 4  # sequences computed at once by default
PATIENCE_S = 1.0  # how long a part of a prompt may take while others wait for their next ids
_FIRST_PART = 64  # ids of such a part before it is known how long they take
_LEAST_PART = 16
_PASSED_OVER = 3  # parts of shorter prompts that may go before those of one that came first
_POLL_S = 0.1  # how often a thread that waits looks whether its sequence was cancelled


class _Stopped(Exception):
    """Raised between the layers when nobody wants what is computed; never leaves this module."""


class Scheduler:
    """The sequences of one model, and the steps that compute them.

    Whoever waits for a sequence makes the steps, for all, unless `wake` is set: then another thread does
    (EngineWorker), which is woken by that. The model is used by one thread at a time in any case.
    """

    def __init__(
        self,
        model: CausalLM,
        prefixes: PrefixPool | None = None,
        parallel: int = PARALLEL,
        speculation: Speculation | None = None,
        draft: DraftModel | None = None,
    ) -> None:
        """`prefixes`: where caches come from and go to; None: each sequence brings its own, and memory is not counted.

        `parallel`: most sequences computed at once. `draft`: guesses where `speculation` finds nothing.
        """
        self.model, self.prefixes, self.parallel = model, prefixes, parallel
        self.speculation, self.draft = speculation, draft
        self.wake: Callable[[], None] | None = None
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.preempted, self.steps, self.busy_s = 0, 0, 0.0  # so far
        self._changed = threading.Condition()
        self._stepping: int | None = None  # the thread whose turn it is
        self._computing: list[tuple[Sequence, Span]] = []
        self._passed_over = 0
        self._rate = 0.0  # ids of a prompt a second

    @property
    def busy(self) -> bool:
        """Whether there is anything to compute."""
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        """Computes it from now on, or as soon as there is room."""
        with self._changed:
            self.waiting.append(sequence)
        if self.wake is not None:
            self.wake()

    def remove(self, sequence: Sequence) -> None:
        """Nobody waits for it any more; what was computed of it is kept for the next prompt."""
        with self._changed:
            sequence.abandoned = True
            if self._take_turn():
                self._end_turn()
        if self.wake is not None:
            self.wake()

    def wait(self, sequence: Sequence, prefilled: int | None = None) -> None:
        """Until it has an output, is over or cancelled, or more than `prefilled` ids of its prompt are computed."""

        def ready() -> bool:
            further = prefilled is not None and sequence.prefilled > prefilled
            return bool(sequence.outputs) or sequence.over or further or sequence.cancel.is_set()

        while not ready():
            if self.wake is None and self._take_turn(anew=True):
                try:
                    self._step()
                finally:
                    self._end_turn()
            else:
                with self._changed:
                    self._changed.wait_for(lambda: ready() or (self.wake is None and self._stepping is None), _POLL_S)

    def step(self) -> None:
        """One step for all, for the thread that was chosen to make them."""
        if not self._take_turn(anew=True):
            with self._changed:
                self._changed.wait_for(lambda: self._stepping is None, _POLL_S)
            return
        try:
            self._step()
        except Exception as error:  # nobody else would tell those who wait
            for sequence in [*self.running, *self.waiting]:
                sequence.fail(error)
        finally:
            self._end_turn()

    def _take_turn(self, anew: bool = False) -> bool:
        """`anew`: for who cannot be in a turn of his own: one that Ctrl-C kept him from ending is over."""
        with self._changed:
            me = threading.get_ident()
            if self._stepping is not None and not (anew and self._stepping == me):
                return False
            self._stepping = me
            return True

    def _end_turn(self) -> None:
        with self._changed:
            try:
                self._sort_out()
            finally:
                self._stepping = None
                self._changed.notify_all()

    def _step(self) -> None:
        began = time.perf_counter()
        with self._changed:
            self._sort_out()
            admitted = self._admit()
        for sequence in admitted:  # outside the lock, as what a draft model computes: a disk may take long
            self._look_on_disk(sequence)
        with self._changed:
            batch, prompt = self._compose()
        if not batch:
            return
        self._guess([sequence for sequence, _ in batch], prompt)
        guessed = time.perf_counter()
        spans = [(sequence, sequence.span(most)) for sequence, most in batch]
        part = sum(len(span.ids) for sequence, span in spans if sequence is prompt)
        if not self._compute(spans):
            return
        ended = time.perf_counter()
        self.steps += 1
        self.busy_s += ended - began
        if part:
            rate = part / (ended - began)
            self._rate = rate if not self._rate else 0.7 * self._rate + 0.3 * rate
        elif self.speculation is not None:
            self.speculation.costs.add(sum(len(span.ids) for _, span in spans), ended - guessed)

    def _sort_out(self) -> None:
        """Takes those out that are over, or that nobody wants, and keeps what they computed."""
        for sequence in [*self.running, *self.waiting]:
            if sequence.cancel.is_set() or sequence.abandoned:
                sequence.end("cancelled")
        for sequence in [one for one in self.running if one.over]:
            self.running.remove(sequence)
            self._keep(sequence)
        for sequence in [one for one in self.waiting if one.over]:
            self.waiting.remove(sequence)

    def _keep(self, sequence: Sequence) -> None:
        sequence.settle()
        if self.prefixes is not None and sequence.cache is not None:
            self.prefixes.give(sequence.cache)
            sequence.give_up()
        if self.draft is not None:
            self.draft.done(sequence)
        if sequence.drafts is not None:
            sequence.drafts.done()

    def _admit(self) -> list[Sequence]:
        """Those who came first, while there is room; returns them."""
        admitted = list[Sequence]()
        while self.waiting and len(self.running) < self.parallel:
            sequence = self.waiting[0]
            if self.prefixes is not None and sequence.cache is None:
                known = sequence.reusable
                more = len(sequence.ids) - len(known) + FEW
                if self.running and not self.prefixes.fits(known, more, self._in_use(), sequence.adapter):
                    break
                sequence.cache = self.prefixes.take(known, self._in_use(), sequence.adapter)
            sequence.admit(sequence.cache or PrefixCache(self.model.new_cache(), sequence.adapter))
            self._share(sequence)
            self.running.append(self.waiting.popleft())
            admitted.append(sequence)
        return admitted

    def _look_on_disk(self, sequence: Sequence) -> None:
        """What was kept of its beginning, where that is more than memory has."""
        if self.prefixes is not None and (cache := sequence.cache) is not None:
            self.prefixes.extend(cache, sequence.reusable, [one for one in self._in_use() if one[0] is not cache])
            sequence.admit(cache)

    def _compose(self) -> tuple[list[tuple[Sequence, int]], Sequence | None]:
        """Who computes how many ids at most in the next step, and whose prompt one part of them is."""
        for sequence in self.running:
            sequence.settle()
        batch = [(sequence, FEW) for sequence in self.running if sequence.todo <= FEW]
        prompts = [sequence for sequence in self.running if sequence.todo > FEW]
        prompt = self._next_prompt(prompts)
        if prompt is not None:
            self._share(prompt)
            batch.append((prompt, self._part(prompt, shared=len(self.running) > 1)))
        batch = self._make_room(batch)
        return batch, prompt if prompt in self.running else None

    def _guess(self, sequences: list[Sequence], prompt: Sequence | None) -> None:
        """What may follow, where the rows of a prompt do not make a step dear already."""
        rows = sum(sequence.todo for sequence in sequences)
        if prompt is None:
            for sequence in sequences:
                rows += sequence.look_up(len(sequences), rows)
        if self.draft is None or self.speculation is None:
            return
        try:
            if prompt is not None:
                self.draft.follow(prompt, prompt.cached)
                return
            wanted = {sequence: sequence.room for sequence in sequences if not sequence.guessed}
            for sequence, ids in self.draft.propose(wanted, self.speculation.costs, rows).items():
                sequence.guess(ids)
        except Exception as error:
            self.draft = None
            logger.warning("the draft model failed (%s): answers go on without it", one_line(error))

    def _next_prompt(self, prompts: list[Sequence]) -> Sequence | None:
        """The shortest first: it delays the others little; but none is passed over for long."""
        if not prompts:
            self._passed_over = 0
            return None
        first, shortest = prompts[0], min(prompts, key=lambda sequence: sequence.todo)
        chosen = first if self._passed_over >= _PASSED_OVER else shortest
        self._passed_over = 0 if chosen is first else self._passed_over + 1
        return chosen

    def _share(self, prompt: Sequence) -> None:
        """Copies what another one has of the same beginning: a system prompt of several clients is computed once."""
        others = [one.cache for one in self.running if one is not prompt and one.cache is not None]
        known, adapter = prompt.reusable, prompt.adapter
        best = max(others, key=lambda cache: cache.common_prefix(known, adapter), default=None)
        if best is None or (shared := best.common_prefix(known, adapter)) <= prompt.cached:
            return
        copied = best.copy(shared) if self.prefixes is None else self.prefixes.copied(best, shared, self._in_use())
        if copied is not None:
            prompt.admit(copied)

    def _part(self, prompt: Sequence, shared: bool) -> int:
        """Ids of a prompt for one step. Up to half a part more is taken along: a step of its own costs as much time."""
        if not shared:
            return self.model.chunk
        ids = int(self._rate * PATIENCE_S) // _LEAST_PART * _LEAST_PART if self._rate else _FIRST_PART
        ids = max(ids, _LEAST_PART)
        return min(prompt.todo if prompt.todo <= ids + ids // 2 else ids, self.model.chunk)

    def _make_room(self, batch: list[tuple[Sequence, int]]) -> list[tuple[Sequence, int]]:
        """The batch, without sequences that had to give their room to those that came before them."""
        if self.prefixes is None:
            return batch
        while not self.prefixes.reserve(self._in_use()) and len(self.running) > 1:
            last = self.running.pop()
            self.prefixes.drop(last.held())
            last.give_up()
            if self.draft is not None:
                self.draft.done(last)
            self.waiting.appendleft(last)
            self.preempted += 1
        return [(sequence, most) for sequence, most in batch if sequence in self.running]

    def _in_use(self) -> list[tuple[PrefixCache, int]]:
        """The caches of all that run; the whole prompt's room is kept for it, and that of a guess."""
        caches = [(sequence.cache, len(sequence.ids) + FEW) for sequence in self.running]
        return [(cache, ids) for cache, ids in caches if cache is not None]

    def _compute(self, batch: list[tuple[Sequence, Span]]) -> bool:
        """Makes the step; whether it was made at once, so that its time says something.

        Where it fails, each sequence goes alone, so that only the one that asks too much is told.
        """
        self._computing = batch
        trunk = self.model.model
        trunk.interrupt = self._stop_if_unwanted
        try:
            logits = self.model.step([span for _, span in batch])
        except BaseException as error:
            for sequence, _ in batch:
                sequence.settle()
            if isinstance(error, _Stopped):
                return False
            if not isinstance(error, Exception) and self.wake is None:
                raise  # Ctrl-C, where whoever waits computes
            if len(batch) > 1:
                for one in batch:
                    self._compute([one])
                return False
            sequence, span = batch[0]
            failure = _device_failure(error, len(span.ids) + sequence.cached)
            if failure is not None:
                failure.__cause__ = error
            sequence.fail(failure or error)
            return False
        finally:
            trunk.interrupt, self._computing = None, []
        for (sequence, _), rows in zip(batch, logits, strict=True):
            try:
                with torch.inference_mode():
                    sequence.computed(rows)
            except BaseException as error:  # of one sequence's constraint, say: the others go on
                sequence.settle()
                sequence.fail(error)
                if not isinstance(error, Exception) and self.wake is None:
                    raise
        return True

    def _stop_if_unwanted(self) -> None:
        """Where most of a step is for those who left, the rest is computed anew sooner than it would be finished."""
        rows = [(len(span.ids), one.cancel.is_set() or one.abandoned) for one, span in self._computing]
        if 2 * sum(count for count, gone in rows if gone) >= sum(count for count, _ in rows):
            raise _Stopped


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
