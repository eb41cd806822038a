"""What `glm4lite plan` says: whether a model fits, where its layers go and how fast that is, before any download."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from glm4lite.base.errors import ConfigError
from glm4lite.base.sentences import Sentence
from glm4lite.base.sizes import readable
from glm4lite.checkpoint.checkpoint import Checkpoint
from glm4lite.checkpoint.codec_choice import Aim, Choice, expected, fewer_bits
from glm4lite.checkpoint.lora.folder import Loras
from glm4lite.checkpoint.prepare import model_class, prepare
from glm4lite.checkpoint.quant_choice import AUTO, parse_quant, stored_quant
from glm4lite.loading.proposals import Attempt, Changes, Proposal, all_in_memory, proposals, smaller_quants
from glm4lite.loading.requirements import headers, requirements_for, requirements_of
from glm4lite.memory import machine as machines
from glm4lite.memory.budget import Budget, place_within
from glm4lite.memory.resources import Machine, Placement, Requirements, Share
from glm4lite.model.causal_lm import CausalLM
from glm4lite_quant import Codec, QuantConfig


@dataclass(frozen=True)
class PlacementReport:
    """A placement with what it rests on; `assumed` was not measured, or is not so here and now.

    `proposals`: under which changes it would fit, where it does not. `choice`: each weight's codec, where bits or
    memory to fit were given. `in_memory`: fewer bits with which no layer would be read from disk.
    """

    model: str
    needs: Requirements
    machine: Machine
    placement: Placement
    assumed: tuple[Sentence, ...]
    proposals: tuple[Proposal, ...] = ()
    choice: Choice | None = None
    in_memory: Proposal | None = None

    def to_json(self) -> dict[str, Any]:
        """One object, as `glm4lite plan --json` prints it: bytes, tokens per second, layers by number from 0."""
        placed = self.placement
        return {
            "model": self.model,
            "quant": self.needs.quant,
            "codecs": self.choice and {str(codec): count for codec, count in self.choice.counts().items()},
            "expected_loss": self.choice and round(self.choice.loss, 4),
            "context": placed.context,
            "kv": placed.kv,
            "fits": placed.fits,
            "weight_bytes": placed.weight_bytes,
            "kv_bytes": placed.kv_bytes,
            "devices": {share.device: _share_json(share) for share in placed.devices},
            "head": placed.head,
            "embedding": placed.embedding,
            "decode_tokens_per_s": round(placed.decode_tokens_per_s, 3),
            "prefill_tokens_per_s": round(placed.prefill_tokens_per_s, 3),
            "advice": placed.advice if placed.fits else self._refusal,
            "proposals": [proposal.to_json() for proposal in self.proposals],
            "in_memory": self.in_memory and self.in_memory.to_json(),
            "measured": list(self.machine.measured),
            "assumed": list(self.assumed),
        }

    @property
    def _refusal(self) -> object:
        """What is missing, without the ways out: those that hold are `proposals`."""
        return self.placement.advice.values["missing"]

    def rows(self) -> Iterator[tuple[str, ...]]:
        """A table's rows, the header first."""
        yield "device", "layers", "weights", "cache", "activations", "buffers", "reserve", "held"
        for share in self.placement.devices:
            sizes = (share.weights, share.kv, share.activations, share.buffers, share.reserve)
            total = share.weights if share.device == "disk" else share.held
            parts = [_layers(share)] if share.layers else []
            parts += [name for name in ("head", "embedding") if getattr(self.placement, name) == share.device]
            yield share.device, ", ".join(parts), *(readable(size) if size else "" for size in sizes), readable(total)

    def lines(self) -> Iterator[tuple[Sentence, Sentence]]:
        """What stands below the table."""
        placed = self.placement
        weights = readable(placed.weight_bytes)
        named = {"model": self.model, "quant": self.needs.quant, "size": weights}
        yield Sentence("model"), Sentence("{model}, {quant}: {size} of weights", **named)
        if self.choice is not None:
            yield Sentence("codecs"), Sentence("{list}", list=[_counted(*one) for one in self.choice.counts().items()])
            loss = f"{self.choice.loss:.3f}"
            yield (
                Sentence("expected loss"),
                Sentence(
                    "about {loss} nats of KL divergence a token, were it a model of 135 M; larger ones lose less",
                    loss=loss,
                ),
            )
        if mapped := placed.share("cpu").mapped:
            said = Sentence(
                "{size} of the weights stay in the file's pages: not held, outside a budget", size=readable(mapped)
            )
            yield Sentence("mapped"), said
        cache = {"size": readable(placed.kv_bytes), "tokens": str(placed.context), "kv": placed.kv}
        each = readable(placed.kv_bytes * 1024 // placed.context)
        yield Sentence("cache"), Sentence("{size} for {tokens} tokens ({kv}), {each} for each 1024", **cache, each=each)
        if self.placement.fits:
            decode, prompt = f"{placed.decode_tokens_per_s:.2f}", f"{placed.prefill_tokens_per_s:.0f}"
            yield Sentence("decode"), Sentence("about {speed} tokens/s, with the cache half full", speed=decode)
            yield Sentence("prompt"), Sentence("about {speed} tokens/s", speed=prompt)
            yield (
                Sentence("fits"),
                Sentence("yes; {advice}", advice=placed.advice) if placed.advice else Sentence("yes"),
            )
            if self.in_memory is not None:
                yield Sentence("all in memory"), self.in_memory.said()
        else:
            yield Sentence("fits"), Sentence("no: {why}", why=self._refusal)
            for proposal in self.proposals:
                yield Sentence("would fit"), proposal.said()
        if self.machine.measured:
            yield Sentence("measured"), Sentence("{list}", list=self.machine.measured)
        for note in self.assumed:
            yield Sentence("assumed"), note


def plan(
    source: str | Path,
    quant: str | None = None,
    budget: Budget | None = None,
    gpu_bandwidth: float | None = None,
    aim: Aim | None = None,
    loras: Loras = Loras(),
) -> PlacementReport:
    """Plan a model that need not be here: of a Hub repo only config.json and the shards' headers are fetched.

    Args:
        quant: "int4", "int8", "none", "nf4", "fp4"; None: int4, or as the checkpoint is stored.
        budget: more than there is (also of a GPU that is not there) is planned for all the same.
        gpu_bandwidth: bytes per second, instead of what is measured or assumed.
        aim: bits a weight or memory to fit, instead of quant: chosen by what each kind of module loses in a model that
            was measured, since no weight is read.
        loras: adapters, which are downloaded where they are not here.

    Raises:
        Glm4liteError: an argument cannot be used, the model cannot be found, or `load` would refuse its files.
            What does not fit is no error: `placement.fits` tells it, `proposals` what to change.
    """
    budget = budget or Budget()
    if gpu_bandwidth == 0:
        raise ConfigError("a GPU bandwidth of 0 moves nothing; give one such as 272GB")
    parse_quant(quant)  # before a model is looked for
    if aim is not None and quant is not None:
        raise ConfigError(f"quant and {aim.option} contradict each other; give one of them")
    checkpoint = headers(source)
    choice = None if aim is None else _expected(checkpoint, aim, loras)
    needs = (
        requirements_of(checkpoint, AUTO if quant is None else quant, loras)
        if choice is None
        else requirements_for(choice.prepared)
    )
    machine = _machine(budget, gpu_bandwidth, quantized=needs.quant not in ("bfloat16", "float32"))
    asked = needs
    placement, needs, notes = _placed(asked, machine, budget)
    if placement.share("disk").layers:
        measured = _disk_bandwidth(checkpoint)
        if measured is None:
            speed = f"{machine.disk_bandwidth / 1e9:.1f}"
            notes += (Sentence("a disk of {speed} GB/s (no shard is here to measure it with)", speed=speed),)
        else:
            told = (*machine.measured, Sentence("disk {speed} GB/s", speed=f"{measured / 1e9:.1f}"))
            machine = replace(machine, disk_bandwidth=measured, measured=told)
            placement, needs, _ = _placed(needs, machine, budget)
    attempts = _Attempts(checkpoint, asked, machine, budget, loras)
    changes = () if placement.fits else tuple(attempts.proposals())
    nearer = attempts.in_memory() if placement.fits and placement.share("disk").layers else None
    called = " + ".join((str(source), *loras.always, *loras.choices))
    return PlacementReport(called, needs, machine, placement, machine.assumed + notes, changes, choice, nearer)


def _expected(checkpoint: Checkpoint, aim: Aim, loras: Loras) -> Choice:
    """ConfigError where the checkpoint is quantized by us already."""
    if isinstance(stored_quant(checkpoint), QuantConfig):
        raise ConfigError(f"{checkpoint.origin} is quantized already; plan it as it is, without {aim.option}")
    return expected(prepare(checkpoint, QuantConfig(), model_class(checkpoint), loras=loras), aim)


def _counted(codec: Codec, count: int) -> Sentence:
    numbers = {"count": str(count), "bits": str(codec.bits), "size": str(codec.group_size)}
    return Sentence("{count} of int{bits} in groups of {size}", **numbers)


def _machine(budget: Budget, gpu_bandwidth: float | None, quantized: bool) -> Machine:
    """This machine, with what the budget speaks of and it has not."""
    machine = _allowing(machines.this_machine(quantized), budget)
    return machine if gpu_bandwidth is None else replace(machine, gpu_bandwidth=gpu_bandwidth)


def _allowing(machine: Machine, budget: Budget) -> Machine:
    if budget.ram is not None and budget.ram > machine.ram:
        sizes = {"size": readable(budget.ram), "free": readable(machine.ram)}
        note = Sentence("{size} of RAM ({free} are free here now)", **sizes)
        machine = replace(machine, ram=budget.ram, assumed=(*machine.assumed, note))
    if budget.gpu_memory and not machine.gpus:
        machine = machines.with_assumed_gpu(machine, budget.gpu_memory)
    elif budget.gpu_memory and budget.gpu_memory > min(machine.gpus):
        sizes = {"size": readable(budget.gpu_memory), "free": readable(min(machine.gpus))}
        note = Sentence("{size} of GPU memory ({free} are free here now)", **sizes)
        gpus = tuple(max(free, budget.gpu_memory) for free in machine.gpus)
        machine = replace(machine, gpus=gpus, assumed=(*machine.assumed, note))
    return machine


@dataclass
class _Attempts:
    """Plans under changes, each as `plan` would make it."""

    checkpoint: Checkpoint
    needs: Requirements
    machine: Machine
    budget: Budget
    loras: Loras

    def __post_init__(self) -> None:
        self._of_quant, self._losses = {self.needs.quant: self.needs}, dict[str, float]()

    def __call__(self, changes: Changes) -> Attempt:
        quant = changes.get("quant", self.needs.quant)
        if quant not in self._of_quant and quant.endswith("bits"):
            choice = _expected(self.checkpoint, Aim(float(quant.removesuffix("bits"))), self.loras)
            self._of_quant[quant], self._losses[quant] = requirements_for(choice.prepared), choice.loss
        elif quant not in self._of_quant:
            self._of_quant[quant] = requirements_of(self.checkpoint, quant, self.loras)
        changed = replace(self.budget, **{name: value for name, value in changes.items() if name != "quant"})
        placement, _, notes = _placed(self._of_quant[quant], _allowing(self.machine, changed), changed)
        return Attempt(placement, quant if notes else None, self._losses.get(quant))

    @property
    def quants(self) -> tuple[str, ...]:
        """What takes less memory, the largest first; nothing where the checkpoint is quantized, and stays so."""
        if self.checkpoint.config.get("quantization_config") is not None:
            return ()
        quants = smaller_quants(self.needs.quant)
        cls = model_class(self.checkpoint)
        if not issubclass(cls, CausalLM) or "int4" not in (self.needs.quant, *quants):
            return quants
        return quants + tuple(f"{bits:g} bits" for bits in fewer_bits(prepare(self.checkpoint, QuantConfig(), cls)))

    def proposals(self) -> Iterator[Proposal]:
        """Under what it would fit."""
        yield from proposals(self, self.quants, self({}).placement, self.budget)

    def in_memory(self) -> Proposal | None:
        """With how many bits no layer would be read from disk."""
        return all_in_memory(self, self.quants)


def _placed(
    needs: Requirements, machine: Machine, budget: Budget
) -> tuple[Placement, Requirements, tuple[Sentence, ...]]:
    """The placement, and the needs and the note it rests on: what must lie on disk is to be quantized once before."""
    placement = place_within(needs, machine, budget)
    if placement.fits or needs.stored or not needs.coded:
        return placement, needs, ()
    once = replace(needs, stored=True, loading=0)
    note = Sentence(
        "the folder that `glm4lite quantize` writes once: only stored layers can be read as they are needed"
    )
    return place_within(once, machine, budget), once, (note,)


def _disk_bandwidth(checkpoint: Checkpoint) -> float | None:
    """Of the folder's largest shard."""
    files = {checkpoint.file(name) for name in checkpoint.names()}
    sizes = {file: file.stat().st_size for file in files if file.exists()}
    return machines.disk_bandwidth(max(sizes, key=lambda file: sizes[file])) if sizes else None


def _share_json(share: Share) -> dict[str, Any]:
    names = ("weights", "kv", "activations", "buffers", "reserve", "mapped")
    return {"layers": list(share.layers), **{name: getattr(share, name) for name in names}}


def _layers(share: Share) -> str:
    """ "20, 20 to 39"; "8 of 0 to 39" where others lie between."""
    first, last, count = share.layers[0], share.layers[-1], len(share.layers)
    return f"{count}, {first} to {last}" if last - first + 1 == count else f"{count} of {first} to {last}"
