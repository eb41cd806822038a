"""Whether glm4lite's GPU kernels are right, then their speed at GLM-4's shapes, beside other 4-bit kernels and the
device's own bounds.

`python -m bench.gpu` needs a CUDA device, torch and triton, and takes some minutes; bitsandbytes is compared if it is
there, and where glm4lite itself is installed whole models are measured too (25 GB of disk). First come the checks of
`bench/gpu_checks.py`, a line each; where one fails the figures follow all the same, and the exit status is 1. It prints
tables and, last, one JSON line. A product is checked against the dequantized weight before it is timed. GB/s counts the
bytes of the weights, the copy's both reads and writes; what has few tokens runs as a CUDA graph over enough copies of a
weight that none is in a cache.

    --checks         nothing but the checks
    --sizes 9B,32B   whose shapes
    --quick          no whole decode steps, no prefill, no whole models
    --models         whole models only
    --layers N       whole models of fewer layers, to see that it works
    --sweep          gate_up at 1 to 2048 tokens through each of the Triton paths: where one should follow the other
    --tune           every setting of the Triton kernels for few tokens; the fastest belong into triton_gpu.GEMV
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.gpu_batched import attention_table
from bench.gpu_checks import all_checks
from bench.gpu_engines import (
    BFLOAT16,
    NF4,
    TINYGEMM,
    TRITON,
    TRITON4,
    TRITON8,
    Engine,
    Held,
    available,
    check,
)
from bench.gpu_models import measure_models
from bench.gpu_timing import captured, copies, guarded, milliseconds
from bench.gpu_tune import sweep, tune
from glm4lite_quant.kernels import picking

VOCABULARY = 151552
PREFILL = 2048
RUMINATION = {(1024, 6144, 8)}  # the 32B whose k and v have eight heads


@dataclass(frozen=True)
class Size:
    """The linears of one layer, and how many layers there are."""

    hidden: int
    inner: int
    key_value: int
    layers: int

    def linears(self) -> dict[str, tuple[int, int, int]]:
        """Name -> (N, K, bits by glm4lite's rule)."""
        h = self.hidden
        return {
            "q": (h, h, 4),
            "k": (self.key_value, h, 8),
            "v": (self.key_value, h, 8),
            "o": (h, h, 4),
            "gate_up": (2 * self.inner, h, 4),
            "down": (h, self.inner, 4),
        }

    def head(self) -> tuple[int, int, int]:
        return VOCABULARY, self.hidden, 8


SIZES = {"9B": Size(4096, 13696, 256, 40), "32B": Size(6144, 23040, 256, 61)}


def copy_rate(device: torch.device) -> float:
    """GB/s of a device-to-device copy, bytes read plus bytes written."""
    free = torch.cuda.mem_get_info(device)[0]
    source = torch.zeros(min(2 << 30, free // 4), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / milliseconds(lambda: target.copy_(source)) / 1e6


def matmul_rate(device: torch.device) -> float:
    """TFLOP/s of torch's bfloat16 matmul, 8192 cubed, random values."""
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device=device) for _ in range(2))
    return 2 * 8192**3 / milliseconds(lambda: a @ b) / 1e9


def one_token(engine: Engine, n: int, k: int, bits: int, device: torch.device) -> dict[str, Any]:
    """Microseconds and GB/s of one token through one linear."""
    x = torch.randn(1, k, dtype=torch.bfloat16, device=device)
    held = [engine.make(n, k, bits, device) for _ in range(copies(n, k, device))]
    check(engine, held[0], x)

    def work() -> None:
        for weight in held:
            weight.multiply(x)

    try:
        took, how = milliseconds(captured(work)), "graph"
    except Exception as error:  # an engine that synchronizes cannot be captured
        torch.cuda.synchronize()
        took, how = milliseconds(work), f"eager ({str(error).splitlines()[0]})"
    took /= len(held)
    return {"us": took * 1e3, "GBps": held[0].nbytes / took / 1e6, "bytes": held[0].nbytes, "how": how}


def linears_table(size: str, engines: dict[str, Engine], copy: float, device: torch.device) -> list[dict[str, Any]]:
    rows = []
    shapes = {**SIZES[size].linears(), "head": SIZES[size].head()}
    for linear, (n, k, bits) in shapes.items():
        if linear == "v":
            continue  # as k
        found: dict[str, dict[str, Any]] = {}
        for name, engine in engines.items():
            with guarded(f"{size} {linear} {name}"):
                found[name] = one_token(engine, n, k, bits, device)
            torch.cuda.empty_cache()
        for name, row in found.items():
            row |= {"size": size, "linear": linear, "n": n, "k": k, "engine": name, "of_copy": row["GBps"] / copy}
            line = (
                f"{size:4}{linear:9}{name:18}{row['us']:9.1f} us {row['GBps']:8.0f} GB/s {row['of_copy']:6.1%} of copy"
            )
            for peer in (TINYGEMM.name, NF4.name, BFLOAT16.name):
                if name.startswith("triton") and peer in found:
                    row[f"times_{peer}"] = found[peer]["us"] / row["us"]
                    line += f"  {row[f'times_{peer}']:5.2f} x {peer}"
            print(line + ("" if row["how"] == "graph" else f"  {row['how']}"), flush=True)
            rows.append(row)
    return rows


def decode_step(size: str, engine: Engine, copy: float, device: torch.device, tokens: int = 1) -> dict[str, Any]:
    """All linears of all layers and the head, each with its own weight, as one CUDA graph; no attention, no norms."""
    shape = SIZES[size]
    step: list[tuple[Held, Tensor]] = []
    inputs = {k: torch.randn(tokens, k, dtype=torch.bfloat16, device=device) for k in (shape.hidden, shape.inner)}
    layers = [linear for _ in range(shape.layers) for linear in shape.linears().values()]
    for n, k, bits in [*layers, shape.head()]:
        step.append((engine.make(n, k, bits, device), inputs[k]))
    for held, x in step[:6]:
        check(engine, held, x)

    def work() -> None:
        for held, x in step:
            held.multiply(x)

    took, size_bytes = milliseconds(captured(work)), sum(held.nbytes for held, _ in step)
    eager = milliseconds(work, rounds=3)
    rate = size_bytes / took / 1e6
    print(
        f"{size:4}whole step   {engine.name:18}{took:8.2f} ms {rate:8.0f} GB/s {rate / copy:6.1%} of copy, "
        f"{1000 / took:6.1f} steps/s; {size_bytes / 2**30:.2f} GiB, {len(step)} products; eager {eager:.2f} ms",
        flush=True,
    )
    return {
        "size": size,
        "engine": engine.name,
        "ms": took,
        "eager_ms": eager,
        "GBps": rate,
        "of_copy": rate / copy,
        "bytes": size_bytes,
    }


def prefill(size: str, engine: Engine, rate: float, device: torch.device) -> dict[str, Any]:
    """PREFILL tokens through the linears of one layer."""
    shape = SIZES[size]
    took, work_done = 0.0, 0
    for n, k, bits in shape.linears().values():
        held = engine.make(n, k, bits, device)
        x = torch.randn(PREFILL, k, dtype=torch.bfloat16, device=device)
        check(engine, held, x)
        took += milliseconds(partial(held.multiply, x))
        work_done += 2 * PREFILL * n * k
    tflops = work_done / took / 1e9
    print(
        f"{size:4}prefill {PREFILL}  {engine.name:18}{took:8.3f} ms a layer {tflops:8.1f} TFLOP/s "
        f"{tflops / rate:6.1%} of the matmul rate",
        flush=True,
    )
    return {"size": size, "engine": engine.name, "ms_per_layer": took, "TFLOPs": tflops, "of_matmul": tflops / rate}


@torch.inference_mode()
def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="9B,32B")
    parser.add_argument("--layers", type=int)
    for flag in ("--checks", "--quick", "--sweep", "--tune", "--models"):
        parser.add_argument(flag, action="store_true")
    options = parser.parse_args(arguments)
    sizes = [size for size in options.sizes.split(",") if size in SIZES]
    if not torch.cuda.is_available():
        print("bench.gpu measures a CUDA device, and torch finds none here")
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    with tempfile.TemporaryDirectory() as folder:
        checks = all_checks(device, Path(folder))
    failed = [row["check"] for row in checks if not row["passed"]]
    print(f"{len(checks) - len(failed)} of {len(checks)} checks passed", *failed, sep="\nfailed: ", flush=True)
    if options.checks:
        print(json.dumps({"checks": checks}))
        return int(bool(failed))
    torch.cuda.empty_cache()
    copy, rate = copy_rate(device), matmul_rate(device)
    name = torch.cuda.get_device_name(device)
    print(f"{name}, torch {torch.__version__}; copy {copy:.0f} GB/s, bfloat16 matmul {rate:.0f} TFLOP/s")
    print(f"gpu kernels: {picking.gpu_status()}", flush=True)
    engines, missing = available(device)
    print(*missing, sep="\n" if missing else "", flush=True)
    found: dict[str, Any] = {"device": name, "torch": torch.__version__, "copy_GBps": copy, "matmul_TFLOPs": rate}
    found |= {"missing": missing, "linears": [], "steps": [], "prefill": [], "models": [], "checks": checks}
    if options.tune and TRITON4.name in engines:
        shapes = {shape for s in SIZES.values() for shape in (*s.linears().values(), s.head())}
        found["tune"] = [tune(bits, n, k, device) for n, k, bits in sorted(shapes | RUMINATION)]
    if options.sweep and TRITON4.name in engines:
        found["sweep"] = [row for bits in (4, 8) for row in sweep(bits, *SIZES["9B"].linears()["gate_up"][:2], device)]
    for size in () if options.tune or options.sweep or options.models else sizes:
        found["linears"] += linears_table(size, engines, copy, device)
        if not options.quick:
            whole(size, engines, found, copy, rate, device)
    if not (options.tune or options.sweep or options.models) and TRITON4.name in engines:
        found["attention"] = list(attention_table(copy, device))
    if not (options.tune or options.sweep or options.quick):
        with guarded("whole models"):
            for row in measure_models(rate, device, options.layers):
                found["models"].append(row)
    print(json.dumps(found))
    return int(bool(failed))


def whole(
    size: str, engines: dict[str, Engine], found: dict[str, Any], copy: float, rate: float, device: torch.device
) -> None:
    """Decode steps and prefill; glm4lite's by its own rule of bits."""
    peers = [engine for name, engine in engines.items() if name not in (TRITON4.name, TRITON8.name)]
    for engine in [TRITON, *peers] if TRITON4.name in engines else peers:
        with guarded(f"{size} whole step, {engine.name}"):
            found["steps"].append(decode_step(size, engine, copy, device))
        torch.cuda.empty_cache()
    for engine in (e for e in (TRITON, NF4, BFLOAT16) if e is TRITON or e.name in engines):
        if engine is TRITON and TRITON4.name not in engines:
            continue
        with guarded(f"{size} prefill, {engine.name}"):
            found["prefill"].append(prefill(size, engine, rate, device))
        torch.cuda.empty_cache()
    took = {row["engine"]: row["ms"] for row in found["steps"] if row["size"] == size}
    for peer, least in ((NF4.name, 2.0), (TINYGEMM.name, 1.2)):
        if TRITON.name in took and peer in took:
            times = took[peer] / took[TRITON.name]
            print(f"{size:4}whole step: {times:.2f} times {peer} (wanted: {least})", flush=True)


if __name__ == "__main__":
    sys.exit(main())
