"""Speed of one linear layer at GLM-4's shapes: glm4lite's kernels beside torch's own int4 and bfloat16, interleaved.

`python bench/kernels.py [--rounds 7]` prints a table (median, and the spread between the fastest and slowest round)
and, last, one JSON line. Read GB/s counts the bytes of the weights; GOP/s counts 2 * M * N * K.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from glm4lite_quant import QuantConfig, QuantLinear, QuantTensor, kernels

SHAPES = {"9B q/o": (4096, 4096), "9B gate_up": (27392, 4096), "9B down": (4096, 13696)}
GROUP = 32


def torch_int4(weight: torch.Tensor) -> tuple[Callable[[torch.Tensor], torch.Tensor], int]:
    """torch's CPU kernel for asymmetric int4 (bfloat16 activations), the peer with the same number of bits."""
    rows, columns = weight.shape
    codes = torch.randint(0, 16, (rows, columns), dtype=torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    scales = torch.rand(columns // GROUP, rows, 2).bfloat16()
    multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
    return lambda x: multiply(x.bfloat16(), packed, GROUP, scales), packed.nbytes + scales.nbytes


def layers(weight: torch.Tensor) -> dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], int]]:
    """Name -> (function of x, bytes of the weight as it holds it)."""
    found: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], int]] = {}
    for bits in (4, 8):
        config = QuantConfig(bits, GROUP)
        linear = QuantLinear(weight.shape[1], weight.shape[0], config, bias=False, device="meta")
        quantized = QuantTensor.quantize(weight, config)
        linear.load(quantized)
        found[f"glm4lite int{bits} ({linear.kernel})"] = (linear, quantized.nbytes)
    found["torch int4 (bfloat16)"] = torch_int4(weight)
    half = weight.bfloat16()
    found["torch bfloat16"] = (lambda x: F.linear(x.bfloat16(), half), half.nbytes)
    return found


def seconds(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> float:
    """One call, after one that is not counted."""
    function(x)
    started = time.perf_counter()
    function(x)
    return time.perf_counter() - started


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    print(kernels.status(), f"torch {torch.__version__}, {torch.get_num_threads()} threads", sep="\n")
    results = []
    for shape, (rows, columns) in SHAPES.items():
        contenders = layers(torch.randn(rows, columns) * 0.02)
        for tokens in (1, 128):
            x = torch.randn(tokens, columns)
            times: dict[str, list[float]] = {name: [] for name in contenders}
            for _ in range(rounds):  # interleaved: a noisy minute hits all of them
                for name, (function, _) in contenders.items():
                    times[name].append(seconds(function, x))
            for name, (_, size) in contenders.items():
                middle = statistics.median(times[name])
                spread = max(times[name]) / min(times[name])
                rate = size / middle / 1e9 if tokens == 1 else 2 * tokens * rows * columns / middle / 1e9
                unit = "GB/s" if tokens == 1 else "GOP/s"
                print(f"{shape:11} M={tokens:<4} {name:34} {middle * 1e3:8.2f} ms  {rate:8.1f} {unit:5}  x{spread:.2f}")
                results.append(
                    {"shape": shape, "m": tokens, "kernel": name, "ms": middle * 1e3, "rate": rate, "unit": unit}
                )
    print(json.dumps(results))


if __name__ == "__main__":
    main()
