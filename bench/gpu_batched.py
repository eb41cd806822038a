"""Several sequences at once on a GPU: attention over blocks by rows and context, and whole steps of a model.

`bench/gpu.py` runs it. What a row costs in a step is what speculation pays for a guess; a step of eight sequences over
a step of one says what a batch gains.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bench.gpu_checks import HEADS, Blocks, tile_of
from bench.gpu_timing import captured, guarded, milliseconds
from glm4lite_quant.kernels.decoder import Heads
from glm4lite_quant.kernels.step_rows import StepRows

if TYPE_CHECKING:
    from glm4lite import Glm4ForCausalLM, KVCache

SEQUENCES = (1, 2, 4, 8, 16)
CONTEXTS = (1024, 8192, 32768)
WANTED = 5.0  # eight sequences together over one
PROMPT, NEW_TOKENS = 128, 32


def attention_table(copy: float, device: torch.device, contexts: Sequence[int] = CONTEXTS) -> Iterator[dict[str, Any]]:
    """Microseconds of one layer's attention, and GB/s of the keys and values that it has to read; `copy` in GB/s."""
    for kind in ("bfloat16", "int8"):
        for context in contexts:
            for rows in SEQUENCES:
                several = [("each another's", [(context, 1)] * rows)]
                several += [("one's", [(context, rows)])] if rows > 1 else []
                for whose, spans in several:
                    name = f"attention, {kind}, {context} tokens, {rows} rows, {whose}"
                    with guarded(name):
                        row = _timed(HEADS["9B"], spans, kind, device)
                        row["of_copy"] = row["GBps"] / copy
                        print(f"{name:60}{row['us']:9.1f} us {row['GBps']:8.0f} GB/s {row['of_copy']:6.1%} of copy")
                        yield {"kind": kind, "context": context, "rows": rows, "whose": whose} | row
                    torch.cuda.empty_cache()


def _timed(heads: Heads, spans: Sequence[tuple[int, int]], kind: str, device: torch.device) -> dict[str, float]:
    """Over enough layers that no cache holds them."""
    size = sum(count for _, count in spans)
    item = 1 if kind == "int8" else 2
    read = sum(length + count for length, count in spans) * heads.key_value * 2 * (heads.dim * item + 4 * (item == 1))
    cached = 8 * getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 64 << 20)
    layers = [attention_step(heads, spans, kind, size, device) for _ in range(max(2, min(64, cached // read + 1)))]

    def work() -> None:
        for layer in layers:
            layer()

    took = milliseconds(captured(work)) / len(layers)
    return {"us": took * 1e3, "GBps": read / took / 1e6}


def attention_step(heads: Heads, spans: Sequence[tuple[int, int]], kind: str, size: int, device: torch.device) -> Any:
    """One layer's attention as a function without arguments, over blocks of its own."""
    from glm4lite_quant.kernels import triton_step

    blocks = Blocks(heads, spans, kind, device)
    rows = StepRows(size, blocks.view.blocks, tile_of(spans, heads), device)
    rows.set(blocks.sequences)
    counts = (heads.query, heads.key_value, heads.key_value)
    q, k, v = (torch.randn(size, n * heads.dim, device=device).to(blocks.dtype) for n in counts)
    rotary = (
        torch.ones(size, heads.rotary_dim // 2, device=device),
        torch.zeros(size, heads.rotary_dim // 2, device=device),
    )
    scratch = triton_step.AttentionScratch(heads, size, device)
    return lambda: triton_step.attend(q, k, v, rotary, blocks.view, rows, scratch)


def measure_batched(folder: Path, device: torch.device, sequences: Sequence[int] = SEQUENCES) -> list[dict[str, Any]]:
    """Whole steps of a stored model: of several sequences, and of several rows of one; printed as they come."""
    from glm4lite import load

    model = load(folder, device=str(device), context=max(sequences) * (PROMPT + 4 * NEW_TOKENS))
    found: list[dict[str, Any]] = []
    for rows_of_one in (False, True):
        for count in sequences:
            with guarded(f"steps of {count} rows"):
                took = step_seconds(model, count, rows_of_one)
                first = next((row["ms"] for row in found if row["of_one"] == rows_of_one), took * 1e3)
                gained = count * first / (took * 1e3)
                row = {"rows": count, "of_one": rows_of_one, "ms": took * 1e3, "tokens_per_s": count / took}
                found.append(row | {"times_one": gained})
                what = "rows of one sequence" if rows_of_one else "sequences at once"
                wanted = f" (wanted: {WANTED:.0f})" if count == 8 and not rows_of_one else ""
                print(
                    f"{folder.name:6}{count:3} {what:22}{took * 1e3:8.2f} ms a step, {count / took:8.1f} tok/s, "
                    f"{gained:5.2f} times one{wanted}",
                    flush=True,
                )
    return found


@torch.inference_mode()
def step_seconds(model: Glm4ForCausalLM, rows: int, of_one: bool, steps: int = NEW_TOKENS) -> float:
    """Median seconds of a step, the likeliest id of each row brought back as a sampler would."""
    from glm4lite.model.step import Span
    from glm4lite.runtime.kv_pool import KVPool

    chance, vocabulary = random.Random(0), model.config.vocab_size
    pool = KVPool(model, model.context)
    caches: list[KVCache] = [pool.new() for _ in range(1 if of_one else rows)]
    for cache in caches:
        model.step([Span([chance.randrange(vocabulary) for _ in range(PROMPT)], cache)])
    took, ids = [], [chance.randrange(vocabulary) for _ in range(rows)]
    for _ in range(steps + 3):
        lengths = [cache.get_seq_length() for cache in caches]
        began = time.perf_counter()
        spans = (
            [Span(ids, caches[0], rows)]
            if of_one
            else [Span([id_], each) for id_, each in zip(ids, caches, strict=True)]
        )
        ids = [int(best) for logits in model.step(spans) for best in logits.argmax(-1).tolist()]
        took.append(time.perf_counter() - began)
        if of_one:  # as if no guess had been right: the context stays what it was
            caches[0].truncate(lengths[0] + 1)
    return sorted(took[3:])[steps // 2]
