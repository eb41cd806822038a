"""What to change so that a model fits: each proposal was placed before it is made."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any, TypeAlias

from glm4lite.base.sentences import Sentence
from glm4lite.base.sizes import enough, parse_size
from glm4lite.memory.budget import Budget
from glm4lite.memory.resources import Placement

Changes: TypeAlias = Mapping[str, Any]
"""quant, kv, context, ram, gpu_memory: what to give instead of what was given; sizes as text."""

STEP = 256
"""Tokens by which shorter contexts are tried."""

_PRECISIONS = ("float32", "bfloat16", "int8", "int4")  # by size
_LARGEST = 1 << 44  # bytes; no machine has more


@dataclass(frozen=True)
class Attempt:
    """A placement under changes; `quantize`: of the folder that `glm4lite quantize` writes in that precision.

    loss: what is expected to be lost, where each weight has its own bits.
    """

    placement: Placement
    quantize: str | None = None
    loss: float | None = None


Try: TypeAlias = Callable[[Changes], Attempt]


@dataclass(frozen=True)
class Proposal:
    """Changes under which it fits; `quantize_first`: once the weights lie in a folder in that precision."""

    changes: Changes
    quantize_first: str | None
    decode_tokens_per_s: float
    expected_loss: float | None = None

    def to_json(self) -> dict[str, Any]:
        speed = round(self.decode_tokens_per_s, 3)
        told = {} if self.expected_loss is None else {"expected_loss": round(self.expected_loss, 4)}
        return {**self.changes, "quantize_first": self.quantize_first, "decode_tokens_per_s": speed, **told}

    def said(self) -> Sentence:
        """As a command's options."""
        given = {name: value for name, value in self.changes.items() if name != "quant" or not self.quantize_first}
        options = " ".join(_option(name, value) for name, value in given.items())
        changes: str = options
        if self.quantize_first:
            quant = _option("quant", self.quantize_first)
            folder = Sentence("the folder of `glm4lite quantize {options}`", options=quant)
            changes = Sentence("{folder} with {options}", folder=folder, options=options) if options else folder
        speed = f"{self.decode_tokens_per_s:.2f}"
        if self.expected_loss is None:
            return Sentence("{changes}: about {speed} tokens/s", changes=changes, speed=speed)
        told = {"changes": changes, "speed": speed, "loss": f"{self.expected_loss:.3f}"}
        return Sentence("{changes}: about {speed} tokens/s, expected loss {loss}", **told)


def _option(name: str, value: object) -> str:
    """As it is given to a command."""
    if name == "quant" and str(value).endswith(" bits"):
        name, value = "bits", str(value).removesuffix(" bits")
    return f"--{name.replace('_', '-')} {value}"


def proposals(attempt: Try, quants: tuple[str, ...], placed: Placement, budget: Budget) -> Iterator[Proposal]:
    """The smallest sets of changes that fit, and how much RAM or GPU memory would do instead.

    quants: the smaller precisions that it can have, the largest first; placed: what did not fit within the budget.
    """
    choices: dict[str, tuple[Any, ...]] = {
        "quant": quants,
        "kv": ("int8",) if placed.kv == "float" else (),
        "context": tuple(range((placed.context - 1) // STEP * STEP, 0, -STEP)),
        "gpu_memory": (0,) if budget.gpu_memory else (),
    }
    found: list[frozenset[str]] = []
    for size in (1, 2, 3):
        for names in map(frozenset, combinations(choices, size)):
            if any(smaller <= names for smaller in found):
                continue
            proposal = _largest(attempt, {name: choices[name] for name in choices if name in names})
            if proposal is not None:
                found.append(names)
                yield proposal
    for name in ("ram", *(["gpu_memory"] if budget.gpu_memory != 0 else [])):
        least = _least(attempt, name)
        if least is not None:
            yield least
        if least is not None and least.quantize_first and (plainly := _least(attempt, name, plainly=True)):
            yield plainly


def all_in_memory(attempt: Try, quants: tuple[str, ...]) -> Proposal | None:
    """The most bits with which no layer lies on disk; None where there are none."""

    def held(quant: str) -> bool:
        placement = attempt({"quant": quant}).placement
        return placement.fits and not placement.share("disk").layers

    if not quants or not held(quants[-1]):
        return None
    low, high = 0, len(quants) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if held(quants[middle]) else (middle + 1, high)
    return _proposal(attempt, {"quant": quants[high]})


def smaller_quants(quant: str) -> tuple[str, ...]:
    """The precisions that take less memory than this one; () where it is none of those that can be chosen among."""
    if quant not in _PRECISIONS:
        return ()
    return tuple(name for name in _PRECISIONS[_PRECISIONS.index(quant) + 1 :] if name.startswith("int"))


def _largest(attempt: Try, choices: Mapping[str, tuple[Any, ...]]) -> Proposal | None:
    """With the first value of each choice that fits together with the others' smallest; all get smaller to the end."""
    if not all(choices.values()):
        return None
    changes = {name: values[-1] for name, values in choices.items()}
    if not attempt(changes).placement.fits:
        return None
    for name, values in choices.items():
        low, high = 0, len(values) - 1  # values[high] fits
        while low < high:
            middle = (low + high) // 2
            if attempt({**changes, name: values[middle]}).placement.fits:
                high = middle
            else:
                low = middle + 1
        changes[name] = values[high]
    return _proposal(attempt, changes)


def _least(attempt: Try, name: str, plainly: bool = False) -> Proposal | None:
    """The smallest size with which it fits, as it may be given; `plainly`: as it is loaded, without a folder before."""

    def fits(size: int) -> bool:
        made = attempt({name: size})
        return made.placement.fits and not (plainly and made.quantize)

    high = 1 << 28
    while not fits(high):
        high *= 2
        if high > _LARGEST:
            return None
    low = high // 2
    while high - low > 1 << 20:
        middle = (low + high) // 2
        if fits(middle):
            high = middle
        else:
            low = middle
    return _proposal(attempt, {name: enough(high)})


def _proposal(attempt: Try, changes: Changes) -> Proposal | None:
    sizes = {name: parse_size(changes[name]) for name in ("ram", "gpu_memory") if isinstance(changes.get(name), str)}
    made = attempt({**changes, **sizes})
    placed = made.placement
    return Proposal(changes, made.quantize, placed.decode_tokens_per_s, made.loss) if placed.fits else None
