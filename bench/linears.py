"""Speed of other libraries' linear layers at a model's shapes, as tokens per second of a model made of nothing else.

One layer's linears run one after another, in turn with the head; a model's time is layers x layer + head. Norms,
attention and everything between the linears count nothing, so a real model would be slower. Weights are random.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from glm4lite.model.config import Glm4Config

Linear = Callable[[Tensor], Tensor]
BLOCK_ROWS = 256  # random rows that are repeated: quantizing takes longer than what is measured
GROUP = 32
ROUNDS = 5


def _noise(rows: int, columns: int) -> Tensor:
    return torch.randn(min(rows, BLOCK_ROWS), columns) * 0.02


def bf16(rows: int, columns: int) -> Linear:
    """torch's own bfloat16 product (oneDNN)."""
    weight = _noise(rows, columns).bfloat16().repeat(-(-rows // BLOCK_ROWS), 1)[:rows]
    return lambda x: F.linear(x, weight)


def torch_int4(rows: int, columns: int) -> Linear:
    """torch's CPU kernel for affine int4 in groups of 32, bfloat16 scales and activations: 5 bits a weight."""
    codes = torch.randint(0, 16, (min(rows, BLOCK_ROWS), columns), dtype=torch.int32)
    codes = codes.repeat(-(-rows // BLOCK_ROWS), 1)[:rows]
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    scales = torch.rand(columns // GROUP, rows, 2).bfloat16()
    multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
    return lambda x: multiply(x, packed, GROUP, scales)


def nf4(rows: int, columns: int) -> Linear:
    """bitsandbytes' NF4 in blocks of 64 (4.5 bits a weight), bfloat16 activations, as its Linear4bit runs them."""
    import bitsandbytes

    noise = _noise(rows, columns).bfloat16()
    packed, state = bitsandbytes.functional.quantize_4bit(noise, blocksize=64, quant_type="nf4")
    times = rows // BLOCK_ROWS
    packed, state.absmax, state.shape = packed.repeat(times, 1), state.absmax.repeat(times), torch.Size((rows, columns))
    layer = bitsandbytes.nn.Linear4bit(columns, rows, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
    layer.weight = bitsandbytes.nn.Params4bit(packed, requires_grad=False, quant_state=state, bnb_quantized=True)
    return layer.eval()


# The head stays bfloat16 beside NF4, as Transformers leaves it.
KINDS: dict[str, tuple[Callable[[int, int], Linear], Callable[[int, int], Linear]]] = {
    "nf4": (nf4, bf16),
    "torch-int4": (torch_int4, torch_int4),
    "bf16": (bf16, bf16),
}


@torch.inference_mode()
def measure(kind: str, config: Glm4Config, prompt_tokens: int) -> dict[str, Any]:
    """Tokens per second of prefill and decode, from the medians of a few rounds."""
    make, make_head = KINDS[kind]
    hidden, middle = config.hidden_size, config.intermediate_size
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    shapes = [(queries, hidden), (keys, hidden), (keys, hidden), (hidden, queries)]
    shapes += [(2 * middle, hidden), (hidden, middle)]
    layer = [(make(*shape), shape[1]) for shape in shapes]
    head = [(make_head(config.vocab_size, hidden), hidden)]
    runs: dict[str, list[float]] = {"decode": [], "prefill": [], "head": []}
    for _ in range(ROUNDS + 1):  # the first is a warm-up
        runs["decode"].append(_once(layer, 1))
        runs["head"].append(_once(head, 1))
        runs["prefill"].append(_once(layer, prompt_tokens))
    seconds = {name: statistics.median(values[1:]) for name, values in runs.items()}
    decode, prefill = (config.num_hidden_layers * seconds[name] + seconds["head"] for name in ("decode", "prefill"))
    return {"prefill_tokens_per_s": prompt_tokens / prefill, "decode_tokens_per_s": 1 / decode}


def _once(linears: list[tuple[Linear, int]], tokens: int) -> float:
    """Seconds for all of them, one after another."""
    inputs = [torch.randn(tokens, columns).bfloat16() for _, columns in linears]
    started = time.perf_counter()
    for (linear, _), x in zip(linears, inputs, strict=True):
        linear(x)
    return time.perf_counter() - started
