"""A step: new ids of several sequences that go through the model in one pass, each with a cache of its own.

logits = model.step([Span([5], cache), Span(prompt[:512], other, kept=0)])
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from glm4lite.model.attention import SpanVisibility, Visibility
from glm4lite.model.cache import HomeCaches, KVCache, SpanCaches
from glm4lite.model.lora import BASE, Rows


class Scored(NamedTuple):
    """Rows of a span whose logits are looked at and not kept."""

    rows: range
    take: Callable[[int, Tensor], None]
    """Given their logits slice by slice: the first row's number, float32 [few, vocabulary]; again, for a step that is
    made again."""


class Span(NamedTuple):
    """One sequence's part of a step."""

    ids: Sequence[int]
    """Its new ids, at least one."""
    cache: KVCache
    """What it has computed so far, of a batch of one; extended in place."""
    kept: int = 1
    """Logits of so many of its last ids are wanted; 0: none, a chunk of a prompt that is not the last."""
    scored: Scored | None = None
    """Rows before the kept ones, for a prompt whose own ids' probabilities are wanted."""
    adapter: int = BASE
    """The number of the adapter that its rows take, of those that requests may choose (`Trunk.adapters`)."""

    @property
    def looked_at(self) -> int:
        """How many rows are scored."""
        return 0 if self.scored is None else len(self.scored.rows)


class Step:
    """Spans as the layers take them: one behind the other, as if they were one sequence. One alone is that."""

    def __init__(self, spans: Sequence[Span]) -> None:
        """Raises ValueError where they are no step."""
        if problem := _problem(spans):
            raise ValueError(problem)
        self._spans = spans
        self._rows = [len(span.ids) for span in spans]
        self._pasts = [span.cache.get_seq_length() for span in spans]

    def reserve(self) -> None:
        """Room for the new ids of all in their caches, or of none."""
        try:
            for span in self._spans:
                span.cache.reserve(len(span.ids))
        except BaseException:
            for span in self._spans:
                span.cache.truncate(span.cache.get_seq_length())
            raise

    @property
    def ids(self) -> list[int]:
        return [new for span in self._spans for new in span.ids]

    @property
    def positions(self) -> Tensor:
        """[1, rows]: those of each sequence count on from its cache."""
        each = zip(self._pasts, self._rows, strict=True)
        return torch.cat([torch.arange(past, past + rows) for past, rows in each])[None]

    @property
    def kept(self) -> list[int]:
        """The rows whose states are wanted: of each span those that are scored, then those that are kept."""
        rows = list[int]()
        for span, end in zip(self._spans, accumulate(self._rows), strict=True):
            begin = end - len(span.ids)
            rows += [begin + row for row in (span.scored.rows if span.scored else ())]
            rows += range(end - span.kept, end)
        return rows

    @property
    def adapters(self) -> list[Rows]:
        """Of the rows."""
        return [(rows, span.adapter) for rows, span in zip(self._rows, self._spans, strict=True)]

    @property
    def caches(self) -> Sequence[HomeCaches]:
        """Of each layer."""
        if len(self._spans) == 1:
            return self._spans[0].cache.layers
        return [SpanCaches(parts) for parts in zip(*(span.cache.layers for span in self._spans), strict=True)]

    def visibility(self, device: torch.device) -> Visibility:
        each = zip(self._pasts, self._rows, strict=True)
        parts = [Visibility(None, past, rows, device) for past, rows in each]
        return parts[0] if len(parts) == 1 else SpanVisibility(parts, device)


def _problem(spans: Sequence[Span]) -> str:
    for span in spans:
        if not span.ids:
            return "a span has no ids"
        if not 0 <= span.kept <= len(span.ids):
            return f"a span of {len(span.ids)} ids cannot have {span.kept} of them kept"
        if span.scored and span.scored.rows and span.scored.rows[-1] >= len(span.ids) - span.kept:
            return "a span's scored rows come before its kept ones"
    return "two spans of a step share a cache" if len({id(span.cache) for span in spans}) < len(spans) else ""
