"""What a model asks for, what a machine has, and which device holds what: bytes, rates and layers as plain data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from glm4lite.base.sentences import Sentence
from glm4lite.model.config import Glm4Config
from glm4lite.model.packed_cache import KVType, bytes_per_token
from glm4lite.model.trunk import CPU_CHUNK, GPU_CHUNK, GPU_ROWS

_NOTHING = Sentence("")

RING_BUFFERS = 3
"""Layers in RAM at a time of those that are read from disk: computed, just read, being read."""

BUS_BUFFERS = 2
"""Layers on a GPU at a time of those that are sent to it for a prompt: one is computed, one filled."""

BUS_BLOCK_BYTES = 16 << 20
"""Of pinned memory that they are sent through: a power of two, as torch rounds it up to one."""

BUS_BLOCKS = 2
"""Of these: one is written while the other is read by the bus."""

GPU_ITEM_BYTES = 2  # activations and a float cache on a GPU are bfloat16


@dataclass(frozen=True)
class Requirements:
    """Bytes that a model asks for.

    quant: "int4", "int8", "3.50 bits" (where each weight has its own), "nf4", "bfloat16", "float32".
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
    def coded(self) -> bool:
        """Whether the weights are codes of our own format."""
        return self.quant.startswith("int") or self.quant.endswith("bits")

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

    def activations(self, context: int, gpu: bool, kv: KVType) -> int:
        """Bytes for the largest chunk of a prompt: the residual stream, one layer's values, the last token's logits.

        On a GPU also the mask [chunk, context], as bool and as numbers; keys and values as they come out of their
        blocks (of int8 ones also their floats, before and after the scales), and for every query head; and what
        recorded steps work in (`glm4lite.runtime.cuda_graph`): one layer's values and what 8 parts of attention leave.
        """
        config, item_bytes = self.config, GPU_ITEM_BYTES if gpu else self.item_bytes
        chunk = min(context, GPU_CHUNK if gpu else CPU_CHUNK)
        queries, keys = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
        values = 2 * config.hidden_size + 3 * queries + 2 * keys + 3 * config.intermediate_size
        row = 3 * 4 * config.hidden_size + item_bytes * values
        needed = chunk * row + 5 * 4 * config.vocab_size
        if gpu:
            read = 12 if kv == "int8" else 3 * item_bytes
            mask, past = context * (1 + item_bytes), context * (2 * queries * item_bytes + keys * read)
            needed += chunk * mask + past + GPU_ROWS * (row + 8 * 4 * queries)
        return needed


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
    measured: tuple[Sentence, ...] = ()
    assumed: tuple[Sentence, ...] = ()


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
    advice: Sentence = _NOTHING
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
