"""A step's few rows through the decoder layers of a GPU, recorded as CUDA graphs and replayed for each step.

Launching some 500 kernels a step from Python takes longer than a GPU needs to compute them. There is a recording for
each number of rows in SIZES, made when a step first needs it; a step of three rows takes that of four, and the fourth
is padding (as in vLLM, SGLang and TensorRT-LLM). A recording holds addresses, so everything that changes from step to
step lies in memory of its own on the GPU: the residual stream, cos and sin, whose each row is, how long that sequence
is and where its blocks lie (`StepRows`). Over a KV pool it serves all sequences for as long as the pool lives; a cache
of its own (a script's, a draft's without a pool) is recorded anew when it has grown or is another one.

GLM4LITE_GPU_DECODE=eager does without; where a graph is impossible it is eager too, and the reason is said once.
"""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from glm4lite.base.errors import ConfigError, one_line
from glm4lite.model.attention import Visibility
from glm4lite.model.cache import HomeCache, HomeCaches, parts_of
from glm4lite.model.layers import Attention, DecoderLayer
from glm4lite.model.trunk import GPU_ROWS
from glm4lite_quant.kernels import gpu
from glm4lite_quant.kernels.decoder import BLOCK, CacheView, Heads
from glm4lite_quant.kernels.step_rows import SequenceRows, StepRows, tile_rows

logger = logging.getLogger("glm4lite")

VARIABLE, CHOICES = "GLM4LITE_GPU_DECODE", ("graph", "eager")
SIZES = (1, 2, 4, 8, 16, 32, GPU_ROWS)
"""Rows that are recorded: steps of answers, guesses to verify, the last few ids of a prompt."""


def records(device: torch.device) -> bool:
    """Whether layers on a device are recorded, where they can be."""
    return device.type != "cpu"


def eager_by_choice() -> bool:
    """Whether GLM4LITE_GPU_DECODE asks for no graph; ConfigError where it names neither way."""
    chosen = os.environ.get(VARIABLE, "graph")
    if chosen not in CHOICES:
        raise ConfigError(f"{VARIABLE} is {chosen!r}; use {' or '.join(CHOICES)}")
    return chosen == "eager"


def status(device: torch.device) -> str:
    """One line for people: how a GPU decodes, and why not as a graph."""
    why = problem(device)
    return f"eager: {why}" if why else f"a CUDA graph for all layers of a GPU, of 1 to {SIZES[-1]} rows"


def problem(device: torch.device) -> str:
    """Why no model can be recorded on a device, "" where it can."""
    return f"{VARIABLE}=eager is set" if eager_by_choice() else gpu.problem("triton", device)


class StepGraphs:
    """The recordings of one model, by the first of the layers they run, their rows, and how those share what they read.

    Those over a cache of its own are for a single row: a prompt of some ids is not worth a recording.
    """

    def __init__(self) -> None:
        self._steps: dict[tuple[int, int, int], _Step] = {}
        self._refused: dict[tuple[int, int], str] = {}

    def run(
        self,
        layers: Sequence[DecoderLayer],
        x: Tensor,
        dtype: torch.dtype,
        rotary: tuple[Tensor, Tensor],
        visible: Visibility,
        caches: Sequence[HomeCaches],
    ) -> Tensor | None:
        """x [1, rows, H], the float32 residual stream on a GPU, after the layers; it is overwritten by the next call.

        None, with nothing done, where they must run one by one as torch code.
        """
        plain = x.shape[0] == 1 and 0 < x.shape[1] <= SIZES[-1] and visible.causal_only
        if not plain or torch.is_grad_enabled():
            return None
        size = next(size for size in SIZES if size >= x.shape[1])
        step = _Spans.of([part.length for part in visible.parts], caches)
        if step is None or (id(layers[0]), size) in self._refused:
            return None
        # A script may go on under no_grad: tensors made in inference mode could not be written there.
        with torch.inference_mode(False), torch.no_grad():
            try:
                recording = self._recording(layers, x, dtype, rotary, step, size)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # a kernel that cannot be recorded: each library has errors of its own
                for made in self._steps.values():
                    made.memory = None  # a capture that failed may not have let go of it: the next one takes its own
                self._refuse(layers[0], size, one_line(error) or type(error).__name__)
                return None
            return None if recording is None else recording.run(x, rotary, step)

    def reason(self, layer: DecoderLayer) -> str:
        """Why the layers from `layer` on are not recorded, "" where they are or were not tried yet."""
        return next((why for (first, _), why in self._refused.items() if first == id(layer)), "")

    def _recording(
        self,
        layers: Sequence[DecoderLayer],
        x: Tensor,
        dtype: torch.dtype,
        rotary: tuple[Tensor, Tensor],
        step: _Spans,
        size: int,
    ) -> _Step | None:
        """The recording that suits the layers and the caches, made where there is none."""
        tile = step.tile(layers[0].self_attn.heads)
        key = (id(layers[0]), size, tile)
        known = self._steps.get(key)
        if known is not None and known.suits(layers, step, dtype):
            return known
        if why := unfit(layers, dtype):
            self._refuse(layers[0], size, why)
            return None
        self._steps.pop(key, None)  # its memory is free before the next one takes some, and that of forgotten caches
        self._steps = {other: made for other, made in self._steps.items() if made.remembered}
        memory = next((other.memory for other in self._steps.values() if other.device == x.device), None)
        made = self._steps[key] = _Step(layers, step, x, dtype, rotary, size, tile, memory)
        return made

    def _refuse(self, first: DecoderLayer, size: int, why: str) -> None:
        """For steps of this size: a layer may be recorded for one row, and not for several (bitsandbytes')."""
        if why not in self._refused.values():
            logger.warning("tokens are decoded on %s without a CUDA graph, which is slower: %s", first.device, why)
        self._refused[id(first), size] = why

    def clear(self) -> None:
        """Forgets all recordings and refusals: the model's tensors have moved."""
        self._steps.clear()
        self._refused.clear()


def unfit(layers: Sequence[DecoderLayer], dtype: torch.dtype) -> str:
    """Why layers whose activations are of `dtype` cannot be recorded, "" where they can."""
    if why := problem(layers[0].device):
        return why
    from glm4lite_quant.kernels import triton_step

    if dtype not in triton_step.TYPES:
        return f"its activations are {dtype}"
    if any(layer.mlp.activation_fn is not F.silu for layer in layers):
        return "its hidden_act is not silu"
    return next((why for layer in layers if (why := triton_step.problem(layer.self_attn.heads))), "")


class _Spans(NamedTuple):
    """The sequences of a step: how many rows each has, and each layer's caches of all of them."""

    rows: list[int]
    caches: list[Sequence[HomeCache]]

    @classmethod
    def of(cls, rows: list[int], caches: Sequence[HomeCaches]) -> _Spans | None:
        """None where no recording serves them: several caches each in its own memory, or several rows over one such."""
        made = cls(rows, [parts_of(cache) for cache in caches])
        whole = all(len(of_layer) == len(rows) for of_layer in made.caches)
        pooled = all(part.in_blocks for of_layer in made.caches for part in of_layer)
        return made if whole and (pooled or rows == [1]) else None

    def tile(self, heads: Heads) -> int:
        """Rows of one sequence that share what they read."""
        return 1 if max(self.rows) == 1 else tile_rows(heads)

    def views(self, layer: int, attention: Attention, device: torch.device, dtype: torch.dtype) -> list[CacheView]:
        """Of one layer, with room for the new rows."""
        each = zip(self.caches[layer], self.rows, strict=True)
        return [cache.view(rows, attention.heads, device, dtype) for cache, rows in each]


class _Step:
    """Up to `size` rows' way through some layers, with the memory it works in."""

    def __init__(
        self,
        layers: Sequence[DecoderLayer],
        step: _Spans,
        x: Tensor,
        dtype: torch.dtype,
        rotary: tuple[Tensor, Tensor],
        size: int,
        tile: int,
        memory: Any,
    ) -> None:
        from glm4lite_quant.kernels import triton_step

        self._kernels = triton_step
        self._layers, self._dtype, self.device = tuple(layers), dtype, x.device
        device = x.device
        each = [step.views(at, layer.self_attn, device, dtype) for at, layer in enumerate(layers)]
        views = [of_layer[0] for of_layer in each]
        # A prompt that was stopped in mid pass grew the caches of the first layers only.
        self._capacity = min(view.capacity for view in views) if views[0].table is None else None
        self._memory = [weakref.ref(parts[0].buffer) for parts in step.caches]  # a forgotten one's is free
        self._seen: weakref.WeakSet[HomeCache] = weakref.WeakSet()
        self._x = torch.zeros(size, x.shape[-1], dtype=torch.float32, device=device)
        cos, sin = (torch.zeros(size, part.shape[-1], dtype=part.dtype, device=device) for part in rotary)
        self._rotary = cos, sin
        self._rows = StepRows(size, views[0].blocks, tile, device)
        self._beside = _stream(device, "beside") if device.type == "cuda" else None
        self._set(x, rotary, step, each[0])
        self._replay, self.memory = record(lambda: self._compute(views), device, memory)
        self._weights = _addresses(self._layers)

    def suits(self, layers: Sequence[DecoderLayer], step: _Spans, dtype: torch.dtype) -> bool:
        """Whether it was recorded with this memory. Weights are compared where a sequence is new to it."""
        if dtype != self._dtype or len(layers) != len(self._layers):
            return False
        if self._capacity is not None and step.caches[0][0].length + step.rows[0] > self._capacity:
            return False
        for parts, ref in zip(step.caches, self._memory, strict=True):
            memory = ref()
            if memory is None or any(part.buffer is not memory for part in parts):
                return False
        return all(part in self._seen for part in step.caches[0]) or _addresses(layers) == self._weights

    @property
    def remembered(self) -> bool:
        """Whether the caches it was recorded with are still somebody's."""
        return all(ref() is not None for ref in self._memory)

    def run(self, x: Tensor, rotary: tuple[Tensor, Tensor], step: _Spans) -> Tensor:
        self._set(x, rotary, step, step.views(0, self._layers[0].self_attn, x.device, self._dtype))
        self._replay()
        for parts in step.caches:
            for part, rows in zip(parts, step.rows, strict=True):
                part.length += rows
        self._seen.update(step.caches[0])
        return self._x[: x.shape[1]].view(x.shape)

    def _set(self, x: Tensor, rotary: tuple[Tensor, Tensor], step: _Spans, views: Sequence[CacheView]) -> None:
        rows = self._rows.set([_rows_of(view, count) for view, count in zip(views, step.rows, strict=True)])
        self._x[:rows].copy_(x[0])
        self._x[rows:].zero_()  # what padding left would grow from step to step
        for own, given in zip(self._rotary, rotary, strict=True):
            own[:rows].copy_(given.flatten(0, -2))

    def _compute(self, views: Sequence[CacheView]) -> None:
        """What is recorded: all layers, from `_x` to `_x`."""
        k, eps, added, post = self._kernels, self._layers[0].input_layernorm.eps, None, None
        scratch = k.AttentionScratch(self._layers[0].self_attn.heads, self._rows.size, self.device)
        for layer, view in zip(self._layers, views, strict=True):
            normed = k.add_norm(self._x, added, post, layer.input_layernorm.weight, eps, self._dtype)
            q, key, value = self._projected(layer.self_attn, normed)
            attended = k.attend(q, key, value, self._rotary, view, self._rows, scratch)
            added = layer.self_attn.o_proj(attended)
            post = layer.post_self_attn_layernorm.weight if layer.sandwich else None
            normed = k.add_norm(self._x, added, post, layer.post_attention_layernorm.weight, eps, self._dtype)
            added = layer.mlp.down_proj(k.swiglu(layer.mlp.gate_up_proj(normed)))
            post = layer.post_mlp_layernorm.weight if layer.sandwich else None
        k.add_norm(self._x, added, post, None, eps, self._dtype)

    def _projected(self, attention: Attention, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v; k and v are too small for a GPU and go beside q, on a stream of their own."""
        with _fork(self._beside):
            k, v = attention.k_proj(x), attention.v_proj(x)
        q = attention.q_proj(x)
        if self._beside is not None:
            torch.cuda.current_stream(x.device).wait_stream(self._beside)
        return q, k, v


def _rows_of(view: CacheView, count: int) -> SequenceRows:
    """A cache of its own is one whose blocks follow each other."""
    table = view.table
    if table is None:
        table = torch.arange(-(-(view.length + count) // BLOCK), dtype=torch.int32)
    return SequenceRows(view.length, count, table)


class Recording(NamedTuple):
    """What was recorded."""

    replay: Callable[[], None]
    memory: Any
    """The allocator's name of what it works in (`torch.cuda.CUDAGraph.pool`), as long as the recording lives."""


def record(work: Callable[[], None], device: torch.device, memory: Any = None) -> Recording:
    """`work` once for real, which compiles its kernels, then recorded.

    `memory`: of a living recording, whose memory this one works in too: the two are never replayed at once, and neither
    leaves anything there. All of it on a stream of this device's own, also where recordings share memory: torch's
    stream for captures belongs to the device that used it first.
    """
    current, own = torch.cuda.current_stream(device), _stream(device, "record")
    with torch.cuda.device(device), torch.cuda.stream(current):  # whose exit restores it where a capture fails
        own.wait_stream(current)
        with torch.cuda.stream(own):
            work()
        current.wait_stream(own)
        graph = torch.cuda.CUDAGraph()
        mode = "thread_local"  # other threads may use the GPU
        with torch.cuda.graph(graph, pool=memory, stream=own, capture_error_mode=mode):
            work()
    return Recording(graph.replay, graph.pool())


@lru_cache
def _stream(device: torch.device, purpose: str) -> torch.cuda.Stream:
    """One for each purpose, whatever is recorded: libraries keep memory for every stream they have seen."""
    return torch.cuda.Stream(device)


def _fork(stream: torch.cuda.Stream | None) -> AbstractContextManager[None]:
    return nullcontext() if stream is None else _on(stream)


@contextmanager
def _on(stream: torch.cuda.Stream) -> Iterator[None]:
    """Work that begins when what was launched so far is done, and that others need not wait for."""
    stream.wait_stream(torch.cuda.current_stream(stream.device))
    with torch.cuda.stream(stream):
        yield


def _addresses(layers: Sequence[DecoderLayer]) -> tuple[int, ...]:
    return tuple(t.data_ptr() for layer in layers for ts in (layer.parameters(), layer.buffers()) for t in ts)
