"""Whole models on a GPU, as `glm4lite bench` measures them, beside the project's targets; `bench/gpu.py` runs it.

Random int4 weights of the true shapes are written to a temporary folder (25 GB for both). One row is a model, a limit
of GPU memory and a length of prompt; the limit is torch's own too, so that nothing beyond it can be had.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

NEW_TOKENS = 64


@dataclass(frozen=True)
class Case:
    """What is measured, and the least share of a bound that is wanted (of decoding; of a prompt)."""

    shape: str
    prompt: int
    gpu_memory: str | None = None
    decode: float | None = None
    prefill: float | None = None
    how: str = "graph"  # GLM4LITE_GPU_DECODE


CASES = (
    Case("9b", 1024, decode=0.60),
    Case("9b", 1024, how="eager"),
    Case("9b", 2048, prefill=0.50),
    Case("32b", 1024, decode=0.60),
    Case("32b", 2048, gpu_memory="8GiB", decode=0.85, prefill=0.70),
)


def measure_models(matmul_tflops: float, device: torch.device, layers: int | None = None) -> Iterator[dict[str, Any]]:
    """One dictionary a case, each printed as a line; `layers` for a trial with smaller models.

    Of the first shape also steps of several sequences, and of several rows of one.
    """
    from bench.gpu_batched import measure_batched
    from bench.make_checkpoint import make_config, write_checkpoint
    from glm4lite_quant import QuantConfig

    with tempfile.TemporaryDirectory() as folder:
        for shape in dict.fromkeys(case.shape for case in CASES):
            write_checkpoint(Path(folder) / shape, make_config(shape, layers), QuantConfig())
            for case in (case for case in CASES if case.shape == shape):
                yield measure(case, Path(folder) / shape, matmul_tflops, device)
            if shape == CASES[0].shape:
                yield {"case": f"{shape}, several rows", "steps": measure_batched(Path(folder) / shape, device)}


def measure(case: Case, folder: Path, matmul_tflops: float, device: torch.device) -> dict[str, Any]:
    from glm4lite.base.sizes import parse_size
    from glm4lite.checkpoint.checkpoint import Checkpoint
    from glm4lite.loading.requirements import requirements_of
    from glm4lite.measure.benchmark import benchmark
    from glm4lite.memory.budget import Budget

    limit = None if case.gpu_memory is None else parse_size(case.gpu_memory)
    needs = requirements_of(Checkpoint.open(folder))
    with _limited(limit, device), _decoding(case.how):
        found = benchmark(
            folder, None, case.prompt, NEW_TOKENS, budget=Budget(gpu_memory=limit, kv="float"), device="cuda"
        )
    tflops = 2 * needs.layer_parameters * len(needs.layers) * found.prefill.median / 1e12
    crossed = found.bus is not None
    prefill = found.bus_gb_per_s / found.bus.median if found.bus is not None else tflops / matmul_tflops
    row = found.to_json() | {
        "case": f"{case.shape}, {case.prompt} tokens, {case.gpu_memory or 'all of the GPU'}, {case.how}",
        "prefill_share": prefill,
        "prefill_bound": "bus" if crossed else "matmul",
    }
    print(
        f"{row['case']:44} decode {found.decode.median:7.2f} tok/s, {found.bound_fraction:6.1%} of what memory allows"
        f"{_wanted(case.decode)}; prefill {found.prefill.median:8.1f} tok/s, {prefill:6.1%} of the "
        f"{row['prefill_bound']}'s rate{_wanted(case.prefill)}; {found.decoding}",
        flush=True,
    )
    return row


def _wanted(share: float | None) -> str:
    return "" if share is None else f" (wanted: {share:.0%})"


@contextmanager
def _limited(size: int | None, device: torch.device) -> Iterator[None]:
    if size is None:
        yield
        return
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(min(1.0, size / total), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


@contextmanager
def _decoding(how: str) -> Iterator[None]:
    before = os.environ.get("GLM4LITE_GPU_DECODE")
    os.environ["GLM4LITE_GPU_DECODE"] = how
    try:
        yield
    finally:
        del os.environ["GLM4LITE_GPU_DECODE"]
        if before is not None:
            os.environ["GLM4LITE_GPU_DECODE"] = before
