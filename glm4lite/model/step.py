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
