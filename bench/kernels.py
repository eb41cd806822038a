"""Speed of one linear layer at GLM-4's shapes, from one token to a prompt: every ISA of this host beside torch's own
int4 and bfloat16 and llama.cpp's Q4_0 (where llama-cpp-python is installed), interleaved.

`python -m bench.kernels [--rounds 7] [--shapes gate_up,down] [--tokens 1,4,128] [--only avx2,llama] [--cpu-time]`
prints a table: the fastest round (and the median over it: how noisy the machine was), GB/s of the weight's bytes (and
the share of what a plain read of memory gave), GOP/s (2 * M * N * K), and time over that of the fewest tokens. Then the
project's targets, and last one JSON line. GLM4LITE_THREADS sets the threads of all. With `--cpu-time` one thread is
measured by the time it had a processor: for machines with other work, where a call is longer than a scheduler's slice.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.ggml import GgmlLinear, absent
from glm4lite_quant import QuantConfig, QuantTensor
from glm4lite_quant.kernels import native, picking

SHAPES = {"q/o": (4096, 4096), "gate_up": (27392, 4096), "down": (4096, 13696)}
TOKENS = (1, 2, 3, 4, 6, 8, 12, 16, 32, 128)
TARGET_SHAPE = "gate_up"
CACHES = 128 << 20  # bytes that leave nothing else in a cache
GROUP = 32
READ, LLAMA = "plain read", "llama.cpp Q4_0"


@dataclass
class Contender:
    """A way to multiply, and how many bytes of weights it reads."""

    name: str
    run: Callable[[Tensor], object]
    nbytes: int
    isa: str = ""  # of glm4lite's
    bits: int = 0


@dataclass(frozen=True)
class Target:
    """A ratio of glm4lite's kernels that is wanted: at least `must`, or where it is a time at most."""

    name: str
    must: float
    aim: float
    at_most: bool = False


BOUND = {"avx2": Target("share of the read bandwidth, one token", 0.70, 0.90)}
BOUND |= dict.fromkeys(("avxvnni", "avx512vnni"), Target("share of the read bandwidth, one token", 0.85, 0.95))
FEW = {"avx2": (Target("4 tokens / 1", 1.6, 1.3, True), Target("8 tokens / 1", 2.8, 2.0, True))}
FEW |= dict.fromkeys(
    ("avxvnni", "avx512vnni"), (Target("4 tokens / 1", 1.3, 1.1, True), Target("8 tokens / 1", 2.0, 1.5, True))
)
ONE, PROMPT = Target(f"one token against {LLAMA}", 1.3, 1.7), Target(f"128 tokens against {LLAMA}", 2.0, 3.0)


def torch_int4(weight: Tensor) -> Contender:
    """torch's CPU kernel for asymmetric int4 (bfloat16 activations), the peer with the same number of bits."""
    rows, columns = weight.shape
    codes = torch.randint(0, 16, (rows, columns), dtype=torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    scales = torch.rand(columns // GROUP, rows, 2).bfloat16()
    multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
    nbytes = packed.nbytes + scales.nbytes
    return Contender("torch int4 (bfloat16)", lambda x: multiply(x.bfloat16(), packed, GROUP, scales), nbytes)


def read(codes: Tensor, _: Tensor) -> None:
    """Reads the codes, as fast as memory gives them."""
    native.read_all(codes)


def contenders(weight: Tensor, isas: Sequence[str], sizes: Sequence[int]) -> list[Contender]:
    """All of this host; glm4lite's ISAs read the same bytes."""
    found = []
    library = native._library().cdll
    for bits in sizes:
        quantized = QuantTensor.quantize(weight, QuantConfig(bits, GROUP))
        for isa in isas:
            if library is None:
                break  # torch alone computes here
            kernel = native.NativeBackend(library, isa)
            run = partial(kernel.matmul, packed=kernel.prepack(quantized), bias=None)
            found.append(Contender(f"glm4lite int{bits} {isa}", run, quantized.nbytes, isa, bits))
        if bits == 4:
            codes = quantized.tensors()["qweight"]
            found.append(Contender(READ, partial(read, codes), codes.nbytes))
    if not absent():
        llama = GgmlLinear(weight, native.thread_count())
        found.append(Contender(LLAMA, llama, llama.nbytes))
    found.append(torch_int4(weight))
    half = weight.bfloat16()
    found.append(Contender("torch bfloat16", lambda x: F.linear(x.bfloat16(), half), half.nbytes))
    return found


def seconds(function: Callable[[Tensor], object], x: Tensor, clock: Callable[[], float], others: Tensor) -> float:
    """One call that finds none of its weights in a cache."""
    native.read_all(others)
    started = clock()
    function(x)
    return clock() - started


Times = dict[tuple[str, int], list[float]]  # contender and tokens -> one time a round


def measure(
    found: Sequence[Contender], columns: int, tokens: Sequence[int], rounds: int, clock: Callable[[], float]
) -> Times:
    """Every round holds everything, so that a noisy minute hits all of it; a first one is not counted."""
    inputs = {m: torch.randn(m, columns) for m in tokens}
    others = torch.ones(CACHES, dtype=torch.uint8)
    times: Times = {(one.name, m): [] for one in found for m in tokens}
    for _ in range(rounds + 1):
        for m in tokens:
            for one in found:
                times[one.name, m].append(seconds(one.run, inputs[m], clock, others))
    return {key: taken[1:] for key, taken in times.items()}


def rows(shape: str, found: Sequence[Contender], times: Times, tokens: Sequence[int]) -> list[dict[str, object]]:
    """One line for each contender and number of tokens, printed and returned."""
    n, k = SHAPES[shape]
    results: list[dict[str, object]] = []
    memory = read_rate(found, times)
    for one in found:
        for m in tokens:
            fastest, noise = min(times[one.name, m]), statistics.median(times[one.name, m]) / min(times[one.name, m])
            rate, work = one.nbytes / fastest / 1e9, 2 * m * n * k / fastest / 1e9
            over = fastest / min(times[one.name, tokens[0]])
            entry = {"shape": shape, "kernel": one.name, "m": m, "ms": fastest * 1e3, "median_over_fastest": noise}
            results.append(entry | {"gb_s": rate, "share": rate / memory, "gop_s": work, "over_first": over})
            print(
                f"{shape:8} {one.name:26} M={m:<4} {fastest * 1e3:9.3f} ms (x{noise:5.2f}) {rate:6.1f} GB/s "
                f"({rate / memory:4.0%}) {work:8.1f} GOP/s {over:7.2f} x M={tokens[0]}"
            )
    return results


def read_rate(found: Sequence[Contender], times: Times) -> float:
    """GB/s of the fastest plain read."""
    read = next(one for one in found if one.name == READ)
    return read.nbytes / min(min(taken) for (name, _), taken in times.items() if name == READ) / 1e9


def targets(found: Sequence[Contender], times: Times, tokens: Sequence[int]) -> list[tuple[str, Target, float]]:
    """Which of the targets this run can judge, by ISA: int4 beside the plain read and llama.cpp."""
    judged: list[tuple[str, Target, float]] = []
    if not {1, 4, 8, 128} <= set(tokens):
        return judged
    best = {key: min(taken) for key, taken in times.items()}
    for one in found:
        if one.bits != 4 or one.isa not in BOUND:
            continue
        alone = best[one.name, 1]
        judged.append((one.isa, BOUND[one.isa], one.nbytes / alone / 1e9 / read_rate(found, times)))
        for m, want in zip((4, 8), FEW[one.isa], strict=True):
            judged.append((one.isa, want, best[one.name, m] / alone))
        if (LLAMA, 1) in best:
            judged.append((one.isa, ONE, best[LLAMA, 1] / alone))
            judged.append((one.isa, PROMPT, best[LLAMA, 128] / best[one.name, 128]))
    return judged


def named(one: Contender, only: str) -> bool:
    """Whether a row was asked for; the plain read always is."""
    return one.name == READ or any(part in one.name for part in only.split(","))


def print_targets(judged: Sequence[tuple[str, Target, float]]) -> None:
    """Markdown."""
    print(f"\n| {TARGET_SHAPE}, int4 | target | must | aim | measured | met |\n|---|---|---|---|---|---|")
    for isa, want, value in judged:
        met = value <= want.must if want.at_most else value >= want.must
        print(f"| {isa} | {want.name} | {want.must} | {want.aim} | {value:.2f} | {'yes' if met else 'NO'} |")


@torch.inference_mode()
def main() -> None:
    host = [isa for isa in native._library().isas if isa != "scalar"] or ["scalar"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)))
    parser.add_argument("--bits", default="4,8", help="which codes; 4 is always among them")
    parser.add_argument("--only", default="", help="parts of names, of which each row has one")
    parser.add_argument("--cpu-time", action="store_true")
    given = parser.parse_args()
    clock = time.perf_counter
    if given.cpu_time:
        clock = time.process_time
        native.set_threads(1)
    tokens = sorted({int(m) for m in given.tokens.split(",")})
    sizes = sorted({4, *map(int, given.bits.split(","))})
    torch.set_num_threads(native.thread_count())
    print(picking.status(), f"torch {torch.__version__}, {torch.get_num_threads()} threads", absent(), sep="\n")
    results: list[dict[str, object]] = []
    judged: list[tuple[str, Target, float]] = []
    for shape in given.shapes.split(","):
        n, k = SHAPES[shape]
        found = [one for one in contenders(torch.randn(n, k) * 0.02, host, sizes) if named(one, given.only)]
        times = measure(found, k, tokens, given.rounds, clock)
        results += rows(shape, found, times, tokens)
        if shape == TARGET_SHAPE:
            judged = targets(found, times, tokens)
    print_targets(judged)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
