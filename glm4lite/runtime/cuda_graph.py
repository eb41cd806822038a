"""One token through the decoder layers of a GPU, recorded once as a CUDA graph and replayed for each token.

Launching some 500 kernels a token from Python takes longer than a GPU needs to compute them. A recording holds
addresses, so it is made anew when a cache has grown or another conversation's is used; everything that changes from
token to token (the residual stream, cos and sin, the cache's length) lies in memory of its own on the GPU.
GLM4LITE_GPU_DECODE=eager does without; where a graph is impossible it is eager too, and the reason is said once.
"""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from glm4lite.base.errors import ConfigError, one_line
from glm4lite.model.attention import Visibility
from glm4lite.model.cache import HomeCache
from glm4lite.model.layers import Attention, DecoderLayer
from glm4lite_quant.kernels import gpu
from glm4lite_quant.kernels.decoder import CacheView

logger = logging.getLogger("glm4lite")

VARIABLE, CHOICES = "GLM4LITE_GPU_DECODE", ("graph", "eager")


def eager_by_choice() -> bool:
    """Whether GLM4LITE_GPU_DECODE asks for no graph; ConfigError where it names neither way."""
    chosen = os.environ.get(VARIABLE, "graph")
    if chosen not in CHOICES:
        raise ConfigError(f"{VARIABLE} is {chosen!r}; use {' or '.join(CHOICES)}")
    return chosen == "eager"


def status(device: torch.device) -> str:
    """One line for people: how a GPU decodes, and why not as a graph."""
    why = problem(device)
    return f"eager: {why}" if why else "one CUDA graph for all layers of a GPU"


def problem(device: torch.device) -> str:
    """Why no model can be recorded on a device, "" where it can."""
    return f"{VARIABLE}=eager is set" if eager_by_choice() else gpu.problem("triton", device)


class StepGraphs:
    """The recordings of one model, by the first of the layers they run."""

    def __init__(self) -> None:
        self._steps: dict[int, _Step] = {}
        self._refused: dict[int, str] = {}

    def run(
        self,
        layers: Sequence[DecoderLayer],
        x: Tensor,
        dtype: torch.dtype,
        rotary: tuple[Tensor, Tensor],
        visible: Visibility,
        caches: Sequence[HomeCache],
    ) -> Tensor | None:
        """x [1, 1, H], the float32 residual stream on a GPU, after the layers; it is overwritten by the next call.

        None, with nothing done, where they must run one by one as torch code.
        """
        plain = x.shape[:2] == (1, 1) and visible.causal_only and not torch.is_grad_enabled()
        if not plain or id(layers[0]) in self._refused:
            return None
        # A script may go on under no_grad: tensors made in inference mode could not be written there.
        with torch.inference_mode(False), torch.no_grad():
            try:
                step = self._step(layers, x, dtype, rotary, caches)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # a kernel that cannot be recorded: each library has errors of its own
                self._refuse(layers[0], one_line(error) or type(error).__name__)
                return None
            return None if step is None else step.run(x, rotary, caches)

    def reason(self, layer: DecoderLayer) -> str:
        """Why the layers from `layer` on are not recorded, "" where they are or were not tried yet."""
        return self._refused.get(id(layer), "")

    def _step(
        self,
        layers: Sequence[DecoderLayer],
        x: Tensor,
        dtype: torch.dtype,
        rotary: tuple[Tensor, Tensor],
        caches: Sequence[HomeCache],
    ) -> _Step | None:
        """The recording that suits the layers and the caches, made where there is none."""
        key = id(layers[0])
        known = self._steps.get(key)
        if known is not None and known.suits(layers, caches, dtype):
            return known
        why = problem(x.device) or _unfit(layers, dtype)
        if why:
            self._refuse(layers[0], why)
            return None
        self._steps.pop(key, None)  # its memory is free before the next one takes some
        made = self._steps[key] = _Step(layers, caches, x, dtype, rotary)
        return made

    def _refuse(self, first: DecoderLayer, why: str) -> None:
        self._refused[id(first)] = why
        logger.warning("tokens are decoded on %s without a CUDA graph, which is slower: %s", first.device, why)

    def clear(self) -> None:
        """Forgets all recordings and refusals: the model's tensors have moved."""
        self._steps.clear()
        self._refused.clear()


def _unfit(layers: Sequence[DecoderLayer], dtype: torch.dtype) -> str:
    from glm4lite_quant.kernels import triton_step

    if dtype not in triton_step.TYPES:
        return f"its activations are {dtype}"
    if any(layer.mlp.activation_fn is not F.silu for layer in layers):
        return "its hidden_act is not silu"
    return next((why for layer in layers if (why := triton_step.problem(layer.self_attn.heads))), "")


class _Step:
    """One token's way through some layers, with the memory it works in."""

    def __init__(
        self,
        layers: Sequence[DecoderLayer],
        caches: Sequence[HomeCache],
        x: Tensor,
        dtype: torch.dtype,
        rotary: tuple[Tensor, Tensor],
    ) -> None:
        from glm4lite_quant.kernels import triton_step

        self._kernels = triton_step
        self._layers, self._dtype, heads = tuple(layers), dtype, layers[0].self_attn.heads
        views = [cache.view(1, heads, x.device, dtype) for cache in caches]
        self._capacity = min(view.capacity for view in views)  # a prompt stopped in mid pass grows the first ones only
        self._buffers = [weakref.ref(cache.buffer) for cache in caches]  # a forgotten conversation's memory is free
        self._x = torch.empty(x.shape[-1], dtype=torch.float32, device=x.device)
        self._rotary = (torch.empty_like(rotary[0].flatten()), torch.empty_like(rotary[1].flatten()))
        self._length = torch.zeros((), dtype=torch.int32, device=x.device)
        self._scratch = triton_step.AttentionScratch(heads, x.device)
        self._beside = _stream(x.device, "beside") if x.device.type == "cuda" else None
        self._set(x, rotary, caches[0].length)
        self._replay = record(lambda: self._compute(views), x.device)
        self._weights, self._expected = _addresses(self._layers), -1

    def suits(self, layers: Sequence[DecoderLayer], caches: Sequence[HomeCache], dtype: torch.dtype) -> bool:
        """Whether it was recorded with this memory. Weights are compared where a new stretch of tokens begins."""
        length, alike = caches[0].length, dtype == self._dtype and len(layers) == len(self._layers)
        held = (cache.buffer for cache in caches)
        same = alike and length < self._capacity
        same = same and all(own is not None and own is ref() for own, ref in zip(held, self._buffers, strict=True))
        return same and (length == self._expected or _addresses(layers) == self._weights)

    def run(self, x: Tensor, rotary: tuple[Tensor, Tensor], caches: Sequence[HomeCache]) -> Tensor:
        self._set(x, rotary, caches[0].length)
        self._replay()
        for cache in caches:
            cache.length += 1
        self._expected = caches[0].length
        return self._x.view(x.shape)

    def _set(self, x: Tensor, rotary: tuple[Tensor, Tensor], length: int) -> None:
        self._x.copy_(x.flatten())
        for own, given in zip(self._rotary, rotary, strict=True):
            own.copy_(given.flatten())
        self._length.fill_(length)

    def _compute(self, views: Sequence[CacheView]) -> None:
        """What is recorded: all layers, from `_x` to `_x`."""
        k, eps, added, post = self._kernels, self._layers[0].input_layernorm.eps, None, None
        for layer, view in zip(self._layers, views, strict=True):
            normed = k.add_norm(self._x, added, post, layer.input_layernorm.weight, eps, self._dtype)
            q, key, value = self._projected(layer.self_attn, normed)
            attended = k.attend(q, key, value, self._rotary, view, self._length, self._scratch)
            added = layer.self_attn.o_proj(attended[None])[0]
            post = layer.post_self_attn_layernorm.weight if layer.sandwich else None
            normed = k.add_norm(self._x, added, post, layer.post_attention_layernorm.weight, eps, self._dtype)
            added = layer.mlp.down_proj(k.swiglu(layer.mlp.gate_up_proj(normed[None])[0])[None])[0]
            post = layer.post_mlp_layernorm.weight if layer.sandwich else None
        k.add_norm(self._x, added, post, None, eps, self._dtype)

    def _projected(self, attention: Attention, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v; k and v are too small for a GPU and go beside q, on a stream of their own."""
        with _fork(self._beside):
            k, v = attention.k_proj(x[None])[0], attention.v_proj(x[None])[0]
        q = attention.q_proj(x[None])[0]
        if self._beside is not None:
            torch.cuda.current_stream(x.device).wait_stream(self._beside)
        return q, k, v


def record(work: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """`work` once for real, which compiles its kernels, then recorded; calling the result does it again.

    Both on a stream of this device's own: torch's stream for captures belongs to the device that used it first.
    """
    current, own = torch.cuda.current_stream(device), _stream(device, "record")
    with torch.cuda.device(device), torch.cuda.stream(current):  # whose exit restores it where a capture fails
        own.wait_stream(current)
        with torch.cuda.stream(own):
            work()
        current.wait_stream(own)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=own, capture_error_mode="thread_local"):  # other threads may use the GPU
            work()
    return graph.replay


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
