"""Where a model's layers go: GPU memory first, then RAM, then disk, within budgets. Arithmetic: nothing is measured.

The rules: the embedding is looked up on the CPU; the head and the last layers lie on the GPU, so that a token crosses
the bus once; a layer's cache and activations lie where it is computed. Layers that lie on disk are computed on the CPU,
through a ring of buffers, and are spread among those held in RAM, so that reading goes on while those are computed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import reduce

from glm4lite.base.errors import ContextLengthError
from glm4lite.base.sentences import Sentence
from glm4lite.base.sizes import enough, readable
from glm4lite.memory import speed
from glm4lite.memory.resources import (
    BUS_BLOCK_BYTES,
    BUS_BLOCKS,
    BUS_BUFFERS,
    RING_BUFFERS,
    Machine,
    Placement,
    Requirements,
    Share,
)
from glm4lite.model.packed_cache import KVType

# Measured: 225 MiB after torch's import and the load of a mapped model, 165 MiB for the tokenizer of 151 552 tokens,
# some 40 MiB that malloc keeps between the chunks of a prompt.
CPU_RESERVE = 512 << 20
GPU_RESERVE = 512 << 20  # CUDA's context and libraries, and what the allocator cannot use (not measured here)


@dataclass(frozen=True)
class _Request:
    """What is to be placed, and within which limits (bytes of RAM, of each GPU)."""

    needs: Requirements
    context: int
    kv: KVType
    ram: int
    gpus: tuple[int, ...]

    def kv_bytes(self, layers: int, gpu: bool) -> int:
        return layers * self.context * self.needs.kv_per_token(self.kv, gpu)


def place(
    needs: Requirements,
    machine: Machine,
    *,
    context: int,
    kv: KVType = "float",
    gpu_memory: int | None = None,
    ram: int | None = None,
) -> Placement:
    """Put as much as possible as near as possible.

    Args:
        context: tokens the cache has room for.
        gpu_memory, ram: bytes of each GPU and of RAM that may be used; None: what is free. 0 GPU memory: no GPU.

    Raises:
        ContextLengthError: the model's context is shorter.
    """
    limit = needs.config.context_length
    if not 0 < context <= limit:
        raise ContextLengthError(f"the context is {context} tokens; this model takes 1 to {limit}")
    gpus = tuple(free if gpu_memory is None else min(free, gpu_memory) for free in machine.gpus)
    request = _Request(needs, context, kv, machine.ram if ram is None else min(ram, machine.ram), gpus)
    placement, short = _arrange(request)
    if gpu_memory and machine.gpus and not placement.gpus:
        short = ("gpu", max(1, _least_gpu(request) - max(gpus)))
    if short is None:
        placement = replace(
            placement,
            decode_tokens_per_s=speed.decode(placement, needs, machine),
            prefill_tokens_per_s=speed.prefill(placement, needs, machine),
        )
    return replace(placement, fits=short is None, advice=_advice(request, placement, short))


def _arrange(request: _Request) -> tuple[Placement, tuple[str, int] | None]:
    """The placement without its speeds, and what is missing: ("ram", bytes), or None where it fits."""
    gpus = _on_gpus(request)
    left = tuple(range(len(request.needs.layers) - sum(len(share.layers) for share in gpus)))
    shares, short = _off_gpu(request, left, gpus)
    devices = (*gpus, *shares)
    placement = Placement(
        devices,
        gpus[0].device if gpus else "cpu",
        request.context,
        request.kv,
        sum(share.weights for share in devices),
        sum(share.kv for share in devices),
    )
    return placement, ("ram", short) if short > 0 else None


def _on_gpus(request: _Request) -> tuple[Share, ...]:
    """The GPUs' shares: head and last layers on the first; without buffers for other layers where there are none."""
    whole = _filled(request, 0)
    if sum(len(share.layers) for share in whole) == len(request.needs.layers):
        return whole
    return _filled(request, BUS_BUFFERS * max(request.needs.layers))


def _filled(request: _Request, buffers: int) -> tuple[Share, ...]:
    """Layers from the last one down, one GPU after the other; () where the first holds no layer beside the head."""
    needs, kv = request.needs, request.kv_bytes(1, gpu=True)
    activations = needs.activations(request.context, gpu=True, kv=request.kv)
    shares: list[Share] = []
    end = len(needs.layers)
    for index, budget in enumerate(request.gpus):
        fixed = 0 if shares else needs.head_read + needs.rest
        share = Share(f"cuda:{index}", (), fixed, 0, activations, GPU_RESERVE, 0 if shares else buffers)
        begin, room = end, budget - share.held
        while begin and room >= needs.layers[begin - 1] + kv:
            begin -= 1
            room -= needs.layers[begin] + kv
        if begin < end:
            weights = fixed + sum(needs.layers[begin:end])
            shares.append(
                replace(share, layers=tuple(range(begin, end)), weights=weights, kv=request.kv_bytes(end - begin, True))
            )
            end = begin
    return tuple(shares)


def _off_gpu(request: _Request, layers: tuple[int, ...], gpus: tuple[Share, ...]) -> tuple[tuple[Share, ...], int]:
    """("cpu" and, where needed, "disk"; bytes of RAM that are missing): as few layers on disk as RAM allows.

    Only stored layers can lie there.
    """
    options = []
    for count in range(len(layers) + 1 if request.needs.stored else 1):
        disk = _spread(layers, count)
        cpu = _cpu_share(request, layers, disk, gpus)
        loading = cpu.reserve + cpu.weights - cpu.mapped + request.needs.loading
        missing = max(cpu.held, loading) - request.ram
        shares = (cpu, Share("disk", disk, request.needs.bytes_of(disk))) if disk else (cpu,)
        if missing <= 0:
            return shares, 0
        options.append((shares, missing))
    return min(options, key=lambda option: option[1])


def _spread(layers: tuple[int, ...], count: int) -> tuple[int, ...]:
    """`count` of the layers at even distances."""
    total = len(layers)
    return tuple(layer for at, layer in enumerate(layers) if (at + 1) * count // total > at * count // total)


def _cpu_share(request: _Request, layers: tuple[int, ...], disk: tuple[int, ...], gpus: tuple[Share, ...]) -> Share:
    """RAM's share where `layers` are computed on the CPU and those in `disk` read from there."""
    needs = request.needs
    read = frozenset(disk)
    held = tuple(layer for layer in layers if layer not in read)
    own = 0 if gpus else needs.head + needs.rest
    read_in_place = needs.stored and (needs.head > 0 or bool(gpus))  # a tied head reads all of the embedding
    staging = BUS_BLOCKS * BUS_BLOCK_BYTES if gpus and layers else 0
    ring = RING_BUFFERS * max(needs.layers[layer] for layer in disk) if disk else 0
    return Share(
        "cpu",
        held,
        needs.bytes_of(held) + own + needs.embedding,
        request.kv_bytes(len(layers), gpu=False),
        needs.activations(request.context, gpu=False, kv=request.kv) if layers else 0,
        CPU_RESERVE,
        staging + ring,
        needs.embedding if read_in_place else 0,
    )


def _least_gpu(request: _Request) -> int:
    """Bytes of GPU memory with which it is used at all: the head, one layer and its cache, and what goes with them."""
    needs = request.needs
    buffers = BUS_BUFFERS * max(needs.layers) if len(needs.layers) > 1 else 0
    fixed = GPU_RESERVE + needs.activations(request.context, gpu=True, kv=request.kv) + needs.head_read + needs.rest
    return fixed + buffers + needs.layers[-1] + request.kv_bytes(1, gpu=True)


def _advice(request: _Request, placement: Placement, short: tuple[str, int] | None) -> Sentence:
    """What to change where it does not fit (`missing` and `remedy`), what would be faster where layers are on disk."""
    needs = request.needs
    if short is None:
        return _faster(request, placement)
    if short[0] == "gpu":
        missing = Sentence("the GPU memory given holds not even the head and one layer")
        remedy = Sentence("give --gpu-memory {least}, or leave it out", least=enough(_least_gpu(request)))
        return Sentence("{missing}: {remedy}", missing=missing, remedy=remedy)
    ways = [Sentence("{size} of RAM", size=enough(request.ram + short[1]))]
    if request.kv == "float" and _arrange(replace(request, kv="int8"))[1] is None:
        ways.append(Sentence("--kv int8"))
    shorter = (request.context >> halvings for halvings in range(1, 8))
    fitting = next((c for c in shorter if c > 0 and _arrange(replace(request, context=c))[1] is None), None)
    ways += [Sentence("--context {tokens}", tokens=str(fitting))] if fitting else []
    if not needs.stored and _arrange(replace(request, needs=replace(needs, stored=True, loading=0)))[1] is None:
        ways.append(Sentence("the folder that `glm4lite quantize` writes"))
    missing = Sentence("{size} of RAM do not suffice", size=readable(request.ram))
    way = reduce(lambda one, other: Sentence("{one}, or {other}", one=one, other=other), ways)
    remedy = Sentence("it takes {way}", way=way)
    if needs.quant not in ("int4", "nf4") and not needs.quant.endswith("bits"):
        remedy = Sentence("{remedy}; `glm4lite plan` tells whether fewer bits would do", remedy=remedy)
    return Sentence("{missing}: {remedy}", missing=missing, remedy=remedy)


def _faster(request: _Request, placement: Placement) -> Sentence:
    if placement.share("disk").layers:
        size = enough(_cpu_share(request, placement.on_cpu, (), placement.gpus).held)
        in_int8 = request.kv == "float" and not _arrange(replace(request, kv="int8"))[0].share("disk").layers
        if in_int8:
            return Sentence("with {size} of RAM, or --kv int8, no layer would be read from disk", size=size)
        return Sentence("with {size} of RAM no layer would be read from disk", size=size)
    if any(request.gpus) and not placement.gpus:
        least = enough(_least_gpu(request))
        return Sentence("the GPU is not used: it takes {size} of its memory to hold the head and a layer", size=least)
    return Sentence("")
