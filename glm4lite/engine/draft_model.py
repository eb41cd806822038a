"""DraftModel: a smaller model of the same vocabulary writes on, and the large one verifies what it wrote in one step.

Speculative decoding (Leviathan et al. 2023) pays where a token of the large model takes many times as long as one of
the small: GLM-4-9B for the 32B whose layers come from disk or RAM. The small one guesses greedily; an id stays where it
is what the large one draws there, so answers are what they are without, sampled ones too. How far it guesses follows
from how often it was right when it was as sure, and from what both models' steps cost here.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from glm4lite.engine.prefix_pool import PrefixCache, PrefixPool
from glm4lite.engine.sequence import FEW, Sequence
from glm4lite.engine.speculation import Costs, Odds
from glm4lite.model.causal_lm import CausalLM
from glm4lite.model.step import Span

_SURENESS = 12  # classes of how likely the small model takes its guess to be
_UNKNOWN_COST = 0.2  # a step of the small model, as a part of the large one's, until both were measured
_MEMORY = 0.9  # weight of what was known beside a new measurement


@dataclass
class _Written:
    """What the small model has of one sequence: certain ids, then guesses, of which it computed all but the last."""

    cache: PrefixCache
    certain: int = 0
    guesses: list[tuple[int, int]] = field(default_factory=list)  # ids, and how sure it was


class DraftModel:
    """For the thread that steps the large model."""

    def __init__(self, model: CausalLM) -> None:
        self.model, self.prefixes = model, PrefixPool(model)
        self.odds = Odds(kind=int)
        self._written: WeakKeyDictionary[Sequence, _Written] = WeakKeyDictionary()
        self._seconds = 0.0  # of a step

    def follow(self, sequence: Sequence, end: int) -> None:
        """Computes what is next of the first `end` ids of a sequence, a chunk at most, for others wait meanwhile."""
        if end > self.model.context:
            return
        written = self._settled(sequence)
        if ids := sequence.ids[written.certain : min(written.certain + self.model.chunk, end)]:
            self._step({sequence: ids}, kept=0)
            written.certain = len(written.cache.ids)

    def propose(self, wanted: Mapping[Sequence, int], costs: Costs, rows: int) -> dict[Sequence, list[int]]:
        """Guesses at most as many ids for each sequence as stand with it, where they pay.

        `costs`: of the large model's steps; `rows`: of its next step, without guesses.
        """
        guesses: dict[Sequence, list[int]] = {sequence: [] for sequence in wanted}
        fitting = [one for one, most in wanted.items() if most and len(one.ids) + most <= self.model.context]
        open_ = dict.fromkeys(fitting, 1.0)  # how likely all guesses so far are right
        todo = {}
        for sequence in list(open_):
            missing = sequence.ids[self._settled(sequence).certain :]
            if len(missing) <= FEW:
                todo[sequence] = missing
            else:
                del open_[sequence]
                self.follow(sequence, len(sequence.ids) - 1)
        gained, spent = float(len(wanted)), costs.of(rows)
        while open_:
            if not self._pays(max(open_.values()), costs, rows, gained, spent):
                break
            began = time.perf_counter()
            drawn = self._drawn(self._step(todo, kept=1))
            if not drawn:
                break
            self._measure(time.perf_counter() - began)
            todo = {}
            for sequence, (token, sure) in drawn.items():
                open_[sequence] *= self.odds.of(sure)
                if not self._pays(open_[sequence], costs, rows, gained, spent):
                    del open_[sequence]
                    continue
                written = self._written[sequence]
                if not written.guesses:
                    written.certain = len(written.cache.ids)
                written.guesses.append((token, sure))
                guesses[sequence].append(token)
                rows, gained = rows + 1, gained + open_[sequence]
                todo[sequence] = [token]
                if len(guesses[sequence]) >= wanted[sequence]:
                    del open_[sequence], todo[sequence]
            spent = costs.of(rows) + self._cost(costs) * max(map(len, guesses.values()))
        return guesses

    def done(self, sequence: Sequence) -> None:
        """The sequence is over, or gives its memory to others."""
        written = self._written.pop(sequence, None)
        if written is not None:
            written.cache.settle()
            self.prefixes.give(written.cache)

    def _pays(self, chance: float, costs: Costs, rows: int, gained: float, spent: float) -> bool:
        """Whether one more guess that is right with this chance brings more for its time than the step does so far."""
        more = costs.of(rows + 1) - costs.of(rows) + self._cost(costs)
        return chance * spent > gained * more

    def _cost(self, costs: Costs) -> float:
        one = costs.seconds(1)
        return self._seconds / one if self._seconds and one else _UNKNOWN_COST

    def _measure(self, seconds: float) -> None:
        known = self._seconds or seconds
        self._seconds = _MEMORY * known + (1 - _MEMORY) * min(seconds, 2 * known)

    def _settled(self, sequence: Sequence) -> _Written:
        """What is written of a sequence, cut back to what became certain; learns from which guesses were right."""
        written = self._written.get(sequence)
        if written is None:
            in_use = [(other.cache, len(other.cache.ids)) for other in self._written.values()]
            cache = self.prefixes.take(sequence.ids, in_use)
            self.prefixes.extend(cache, sequence.ids, in_use)
            cache.keep_common_prefix(sequence.ids)
            written = self._written[sequence] = _Written(cache, len(cache.ids))
        ids, right = written.cache.ids, 0
        for place, (token, sure) in enumerate(written.guesses, written.certain):
            if place >= len(sequence.ids):
                break
            self.odds.add(sure, sequence.ids[place] == token)
            if sequence.ids[place] != token:
                break
            right += 1
        del ids[min(written.certain + right, len(sequence.ids) - 1) :]
        written.cache.settle()
        written.guesses, written.certain = [], len(ids)
        return written

    @torch.inference_mode()
    def _step(self, todo: Mapping[Sequence, list[int]], kept: int) -> dict[Sequence, Tensor]:
        """The logits of each; nothing where there is no memory."""
        caches = [(self._written[sequence].cache, ids) for sequence, ids in todo.items()]
        if not self.prefixes.reserve([(cache, len(cache.ids) + len(ids)) for cache, ids in caches]):
            return {}
        spans = []
        for sequence, ids in todo.items():
            cache = self._written[sequence].cache
            spans.append(Span(ids, cache.kv, kept))
        logits = self.model.step(spans)
        for sequence, ids in todo.items():
            self._written[sequence].cache.ids += ids
        return dict(zip(todo, logits, strict=True))

    def _drawn(self, logits: Mapping[Sequence, Tensor]) -> dict[Sequence, tuple[int, int]]:
        """The likeliest id of each, and how likely it is, as a class."""
        drawn = {}
        for sequence, rows in logits.items():
            row = rows[-1, : sequence.vocab_size].float()
            top, token = row.max(-1)
            sure = float((top - row.logsumexp(-1)).exp())
            drawn[sequence] = int(token), min(int(sure * _SURENESS), _SURENESS - 1) if sure == sure else 0
        return drawn
