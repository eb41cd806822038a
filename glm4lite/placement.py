"""Where a model's layers go: GPU memory first, then RAM, then disk, within budgets. Arithmetic: nothing is measured.

The rules: the embedding is looked up on the CPU; the head and the last layers lie on the GPU, so that a token crosses
the bus once; a layer's cache and activations lie where it is computed. Layers that lie on disk are computed on the CPU,
through a ring of buffers, and are spread among those held in RAM, so that reading goes on while those are computed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from glm4lite import speed
from glm4lite.cache import KVType, bytes_per_token
from glm4lite.crossing import BLOCK_BYTES, BLOCKS
from glm4lite.crossing import BUFFERS as BUS_BUFFERS
from glm4lite.errors import ConfigError, ContextLengthError
from glm4lite.model import CPU_CHUNK, GPU_CHUNK
from glm4lite.weights.memory import enough, readable

if TYPE_CHECKING:
    from glm4lite.config import Glm4Config

RING_BUFFERS = 3
"""Layers in RAM at a time of those that are read from disk: computed, just read, being read."""


# Measured: 225 MiB after torch's import and the load of a mapped model, 165 MiB for the tokenizer of 151 552 tokens,
# some 40 MiB that malloc keeps between the chunks of a prompt.
CPU_RESERVE = 512 << 20
GPU_RESERVE = 512 << 20  # CUDA's context and libraries, and what the allocator cannot use (not measured here)
GPU_ITEM_BYTES = 2  # activations and a float cache on a GPU are bfloat16


@dataclass(frozen=True)
class Needs:
    """Bytes that a model asks for.

    quant: "int4", "int8", "nf4", "bfloat16", "float32".
    layers: of each decoder layer's weights, as they are held. head: 0 where it is tied to the embedding. rest: the last
    norm (and a classifier's score). stored: the weights lie in the files as they are held, so that they can be mapped
    or read layer by layer. item_bytes: of an activation and of a float cache's number on the CPU. loading: what is
    held beside the weights while they are made.
    """

    config: Glm4Config
    quant: str
    layers: tuple[int, ...]
    embedding: int
    head: int
    rest: int
    stored: bool
    item_bytes: int = 4
    loading: int = 0

    @property
    def weight_bytes(self) -> int:
        return sum(self.layers) + self.embedding + self.head + self.rest

    @property
    def head_read(self) -> int:
        """Bytes the head reads for each token, its own or the embedding's."""
        return self.head or self.embedding

    def bytes_of(self, layers: Iterable[int]) -> int:
        """Of these layers' weights."""
        return sum(self.layers[layer] for layer in layers)

    @property
    def layer_parameters(self) -> int:
        """Weights that one token is multiplied with in one layer."""
        config = self.config
        queries, keys = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
        return config.hidden_size * (2 * queries + 2 * keys + 3 * config.intermediate_size)

    def kv_per_token(self, kv: KVType, gpu: bool) -> int:
        """Bytes of keys and values of one token in one layer."""
        item_bytes = GPU_ITEM_BYTES if gpu else self.item_bytes
        return bytes_per_token(self.config, kv, item_bytes) // self.config.num_hidden_layers

    def activations(self, context: int, gpu: bool) -> int:
        """Bytes for the largest chunk of a prompt: the residual stream, one layer's values, the last token's logits.

        On a GPU also the mask [chunk, context], as bool and as numbers, and keys and values for every query head.
        """
        config, item_bytes = self.config, GPU_ITEM_BYTES if gpu else self.item_bytes
        chunk = min(context, GPU_CHUNK if gpu else CPU_CHUNK)
        queries, keys = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
        values = 2 * config.hidden_size + 3 * queries + 2 * keys + 3 * config.intermediate_size
        mask, expanded = (context * (1 + item_bytes), 2 * context * queries * item_bytes) if gpu else (0, 0)
        return chunk * (3 * 4 * config.hidden_size + item_bytes * values + mask) + expanded + 5 * 4 * config.vocab_size


@dataclass(frozen=True)
class Machine:
    """What there is: free bytes of RAM and of each GPU, bytes per second, operations per second in a prompt.

    An operation is a multiplication or an addition. For people: what was measured, what is assumed.
    """

    ram: int
    gpus: tuple[int, ...] = ()
    ram_bandwidth: float = 40e9
    disk_bandwidth: float = 2e9
    gpu_bandwidth: float = 272e9
    bus_bandwidth: float = 12e9
    cpu_rate: float = 1e12
    gpu_rate: float = 30e12
    measured: tuple[str, ...] = ()
    assumed: tuple[str, ...] = ()


@dataclass(frozen=True)
class Share:
    """What one device ("cuda:0", "cpu", "disk") holds, in bytes.

    weights include the embedding and the head where they lie here; `mapped` of them stay in the file's pages and take
    nothing of a budget. The cache of layers on disk lies in RAM. buffers: the ring that layers on disk are read into,
    and layers on their way over the bus.
    """

    device: str
    layers: tuple[int, ...]
    weights: int
    kv: int = 0
    activations: int = 0
    reserve: int = 0
    buffers: int = 0
    mapped: int = 0

    @property
    def held(self) -> int:
        """Bytes of the device's memory, of which a budget is the limit."""
        return self.weights - self.mapped + self.kv + self.activations + self.reserve + self.buffers


@dataclass(frozen=True)
class Placement:
    """Which device holds what, and how fast that should be.

    devices: the GPUs used, in order, "cpu", and "disk" where layers lie there. decode_tokens_per_s: with the cache half
    full; prefill_tokens_per_s: of a prompt's first chunk; both 0 where it does not fit. advice: one line, "" where
    there is nothing to say.
    """

    devices: tuple[Share, ...]
    head: str
    context: int
    kv: KVType
    weight_bytes: int
    kv_bytes: int
    decode_tokens_per_s: float = 0.0
    prefill_tokens_per_s: float = 0.0
    fits: bool = True
    advice: str = ""
    embedding: str = "cpu"

    def share(self, device: str) -> Share:
        """The share of a device; an empty one where it has none."""
        return next((share for share in self.devices if share.device == device), Share(device, (), 0))

    @property
    def gpus(self) -> tuple[Share, ...]:
        return tuple(share for share in self.devices if share.device.startswith("cuda"))

    @property
    def on_cpu(self) -> tuple[int, ...]:
        """The layers that the CPU computes: those in RAM and those on disk."""
        return tuple(sorted((*self.share("cpu").layers, *self.share("disk").layers)))

    @property
    def chunk(self) -> int:
        """Tokens of a prompt computed at a time."""
        return min(self.context, GPU_CHUNK if self.gpus else CPU_CHUNK)

    def device_of(self, layer: int) -> str:
        """ "cuda:0", "cpu" or "disk"."""
        return next(share.device for share in self.devices if layer in share.layers)


@dataclass(frozen=True)
class _Request:
    """What is to be placed, and within which limits (bytes of RAM, of each GPU)."""

    needs: Needs
    context: int
    kv: KVType
    ram: int
    gpus: tuple[int, ...]

    def kv_bytes(self, layers: int, gpu: bool) -> int:
        return layers * self.context * self.needs.kv_per_token(self.kv, gpu)


def place(
    needs: Needs,
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
        ConfigError: a size is negative.
    """
    limit = needs.config.context_length
    if not 0 < context <= limit:
        raise ContextLengthError(f"the context is {context} tokens; this model takes 1 to {limit}")
    if min(gpu_memory or 0, ram or 0) < 0:
        raise ConfigError("a memory budget is negative; give a size such as 8GiB")
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
    activations = needs.activations(request.context, gpu=True)
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
    held = tuple(layer for layer in layers if layer not in set(disk))
    own = 0 if gpus else needs.head + needs.rest
    read_in_place = needs.stored and (needs.head > 0 or bool(gpus))  # a tied head reads all of the embedding
    staging = BLOCKS * BLOCK_BYTES if gpus and layers else 0
    ring = RING_BUFFERS * max(needs.layers[layer] for layer in disk) if disk else 0
    return Share(
        "cpu",
        held,
        needs.bytes_of(held) + own + needs.embedding,
        request.kv_bytes(len(layers), gpu=False),
        needs.activations(request.context, gpu=False) if layers else 0,
        CPU_RESERVE,
        staging + ring,
        needs.embedding if read_in_place else 0,
    )


def _least_gpu(request: _Request) -> int:
    """Bytes of GPU memory with which it is used at all: the head, one layer and its cache, and what goes with them."""
    needs = request.needs
    buffers = BUS_BUFFERS * max(needs.layers) if len(needs.layers) > 1 else 0
    fixed = GPU_RESERVE + needs.activations(request.context, gpu=True) + needs.head_read + needs.rest
    return fixed + buffers + needs.layers[-1] + request.kv_bytes(1, gpu=True)


def _advice(request: _Request, placement: Placement, short: tuple[str, int] | None) -> str:
    """One line: what to change where it does not fit, what would be faster where layers are read from disk."""
    needs = request.needs
    if short is None:
        return _faster(request, placement)
    if short[0] == "gpu":
        least = enough(_least_gpu(request))
        return f"the GPU memory given holds not even the head and one layer: give --gpu-memory {least}, or leave it out"
    ways = [f"{enough(request.ram + short[1])} of RAM"]
    if request.kv == "float" and _arrange(replace(request, kv="int8"))[1] is None:
        ways.append("--kv int8")
    shorter = (request.context >> halvings for halvings in range(1, 8))
    fitting = next((c for c in shorter if c > 0 and _arrange(replace(request, context=c))[1] is None), None)
    ways += [f"--context {fitting}"] if fitting else []
    if not needs.stored and _arrange(replace(request, needs=replace(needs, stored=True, loading=0)))[1] is None:
        ways.append("the folder that `glm4lite quantize` writes")
    bits = "" if needs.quant in ("int4", "nf4") else "; `glm4lite plan` tells whether fewer bits would do"
    return f"{readable(request.ram)} of RAM do not suffice: it takes {', or '.join(ways)}{bits}"


def _faster(request: _Request, placement: Placement) -> str:
    if placement.share("disk").layers:
        missing = _cpu_share(request, placement.on_cpu, (), placement.gpus).held
        in_int8 = request.kv == "float" and not _arrange(replace(request, kv="int8"))[0].share("disk").layers
        return f"with {enough(missing)} of RAM{', or --kv int8,' if in_int8 else ''} no layer would be read from disk"
    if any(request.gpus) and not placement.gpus:
        return f"the GPU is not used: it takes {enough(_least_gpu(request))} of its memory to hold the head and a layer"
    return ""
