"""Load, prefill and decode at GLM-4's true shapes with random weights, which cost the same as trained ones.

`python bench/model.py FOLDER [--shape 9b|32b] [--layers N] [--quant int4] [--new-tokens 32]` writes a bfloat16
checkpoint into FOLDER where there is none (9b, all 40 layers: 18.8 GB), loads it, and runs it; then the same for the
pre-quantized folder FOLDER-int4. A table, and one JSON line last.
"""

from __future__ import annotations

import argparse
import json
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from glm4lite import Glm4Config, Glm4ForCausalLM, SamplingParams, load
from glm4lite.generate import Generation
from glm4lite.weights.quantized import quantize_checkpoint
from glm4lite.weights.writer import FolderWriter, PlannedTensor

SHAPES: dict[str, dict[str, Any]] = {
    "9b": {},
    "32b": {
        "hidden_size": 6144,
        "intermediate_size": 23040,
        "num_hidden_layers": 61,
        "num_attention_heads": 48,
        "attention_bias": False,
    },
}
ROWS = 1024


def write_random(folder: Path, config: Glm4Config) -> None:
    """Norms of ones and N(0, 0.02) elsewhere, the same block of noise over and over."""
    with torch.device("meta"):
        planned = [
            PlannedTensor(name, torch.bfloat16, tuple(parameter.shape))
            for name, parameter in Glm4ForCausalLM(config).named_parameters()
        ]
    noise = torch.randn(ROWS, config.intermediate_size, generator=torch.Generator().manual_seed(0)) * 0.02
    block = noise.bfloat16()
    with FolderWriter(folder, planned, shard_bytes=5 << 30) as writer:
        for tensor in planned:
            for start in range(0, tensor.shape[0], ROWS):
                count = min(ROWS, tensor.shape[0] - start)
                matrix = len(tensor.shape) == 2
                rows = block[:count, : tensor.shape[1]] if matrix else torch.ones(count, dtype=torch.bfloat16)
                writer.append(tensor.name, rows)
        writer.write_json("config.json", config.to_dict())


@contextmanager
def peak_anonymous() -> Iterator[dict[str, int]]:
    """Anonymous memory of this process before, and its peak inside (Linux)."""

    def now() -> int:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))

    found, running = {"before": now(), "peak": 0}, True

    def sample() -> None:
        while running:
            found["peak"] = max(found["peak"], now())
            time.sleep(0.005)

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield found
    finally:
        running = False
        thread.join()


def measure(folder: Path, quant: str | None, new_tokens: int, rounds: int = 3) -> dict[str, float]:
    """Seconds to load, peak memory, prefill of 128 tokens and decode, medians of the rounds."""
    with peak_anonymous() as memory:
        started = time.perf_counter()
        model: Glm4ForCausalLM = load(folder, quant=quant)
        seconds = time.perf_counter() - started
    prompt = torch.randint(0, 1000, (128,), generator=torch.Generator().manual_seed(0)).tolist()
    prefill, decode = [], []
    for _ in range(rounds):
        generation = Generation(model, prompt, SamplingParams(temperature=0, max_new_tokens=new_tokens))
        started = time.perf_counter()
        for _ in generation.prefill():
            pass
        prefill.append(len(prompt) / (time.perf_counter() - started))
        for _ in generation:
            pass
        decode.append((generation.new_tokens - 1) / generation.seconds)
    held = sum(value.nbytes for value in model.state_dict().values())
    return {
        "load_s": seconds,
        "weights_gib": held / 2**30,
        "peak_anonymous_gib": (memory["peak"] - memory["before"]) / 2**30,
        "prefill_tokens_per_s": statistics.median(prefill),
        "decode_tokens_per_s": statistics.median(decode),
        "decode_spread": max(decode) / min(decode),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="9b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--quant", default="int4")
    parser.add_argument("--new-tokens", type=int, default=32)
    arguments = parser.parse_args()
    changes = {**SHAPES[arguments.shape], "rms_norm_eps": 1e-5, "eos_token_id": None, "dtype": "bfloat16"}
    if arguments.layers:
        changes["num_hidden_layers"] = arguments.layers
    if not arguments.folder.exists():
        write_random(arguments.folder, Glm4Config(**changes))
    results = {"from bfloat16": measure(arguments.folder, arguments.quant, arguments.new_tokens)}
    quantized = arguments.folder.with_name(f"{arguments.folder.name}-{arguments.quant}")
    if not quantized.exists():
        quantize_checkpoint(arguments.folder, quantized, arguments.quant)
    results["pre-quantized"] = measure(quantized, None, arguments.new_tokens)
    for name, found in results.items():
        print(f"{name:14}", ", ".join(f"{key} {value:.2f}" for key, value in found.items()))
    print(json.dumps({"shape": arguments.shape, "quant": arguments.quant, **results}))


if __name__ == "__main__":
    main()
