"""What has to be right before anything is timed on a GPU; `bench/gpu.py` runs it first.

Products against the dequantized weight, attention over blocks against float64, whole models of two layers against
torch's code in float32 over the same weights, dequantized: several sequences at once, rows to verify, parts of prompts.
Each check is a line; none stops the others.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bench.gpu_engines import random_weight
from glm4lite_quant import BnbLinear, QuantConfig, QuantEmbedding, QuantLinear
from glm4lite_quant.config import BITS
from glm4lite_quant.kernels.decoder import BLOCK, TOKENS, CacheView, Heads
from glm4lite_quant.kernels.step_rows import SequenceRows, StepRows, tile_rows

if TYPE_CHECKING:
    from glm4lite import Glm4Config, Glm4ForCausalLM, KVCache

ROWS = (*range(1, 17), 33, 300)
HEADS = {"9B": Heads(32, 2, 128, 64), "32B": Heads(48, 2, 128, 64), "Rumination": Heads(48, 8, 128, 64)}
STEPS: tuple[tuple[tuple[int, int], ...], ...] = (
    ((0, 1),),
    ((63, 1), (64, 1), (1000, 1)),
    ((8191, 1), (5, 1), (127, 1), (128, 1), (4000, 1)),
    ((62, 8),),
    ((3000, 5), (0, 2), (640, 1)),
)
"""Of each sequence its tokens, and how many rows come to them."""
BATCHES = (1, 2, 4, 8)
QUANTS = ("int4/32", "int4/64", "int4/128", "int8/32", "nf4")
PRODUCTS = {torch.bfloat16: 1.2e-2, torch.float32: 1e-4}
ATTENTION = {"bfloat16": 2e-2, "float32": 1e-5, "int8": 2e-2}
LOGITS, IDS = 0.05, 0.15  # relative distance; part of the likeliest ids that differ, for random weights are nearly even


@dataclass(frozen=True)
class Check:
    """How far off something was, and how far it may be."""

    name: str
    off: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """NaN is no pass."""
        return self.off <= self.tolerance

    def line(self) -> str:
        """For people."""
        verdict = "right" if self.passed else "WRONG"
        return f"{verdict:6}{self.name:66} off by {self.off:.1e} (at most {self.tolerance:.0e})"


def error(got: Tensor, want: Tensor) -> float:
    """The largest difference, relative to the largest number."""
    return float((got.double() - want.double()).abs().max() / want.double().abs().max())


def products(
    device: torch.device,
    n: int = 4112,
    k: int = 4096,
    rows: Sequence[int] = ROWS,
    groups: Sequence[int] = (32, 64, 128),
) -> Iterator[Check]:
    """The Triton products of every number of rows; float32 inputs for the usual group alone."""
    from glm4lite_quant.kernels.triton_gpu import TritonBackend

    backend = TritonBackend()
    for bits, group in product(BITS, groups):
        weight = random_weight(n, k, bits, device, group)
        packed, dense = backend.prepack(weight), weight.dequantize()
        for dtype, tolerance in PRODUCTS.items() if group == 32 else [(torch.bfloat16, PRODUCTS[torch.bfloat16])]:
            worst = 0.0
            for count in rows:
                x = torch.randn(count, k, device=device).to(dtype)
                off = error(backend.matmul(x, packed, None), x.float() @ dense.T)
                worst = off if off != off else max(worst, off)
            yield Check(f"products, int{bits}, groups of {group}, {str(dtype)[6:]}", worst, tolerance)


class Blocks:
    """Keys and values of several sequences in blocks of any order; `kind` is bfloat16, float32 or int8."""

    def __init__(self, heads: Heads, spans: Sequence[tuple[int, int]], kind: str, device: torch.device) -> None:
        needed = [-(-(length + count) // BLOCK) for length, count in spans]
        blocks, kv = sum(needed) + 2, heads.key_value
        order = torch.randperm(blocks)[: sum(needed)].to(torch.int32)
        self.sequences = [SequenceRows(*span, part) for span, part in zip(spans, order.split(needed), strict=True)]
        self.codes, self.dtype = kind == "int8", torch.bfloat16 if kind == "int8" else getattr(torch, kind)
        plain, tiles = (blocks, kv, BLOCK, heads.dim), (blocks, kv, BLOCK // TOKENS, heads.dim, TOKENS)
        if self.codes:
            keys, values = (torch.randint(-127, 128, size, dtype=torch.int8, device=device) for size in (tiles, plain))
            scales = [torch.rand(plain[:3], device=device) / 127 for _ in range(2)]
            self.view = CacheView(keys, values, scales[0], scales[1], 0, order)
        else:
            keys, values = (torch.randn(plain, device=device).to(self.dtype) for _ in range(2))
            self.view = CacheView(keys, values, None, None, 0, order)

    def read(self, sequence: SequenceRows) -> tuple[Tensor, Tensor]:
        """All keys and values of one, new ones too, [tokens, kv_heads, dim] in float64."""
        at = torch.arange(sequence.length + sequence.rows)
        device = self.view.values.device
        blocks, place = sequence.table[at // BLOCK].long().to(device), (at % BLOCK).to(device)
        if not self.codes:
            return self.view.keys[blocks, :, place].double(), self.view.values[blocks, :, place].double()
        keys = self.view.keys[blocks, :, place // TOKENS, :, place % TOKENS].double()
        values = self.view.values[blocks, :, place].double()
        assert self.view.key_scale is not None
        assert self.view.value_scale is not None
        scales = (scale[blocks, :, place, None].double() for scale in (self.view.key_scale, self.view.value_scale))
        return keys * next(scales), values * next(scales)


def tile_of(spans: Sequence[tuple[int, int]], heads: Heads) -> int:
    """Rows that share what they read, as recorded steps have them."""
    return 1 if max(count for _, count in spans) == 1 else tile_rows(heads)


def attended(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """q [rows, heads, dim] of the last tokens, keys and values [tokens, kv_heads, dim] -> [rows, heads, dim]."""
    groups, rows, tokens = q.shape[1] // keys.shape[1], q.shape[0], keys.shape[0]
    keys, values = (part.repeat_interleave(groups, 1).transpose(0, 1) for part in (keys, values))
    scores = q.double().transpose(0, 1) @ keys.transpose(1, 2) * q.shape[-1] ** -0.5
    hidden = torch.ones(rows, tokens, dtype=torch.bool, device=q.device).triu(tokens - rows + 1)
    return (scores.masked_fill(hidden, float("-inf")).softmax(-1) @ values).transpose(0, 1)


def attention(
    device: torch.device,
    shapes: dict[str, Heads] = HEADS,
    steps: Sequence[Sequence[tuple[int, int]]] = STEPS,
    kinds: Sequence[str] = tuple(ATTENTION),
    size: int = 16,
) -> Iterator[Check]:
    """Attention over blocks and what it writes into them; each row's sequence is another, or several are one's."""
    from glm4lite_quant.kernels import triton_step

    for (name, heads), kind in product(shapes.items(), kinds):
        worst, stored = 0.0, 0.0
        for spans in steps:
            blocks = Blocks(heads, spans, kind, device)
            rows = StepRows(size, blocks.view.blocks, tile_of(spans, heads), device)
            total = rows.set(blocks.sequences)
            counts = (heads.query, heads.key_value, heads.key_value)
            q, k, v = (torch.randn(size, n * heads.dim, device=device).to(blocks.dtype) for n in counts)
            cos = torch.ones(size, heads.rotary_dim // 2, dtype=blocks.dtype, device=device)
            scratch = triton_step.AttentionScratch(heads, size, device)
            out = triton_step.attend(q, k, v, (cos, torch.zeros_like(cos)), blocks.view, rows, scratch)
            out, begin = out.view(size, heads.query, heads.dim), 0
            for sequence in blocks.sequences:
                own, (keys, values) = slice(begin, begin + sequence.rows), blocks.read(sequence)
                want = attended(q[own].view(sequence.rows, heads.query, -1), keys, values)
                offs = [error(out[own], want), float(out[total:].abs().max()) if total < size else 0.0]
                new = k[own].view(sequence.rows, -1, heads.dim), v[own].view(sequence.rows, -1, heads.dim)
                written = [
                    error(part[-sequence.rows :], given) for part, given in zip((keys, values), new, strict=True)
                ]
                worst, stored = _worst([worst, *offs]), _worst([stored, *written])
                begin += sequence.rows
        yield Check(f"attention over blocks, {name}'s heads, {kind}", worst, ATTENTION[kind])
        yield Check(
            f"keys and values in blocks, {name}'s heads, {kind}", stored, 1.01 / 127 if kind == "int8" else 1e-6
        )


def _worst(values: Sequence[float]) -> float:
    """NaN where one is."""
    return next((value for value in values if value != value), max(values))


def small_config() -> Glm4Config:
    """Two layers of the 9B with a short vocabulary: its logits would take most of the time."""
    from bench.make_checkpoint import COMMON
    from glm4lite import Glm4Config

    return Glm4Config(**{**COMMON, "num_hidden_layers": 2, "vocab_size": 8192, "pad_token_id": None})


def models(
    folder: Path,
    device: torch.device,
    config: Glm4Config,
    quants: Sequence[str] = QUANTS,
    dtype: torch.dtype = torch.bfloat16,
    batches: Sequence[int] = BATCHES,
) -> Iterator[Check]:
    """Logits and ids of several sequences at once on the device, against torch's code; `quants` as "int4/64", "nf4"."""
    from bench.make_checkpoint import write_checkpoint
    from glm4lite import load

    for quant in quants:
        bits, _, group = quant.partition("/")
        own = None if bits in ("nf4", "none") else QuantConfig(int(bits[3:]), int(group or 32))
        path = folder / quant.replace("/", "-")
        write_checkpoint(path, config, own)
        for kv in ("float", "int8") if quant == quants[0] else ("float",):
            model = load(path, None if own else bits, device=str(device), dtype=dtype, kv=kv)
            twin = dense_twin(model)
            for count in batches:
                distance, differing = compared(model, twin, count, seed=count)
                what = f"{quant}, {kv} cache, {count} at once"
                yield Check(f"logits, {what}", distance, LOGITS)
                yield Check(f"ids, {what}", differing, IDS)


def dense_twin(model: Glm4ForCausalLM) -> Glm4ForCausalLM:
    """The same weights in float32 on the CPU, for torch's code."""
    from glm4lite import Glm4ForCausalLM

    with torch.device("meta"):
        twin = Glm4ForCausalLM(model.config)
    for name, module in model.named_modules():
        tensors: dict[str, Tensor | None] = dict(module.named_parameters(recurse=False))
        if isinstance(module, QuantLinear | QuantEmbedding | BnbLinear):
            tensors = {"weight": module.weight_tensor.dequantize(), "bias": getattr(module, "bias", None)}
        for leaf, tensor in tensors.items():
            if tensor is not None:
                own = tensor.detach().to("cpu", torch.float32, copy=True)
                setattr(twin.get_submodule(name), leaf, nn.Parameter(own, requires_grad=False))
    return twin.eval()


@torch.inference_mode()
def compared(
    model: Glm4ForCausalLM, twin: Glm4ForCausalLM, count: int, seed: int, steps: int = 8
) -> tuple[float, float]:
    """Relative distance of the logits (the worst of a step), and the part of the likeliest ids that differ.

    `count` sequences over a KV pool: prompts of any length, steps of one id each, and steps in which the first one
    has five rows; the ids are random.
    """
    from glm4lite.model.step import Span
    from glm4lite.runtime.kv_pool import KVPool

    chance, vocabulary = random.Random(seed), model.config.vocab_size
    lengths = [chance.randint(1, 150) for _ in range(count)]
    pool = KVPool(model, sum(lengths) + count * (5 * steps + BLOCK))
    caches: list[tuple[KVCache, KVCache]] = [(pool.new(), twin.new_cache()) for _ in range(count)]
    distance, differing, seen = 0.0, 0, 0
    for at in range(steps + 1):
        rows = lengths if at == 0 else [5 if at % 3 == 0 and number == 0 else 1 for number in range(count)]
        ids = [[chance.randrange(vocabulary) for _ in range(many)] for many in rows]
        pairs = [list(zip(ids, each, strict=True)) for each in zip(*caches, strict=True)]
        got, want = (
            torch.cat(one.step([Span(new, cache, min(len(new), 5)) for new, cache in spans])).cpu()
            for one, spans in zip((model, twin), pairs, strict=True)
        )
        distance = _worst([distance, float((got - want).norm() / want.norm())])
        differing, seen = differing + int((got.argmax(-1) != want.argmax(-1)).sum()), seen + len(want)
    return distance, differing / seen


def all_checks(device: torch.device, folder: Path) -> list[dict[str, Any]]:
    """Every check, printed as it comes; one that raises is a failure with its reason."""
    found: list[dict[str, Any]] = []
    config = small_config()
    for make in (lambda: products(device), lambda: attention(device), lambda: models(folder, device, config)):
        try:
            for check in make():
                print(check.line(), flush=True)
                found.append({"check": check.name, "off": check.off, "passed": check.passed})
        except Exception as failed:  # a kernel that does not compile, say: the others are still worth a look
            why = f"{type(failed).__name__}: {str(failed).partition(chr(10))[0]}"
            print(f"WRONG {why}", flush=True)
            found.append({"check": why, "off": None, "passed": False})
    return found
