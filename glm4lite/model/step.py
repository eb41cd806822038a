"""A step: new ids of several sequences that go through the model in one pass, each with a cache of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from glm4lite.model.cache import KVCache


class Span(NamedTuple):
    """One sequence's part of a step."""

    ids: Sequence[int]
    """Its new ids, at least one."""
    cache: KVCache
    """What it has computed so far, of a batch of one; extended in place."""
    kept: int = 1
    """Logits of so many of its last ids are wanted; 0: none, a chunk of a prompt that is not the last."""


def spans_problem(spans: Sequence[Span]) -> str:
    """Why these are no step, "" where they are."""
    for span in spans:
        if not span.ids:
            return "a span has no ids"
        if not 0 <= span.kept <= len(span.ids):
            return f"a span of {len(span.ids)} ids cannot have {span.kept} of them kept"
    return "two spans of a step share a cache" if len({id(span.cache) for span in spans}) < len(spans) else ""
