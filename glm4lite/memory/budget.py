"""What a user allows a model: memory, context, the cache's type. Planning and loading read it the same way."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import cast

from glm4lite.base.errors import ConfigError
from glm4lite.base.sizes import parse_size
from glm4lite.memory.placement import place
from glm4lite.memory.resources import Machine, Placement, Requirements
from glm4lite.model.packed_cache import KVType

logger = logging.getLogger("glm4lite")

DEFAULT_CONTEXT = 8192
"""Tokens that a budget has room for where none are asked for."""

KV_TYPES = ("auto", "float", "int8")

Size = int | str | None
"""Bytes, or text such as "8GiB"; None: what is free."""


@dataclass(frozen=True)
class Budget:
    """Bytes of each GPU and of RAM (None: what is free), tokens of context (None: 8192 or the model's), the cache.

    RAM is what the process holds itself; pages of mapped files are not in it. kv "auto" is a float cache, or an int8
    one where that keeps layers from the disk or alone makes the model fit.
    """

    gpu_memory: int | None = None
    ram: int | None = None
    context: int | None = None
    kv: str = "auto"

    def __post_init__(self) -> None:
        if self.kv not in KV_TYPES:
            raise ConfigError(f"kv is {self.kv!r}; use {', '.join(KV_TYPES[:-1])} or {KV_TYPES[-1]}")
        if self.context is not None and (type(self.context) is not int or self.context < 1):
            raise ConfigError(f"the context is {self.context!r}; use a number of tokens, at least 1")
        if any(size is not None and (type(size) is not int or size < 0) for size in (self.gpu_memory, self.ram)):
            raise ConfigError("a memory budget is a number of bytes, or a text such as '8GiB'")

    @classmethod
    def of(
        cls,
        gpu_memory: Size = None,
        ram: Size = None,
        context: int | str | None = None,
        kv: str = "auto",
    ) -> Budget:
        """Sizes as numbers of bytes or as text ("8GiB"), the context too; ConfigError for what is none."""
        gpu, held = (parse_size(size) if isinstance(size, str) else size for size in (gpu_memory, ram))
        return cls(gpu, held, _tokens(context) if isinstance(context, str) else context, kv)

    @property
    def limits(self) -> bool:
        """Whether anything but the cache's type was asked for."""
        return not (self.gpu_memory is None and self.ram is None and self.context is None)


def _tokens(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text[:20]) < 1:
        raise ConfigError(f"the context is {text[:100]!r}; use a whole number of tokens of at least 1")
    return int(text[:20])


def place_within(needs: Requirements, machine: Machine, budget: Budget) -> Placement:
    """The placement that a budget asks for; `placement.kv` says which cache "auto" became.

    Raises:
        ContextLengthError: the model's context is shorter than what is asked for.
    """
    context = budget.context or min(DEFAULT_CONTEXT, needs.config.context_length)

    def with_cache(kv: KVType) -> Placement:
        return place(needs, machine, context=context, kv=kv, gpu_memory=budget.gpu_memory, ram=budget.ram)

    placement = with_cache("float" if budget.kv == "auto" else cast(KVType, budget.kv))
    on_disk = placement.share("disk").layers
    if budget.kv == "auto" and (not placement.fits or on_disk):
        smaller = with_cache("int8")
        if not placement.fits or len(smaller.share("disk").layers) < len(on_disk):
            return smaller
    return placement
