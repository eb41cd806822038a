"""Which codec each module gets, where bits a weight or bytes of memory are asked for: the least loss that fits.

    aim = Aim.of(bits=3.5)                        # or fit="12GiB"
    choice = choose(prepared, aim, text, progress)   # measures, then chooses
    choice.prepared.plan                                # in which each weight has its codec

Bits are counted over all weights that are quantized, embedding and head included: bytes of codes, of scales and minima
and of the rows' scales, with the padding to whole tiles, times 8, by the number of weights. Memory is counted as
`glm4lite plan` counts it: all weights, the cache of a context, what computing takes.

Each module's candidates are a curve of loss by bytes. Whatever Lagrange's multiplier is, what minimizes loss +
multiplier * bytes lies on the lower hull of each curve; so the hulls' edges are taken by their slopes, the steepest
first, until nothing fits any more, and what is left over goes to whatever loses most.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from glm4lite.base.errors import ConfigError
from glm4lite.base.sizes import enough, parse_size, readable
from glm4lite.checkpoint.calibration_text import calibration_ids
from glm4lite.checkpoint.load_plan import Fill, LoadPlan, make_load_plan
from glm4lite.checkpoint.prepare import Prepared
from glm4lite.checkpoint.quant_choice import empty_weight
from glm4lite.checkpoint.sensitivity import Losses, measured
from glm4lite.checkpoint.streaming import Meter, ProgressCallback, loading_bytes
from glm4lite.memory.budget import DEFAULT_CONTEXT, Budget, Size
from glm4lite.memory.placement import place
from glm4lite.memory.resources import Machine, Requirements
from glm4lite.model.causal_lm import CausalLM
from glm4lite.model.layers import layer_of
from glm4lite.model.packed_cache import KVType
from glm4lite_quant import Codec, QuantConfig

logger = logging.getLogger("glm4lite")

LEAST, MOST = 2, 8.5
"""Bits that may be asked for."""

_CODECS = tuple(
    Codec(bits, group)
    for bits, groups in ((2, (32,)), (3, (128, 64, 32)), (4, (128, 64, 32)), (5, (64, 32)), (6, (64, 32)), (8, (32,)))
    for group in groups
)


@dataclass(frozen=True)
class Aim:
    """What is asked for: bits a weight on average, or bytes of memory for all of a model, with what `budget` says of
    its context and cache. loads: the model is quantized while it loads, which takes memory too.

    Raises ConfigError for what nothing can be chosen for.
    """

    bits: float | None = None
    fit: int | None = None
    budget: Budget = field(default_factory=Budget)
    loads: bool = False

    def __post_init__(self) -> None:
        if (self.bits is None) == (self.fit is None):
            raise ConfigError("bits and fit contradict each other; give bits a weight, or the memory to fit")
        if self.bits is not None and not LEAST <= self.bits <= MOST:
            raise ConfigError(f"bits is {self.bits:g}; use a number from {LEAST} to {MOST}, such as 3.5")

    @classmethod
    def of(cls, bits: float | str | None, fit: Size, budget: Budget | None = None, loads: bool = False) -> Aim | None:
        """None where neither is given; numbers may be texts ("3.5", "12GiB")."""
        if bits is None and fit is None:
            return None
        size = parse_size(fit) if isinstance(fit, str) else fit
        return cls(None if bits is None else _number(bits), size, budget or Budget(), loads)

    def __str__(self) -> str:
        return f"{self.bits:g} bits a weight" if self.bits is not None else f"to fit {readable(self.bytes)}"

    @property
    def option(self) -> str:
        """What was given."""
        return "fit" if self.bits is None else "bits"

    @property
    def bytes(self) -> int:
        """To fit; 0 where bits are asked for."""
        return self.fit or 0


def _number(bits: float | str) -> float:
    try:
        return float(bits)
    except ValueError:
        raise ConfigError(f"bits is {str(bits)[:100]!r}; use a number from {LEAST} to {MOST}, such as 3.5") from None


@dataclass(frozen=True)
class Choice:
    """A checkpoint in which each weight has its codec. loss: nats of KL divergence that are expected of it.

    outside: what was measured of the inputs of tensors in no layer, as a Calibrator takes it.
    """

    prepared: Prepared[Any]
    codecs: Mapping[str, Codec]
    loss: float
    outside: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def fills(self) -> list[Fill]:
        """What has a codec."""
        return [fill for fill in self.prepared.plan.fills if fill.quant is not None]

    @property
    def bits(self) -> float:
        """A weight, on average."""
        taken = sum(coded_bytes(fill, self.codecs[fill.module]) for fill in self.fills)
        return 8 * taken / sum(fill.shape[0] * fill.shape[1] for fill in self.fills)

    def counts(self) -> dict[Codec, int]:
        """How many modules have each codec, the smallest first."""
        return dict(sorted(Counter(self.codecs.values()).items(), key=lambda one: (one[0].bits, -one[0].group_size)))


class Option(NamedTuple):
    """What a codec costs."""

    nbytes: int
    loss: float


def choose(prepared: Prepared[Any], aim: Aim, text: str | None, progress: ProgressCallback | None = None) -> Choice:
    """Measures what each weight loses, with a calibration `text` of one's own, and chooses.

    Raises:
        ConfigError: nothing that is small enough can be had, or the checkpoint is quantized already.
    """
    checkpoint, (plan, candidates) = prepared.checkpoint, candidates_of(prepared, aim)
    _, kv = _allowed(prepared, plan, candidates, aim)  # what cannot be had is said before any work
    if kv == "int8" and aim.budget.kv == "auto":
        logger.warning("an int8 cache is counted, since nothing fits beside a float one: run it with --kv int8")
    inside = sum(checkpoint.nbytes(fill.source) for fill in plan.fills if layer_of(fill.module))
    meter = Meter("measure", 2 * inside, progress)
    source = calibration_ids(checkpoint, prepared.config, text)
    found = measured(checkpoint, plan, prepared.config, source, candidates, meter)
    losses = seen(found.losses)
    if not all(math.isfinite(loss) for codecs in losses.values() for loss in codecs.values()):
        logger.warning("what the weights' bits cost cannot be measured (a gradient is not finite): it is assumed")
        losses = default_losses(candidates, prepared.config.num_hidden_layers)
    choice = _chosen(prepared, plan, candidates, aim, losses, found.outside)
    counted = "; ".join(f"{count} of {codec}" for codec, count in choice.counts().items())
    said = "%.2f bits a weight (%s); expected KL divergence %.3f nats a token"
    logger.warning(said, choice.bits, counted, choice.loss)
    return choice


def expected(prepared: Prepared[Any], aim: Aim) -> Choice:
    """The same without reading a weight: by what each kind of module loses in a model that was measured."""
    plan, candidates = candidates_of(prepared, aim)
    return _chosen(prepared, plan, candidates, aim, default_losses(candidates, prepared.config.num_hidden_layers))


def fewer_bits(prepared: Prepared[Any]) -> list[float]:
    """Bits a weight, in tenths and the most first, that take less memory than int4 and can be had."""
    plan, candidates = candidates_of(prepared, Aim(LEAST))
    fills = [fill for fill in plan.fills if fill.module in candidates and fill.quant is not None]
    as_usual = [(fill, QuantConfig().for_module(fill.module)) for fill in fills]
    usual = sum(coded_bytes(fill, config.codec) for fill, config in as_usual if config is not None)
    least = sum(min(coded_bytes(fill, codec) for codec in candidates[fill.module]) for fill in fills)
    weights = sum(fill.shape[0] * fill.shape[1] for fill in fills)
    return [
        tenths / 10 for tenths in range(math.ceil(80 * usual / weights) - 1, math.ceil(80 * least / weights) - 1, -1)
    ]


def seen(losses: Losses) -> dict[str, dict[Codec, float]]:
    """Losses to second order as they were seen to become where errors are as large as those of 3 or 4 bits."""

    def factor(module: str, codec: Codec) -> float:
        scores = module.endswith(("q_proj", "k_proj"))
        return _SEEN * (_SEEN_OF_SCORES if scores else 1.0) * (_SEEN_OF_TWO_BITS if codec.bits == 2 else 1.0)

    return {
        module: {codec: loss * factor(module, codec) for codec, loss in several.items()}
        for module, several in losses.items()
    }


def solve(options: Sequence[Sequence[Option]], budget: int) -> list[int]:
    """Of each sequence one option, by its number: the least loss in all of at most `budget` bytes.

    The smallest of all must fit. What the hulls give is the least for the bytes that it takes; what is left of the
    budget then is less than one more step along a hull, and is given to single modules while it makes anything better.
    """
    hulls = [_hull(several) for several in options]
    picked = [hull[0] for hull in hulls]
    left = budget - sum(several[at].nbytes for several, at in zip(options, picked, strict=True))
    for _, number, step in sorted(_edges(options, hulls)):
        at, to = hulls[number][step], hulls[number][step + 1]
        more = options[number][to].nbytes - options[number][at].nbytes
        if picked[number] == at and more <= left:
            picked[number], left = to, left - more
    while better := max(_moves(options, picked, left), default=None):
        _, number, to = better
        left -= options[number][to].nbytes - options[number][picked[number]].nbytes
        picked[number] = to
    return picked


def _hull(several: Sequence[Option]) -> list[int]:
    """The corners of the lower convex hull, from the fewest bytes (of those the least loss) to the least loss."""
    hull: list[int] = []
    for at in sorted(range(len(several)), key=lambda at: several[at]):
        if hull and several[at].loss >= several[hull[-1]].loss:
            continue
        while len(hull) > 1 and _slope(several, hull[-2], at) <= _slope(several, hull[-2], hull[-1]):
            hull.pop()
        hull.append(at)
    return hull


def _slope(several: Sequence[Option], start: int, end: int) -> float:
    """Loss by bytes: below zero, and the lower the better."""
    return (several[end].loss - several[start].loss) / (several[end].nbytes - several[start].nbytes)


def _edges(options: Sequence[Sequence[Option]], hulls: Sequence[Sequence[int]]) -> Iterator[tuple[float, int, int]]:
    for number, hull in enumerate(hulls):
        for step in range(len(hull) - 1):
            yield _slope(options[number], hull[step], hull[step + 1]), number, step


def _moves(options: Sequence[Sequence[Option]], picked: Sequence[int], left: int) -> Iterator[tuple[float, int, int]]:
    """(what is gained, whose, which option) of all that fit into what is left."""
    for number, several in enumerate(options):
        now = several[picked[number]]
        for to, option in enumerate(several):
            if option.loss < now.loss and option.nbytes - now.nbytes <= left:
                yield now.loss - option.loss, number, to


def candidates_of(prepared: Prepared[Any], aim: Aim) -> tuple[LoadPlan, dict[str, Sequence[Codec]]]:
    """A plan in which all that can be quantized is calibrated, and the codecs that each module may get."""
    checkpoint = prepared.checkpoint
    if prepared.stored is not None:
        raise ConfigError(f"{checkpoint.origin} is quantized already; load it as it is, without {aim.option}")
    if not isinstance(prepared.model, CausalLM):
        raise ConfigError(
            f"{aim.option} measures a language model's answers, which {type(prepared.model).__name__} has none of; "
            "use quant int4 or int8"
        )
    plan = make_load_plan(prepared.model, checkpoint, QuantConfig(exceptions=(("score", None), ("*norm*", None))))
    return plan, {fill.module: tuple(_codecs(fill)) for fill in plan.fills if fill.quant is not None}


def _codecs(fill: Fill) -> Iterator[Codec]:
    leaf = fill.module.rpartition(".")[2]
    for codec in _CODECS:
        shared = leaf in ("q_proj", "k_proj", "v_proj") and codec.group_size != 32  # they take one input, in one form
        few = leaf in ("lm_head", "embed_tokens") and codec.bits < 4
        if not shared and not few and fill.shape[1] % codec.group_size == 0:
            yield codec


def _chosen(
    prepared: Prepared[Any],
    plan: LoadPlan,
    candidates: Mapping[str, Sequence[Codec]],
    aim: Aim,
    losses: Losses,
    outside: Mapping[str, Tensor] | None = None,
) -> Choice:
    fills = [fill for fill in plan.fills if fill.module in candidates and fill.quant is not None]
    options = [
        [Option(coded_bytes(fill, codec), losses[fill.module][codec]) for codec in candidates[fill.module]]
        for fill in fills
    ]
    picked = solve(options, _allowed(prepared, plan, candidates, aim)[0])
    codecs = {fill.module: candidates[fill.module][at] for fill, at in zip(fills, picked, strict=True)}
    if plan.tied:
        codecs["lm_head"] = codecs["model.embed_tokens"]
    config = QuantConfig().with_codecs(codecs)
    loss = sum(several[at].loss for several, at in zip(options, picked, strict=True))
    final = make_load_plan(prepared.model, prepared.checkpoint, config)
    return Choice(replace(prepared, plan=final, wanted=config), codecs, loss, outside or {})


def _allowed(
    prepared: Prepared[Any], plan: LoadPlan, candidates: Mapping[str, Sequence[Codec]], aim: Aim
) -> tuple[int, KVType]:
    """Bytes that the weights with candidates may have in all, and the cache beside them.

    ConfigError where that is less than can be had.
    """
    fills = [fill for fill in plan.fills if fill.module in candidates and fill.quant is not None]
    least = sum(min(coded_bytes(fill, codec) for codec in candidates[fill.module]) for fill in fills)
    weights = sum(fill.shape[0] * fill.shape[1] for fill in fills)
    if aim.bits is not None:
        allowed = int(aim.bits * weights / 8)
        if allowed < least:
            fewest = math.ceil(800 * least / weights) / 100
            raise ConfigError(f"bits is {aim.bits:g}; {prepared.checkpoint.origin} takes {fewest:g} at least")
        return allowed, "float"
    plain = sum(plan.fill_bytes(fill, torch.float32) for fill in plan.fills if fill.quant is None)
    kinds: tuple[KVType, ...] = ("float", "int8") if aim.budget.kv == "auto" else (cast(KVType, aim.budget.kv),)
    beside = {kv: plain + _beside(prepared, plan, aim, kv) for kv in kinds}
    for kv, taken in beside.items():
        if aim.bytes - taken >= least:
            return aim.bytes - taken, kv
    taken = min(beside.values())
    raise ConfigError(
        f"{prepared.checkpoint.origin} does not fit {readable(aim.bytes)}: the smallest that can be had takes "
        f"{enough(least + taken)}, of which {readable(taken)} are no quantized weights; give more, or a shorter context"
    )


def _beside(prepared: Prepared[Any], plan: LoadPlan, aim: Aim, kv: KVType) -> int:
    """Bytes of RAM that a CPU takes beside the weights."""
    config = prepared.config
    loading = loading_bytes(prepared.checkpoint, plan) if aim.loads else 0
    needs = Requirements(config, "int4", (0,) * config.num_hidden_layers, 0, 0, 0, stored=False)
    context = aim.budget.context or min(DEFAULT_CONTEXT, config.context_length)
    held = place(needs, Machine(1 << 60), context=context, kv=kv).share("cpu")
    return max(held.held, held.reserve + loading)


def coded_bytes(fill: Fill, codec: Codec) -> int:
    """What a weight takes with a codec, in a file and in memory."""
    return empty_weight(fill.shape, QuantConfig(codec.bits, codec.group_size)).nbytes


# What a real model of 135 M parameters lost, by what was measured of it (bench/RESULTS.md): all layers in 4 and 3 bits;
# beside that queries and keys, whose errors go through a softmax, and codes of 2 bits.
_SEEN, _SEEN_OF_SCORES, _SEEN_OF_TWO_BITS = 0.6, 1.6, 1.5

# Nats of KL divergence that int4 in groups of 32 costs a real model of 135 M parameters in all layers' modules of a
# kind (head and embedding: its tied one, to each half), and what other codecs cost by it.
_KINDS: Mapping[str, float] = {
    "q_proj": 0.0052,
    "k_proj": 0.0048,
    "v_proj": 0.0159,
    "o_proj": 0.0106,
    "gate_up_proj": 0.0681,
    "down_proj": 0.0424,
    "embed_tokens": 0.0193,
    "lm_head": 0.0193,
}
_ERRORS: Mapping[Codec, float] = dict(
    zip(_CODECS, (19.0, 8.0, 6.1, 4.4, 2.0, 1.42, 1.0, 0.36, 0.248, 0.091, 0.063, 0.012), strict=True)
)


def default_losses(candidates: Mapping[str, Sequence[Codec]], layers: int) -> dict[str, dict[Codec, float]]:
    """What modules lose where nothing was measured: by kind and codec, all layers alike."""
    found = {}
    for module, codecs in candidates.items():
        kind, among = module.rpartition(".")[2], layers if layer_of(module) else 1
        found[module] = {codec: _KINDS[kind] * _ERRORS[codec] / among for codec in codecs}
    return seen(found)
