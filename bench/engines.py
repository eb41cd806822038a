"""One engine, one measurement: loads, warms up, times a prompt and the tokens after it, prints one JSON object.

`python -m bench.engines KIND PATH --threads 2`; KIND is glm4lite, llama, nf4, torch-int4 or bf16. PATH is a checkpoint
folder, for llama a GGUF, and for the last three (linear layers only) a folder whose config.json gives the shapes.
bench/peers.py runs it once for each round, so that no engine's threads or memory disturb another. With --sequences
1,2,4 glm4lite and llama are timed with so many at once instead, for bench/batched.py.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
from pathlib import Path
from typing import Any

VOCABULARY = 151552


def glm4lite(path: Path, threads: int, prompt_tokens: int, new_tokens: int) -> dict[str, Any]:
    from glm4lite.measure.benchmark import benchmark
    from glm4lite_quant.kernels import native

    native.set_threads(threads)
    return benchmark(path, None, prompt_tokens, new_tokens, repetitions=1).to_json()


def llama_cpp(path: Path, threads: int, prompt_tokens: int, new_tokens: int) -> dict[str, Any]:
    from bench import llama

    prompt = random.Random(0).choices(range(VOCABULARY), k=prompt_tokens)
    return llama.measure(path, threads, prompt, new_tokens)


def at_once(
    kind: str, path: Path, threads: int, counts: list[int], prompt_tokens: int, new: int, ram: str | None = None
) -> dict[str, Any]:
    """Total tokens/s by the number of sequences, and what computed them."""
    from bench.sequences import Glm4liteSequences, Sequences, tokens_per_s

    model: Sequences
    if kind == "glm4lite":
        model = own = Glm4liteSequences(path, threads, ram)
        about = own.backend
    else:
        from bench.llama import Llama

        model, about = Llama(path, threads), "llama.cpp"
    speeds = tokens_per_s(model, counts, prompt_tokens, new, VOCABULARY)
    return {"backend": about, "tokens_per_s": {str(count): speed for count, speed in speeds.items()}}


def linears_only(kind: str, path: Path, threads: int, prompt_tokens: int) -> dict[str, Any]:
    import torch

    from bench import linears
    from glm4lite.model.config import Glm4Config

    torch.set_num_threads(threads)
    config = Glm4Config.from_dict(json.loads((path / "config.json").read_text(encoding="utf-8")))
    return linears.measure(kind, config, prompt_tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("glm4lite", "llama", "nf4", "torch-int4", "bf16"))
    parser.add_argument("path", type=Path)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--sequences", help="glm4lite and llama: so many at once, such as 1,2,4,8")
    parser.add_argument("--ram", help="glm4lite with --sequences: what does not fit is read from disk for each step")
    given = parser.parse_args()
    if given.kind == "glm4lite":
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line does, and only for it
    if given.sequences:
        counts = [int(count) for count in given.sequences.split(",")]
        found = at_once(given.kind, given.path, given.threads, counts, given.prompt_tokens, given.new_tokens, given.ram)
    elif given.kind == "glm4lite":
        found = glm4lite(given.path, given.threads, given.prompt_tokens, given.new_tokens)
    elif given.kind == "llama":
        found = llama_cpp(given.path, given.threads, given.prompt_tokens, given.new_tokens)
    else:
        found = linears_only(given.kind, given.path, given.threads, given.prompt_tokens)
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
