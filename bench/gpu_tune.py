"""Which settings of the Triton kernels are fastest on this device: `python -m bench.gpu --tune` and `--sweep`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from bench.gpu_engines import random_weight
from bench.gpu_timing import captured, copies, guarded, milliseconds

TOKENS = (1, 2, 4, 8, 9, 16, 32, 64, 128, 192, 256, 512, 1024, 2048)
WARPS, STAGES = (1, 2, 4, 8, 16), (2, 3, 4, 5)


def sweep(bits: int, n: int, k: int, device: torch.device) -> Iterator[dict[str, Any]]:
    """One weight by tokens and path, in microseconds: where gemm should follow gemv, and dense gemm."""
    from glm4lite_quant.kernels import triton_gpu

    packed = triton_gpu.TritonBackend().prepack(random_weight(n, k, bits, device))
    for tokens in TOKENS:
        x = torch.randn(tokens, k, dtype=torch.bfloat16, device=device)
        row: dict[str, Any] = {"bits": bits, "tokens": tokens}
        for name, path in _paths(x, packed).items():
            with guarded(f"{name} at {tokens} tokens"):
                row[name] = milliseconds(captured(path)) * 1e3
        print("  ".join(f"{key} {value:.4g}" for key, value in row.items()), "us", flush=True)
        yield row


def _paths(x: Tensor, packed: Any) -> dict[str, Callable[[], None]]:
    from glm4lite_quant.kernels import triton_gpu

    weight, tokens = packed.weight, x.shape[0]
    out = torch.empty(tokens, weight.shape[0], dtype=x.dtype, device=x.device)
    few, many = triton_gpu.gemv_config(weight.bits, *weight.shape), triton_gpu.gemm_config(tokens)
    paths: dict[str, Callable[[], None]] = {
        "gemv": lambda: triton_gpu.gemv(x, packed, None, out, few),
        "gemm": lambda: triton_gpu.gemm(x, packed, None, out, many),
        "dense": lambda: triton_gpu.dense(x, packed, None, out),
    }
    return paths if tokens <= 32 else {name: path for name, path in paths.items() if name != "gemv"}


def tune(bits: int, n: int, k: int, device: torch.device) -> dict[str, Any]:
    """Every setting of gemv for one token and one shape; prints the fastest as a row of triton_gpu.GEMV."""
    from glm4lite_quant.kernels import triton_gpu

    backend, x = triton_gpu.TritonBackend(), torch.randn(1, k, dtype=torch.bfloat16, device=device)
    packed = [backend.prepack(random_weight(n, k, bits, device)) for _ in range(copies(n, k, device))]
    out, times = torch.empty(1, n, dtype=torch.bfloat16, device=device), {}

    def work(config: triton_gpu.Gemv) -> None:
        for weight in packed:
            triton_gpu.gemv(x, weight, None, out, config)

    for config in (triton_gpu.Gemv(warps, stages) for warps, stages in product(WARPS, STAGES)):
        with guarded(f"{config} for {n} x {k}"):  # more shared memory than there is
            times[config] = milliseconds(captured(partial(work, config)), 5) / len(packed) * 1e3
    best, now = min(times, key=lambda config: times[config]), triton_gpu.gemv_config(bits, n, k)
    rate = packed[0].weight.nbytes / times[best] / 1e3
    print(f"    ({bits}, {n}, {k}): {best},  # {times[best]:.1f} us, {rate:.0f} GB/s; now {times.get(now, 0):.1f} us")
    table = [{**asdict(config), "us": took} for config, took in times.items()]
    return {
        "bits": bits,
        "n": n,
        "k": k,
        "best": asdict(best),
        "us": times[best],
        "now_us": times.get(now),
        "all": table,
    }
