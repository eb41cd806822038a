"""What a restart with a kept prefix takes, beside computing it: `python -m bench.prefixes CHECKPOINT [--tokens 4000]`.

CHECKPOINT: the true shapes (see make_checkpoint.py). A cache of random keys and values stands for the computed prompt
and is kept as `--keep-prefixes` keeps one. New processes then load the model and take the prompt from the folder: with
the files in the system's memory, and after they were pushed out of it. Timed are reading, checking and laying into
memory, and the step of the last id behind it, which gives the first token. The folder is a temporary
one beside where `--folder` says, by default the system's.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def write(checkpoint: str, tokens: int, kv: str) -> None:
    """Keeps a made-up prompt, and says how long the writing took."""
    import torch

    from glm4lite.base.sizes import readable
    from glm4lite.engine.engine import Engine
    from glm4lite.engine.prefix_files import PrefixFolder

    engine = Engine.load(checkpoint, device="cpu", kv=kv, keep_prefixes="64GiB")
    config = engine.model.config
    cache = engine.prefixes.take(prompt(tokens))
    cache.ids = prompt(tokens)[:-1]
    for layer in cache.kv.layers:
        shape = (1, config.num_key_value_heads, tokens - 1, config.head_dim)
        layer.append(torch.randn(shape), torch.randn(shape))
    began = time.perf_counter()
    engine.prefixes.give(cache)
    engine.prefixes.close()
    seconds = time.perf_counter() - began
    (kept,) = PrefixFolder().models()
    print(f"written: {kept.tokens} tokens, {readable(kept.nbytes)} in {seconds:.2f} s", flush=True)


def read(checkpoint: str, tokens: int, kv: str) -> None:
    """Takes it, as the first request after a restart does."""
    from glm4lite.engine.engine import Engine
    from glm4lite.model.step import Span

    engine, ids = Engine.load(checkpoint, device="cpu", kv=kv, keep_prefixes="64GiB"), prompt(tokens)
    engine.model.step([Span(ids[:1], engine.model.new_cache())])  # the weights are there, as after any answer
    began = time.perf_counter(), time.process_time()
    cache = engine.prefixes.take(ids)
    engine.prefixes.extend(cache, ids, [])
    taken = time.perf_counter(), time.process_time()
    if len(cache.ids) != tokens - 1:
        raise SystemExit(f"{len(cache.ids)} of {tokens - 1} tokens were taken from the folder: nothing to measure")
    engine.model.step([Span(ids[len(cache.ids) :], cache.kv)])
    first = time.perf_counter()
    found = {"found": len(cache.ids), "take": taken[0] - began[0], "cpu": taken[1] - began[1]}
    print(json.dumps(found | {"step": first - taken[0]}))


def prompt(tokens: int) -> list[int]:
    return random.Random(tokens).choices(range(1000), k=tokens)


def forget(folder: Path) -> None:
    """The next read comes from the disk."""
    for path in folder.rglob("*.kv"):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--tokens", type=int, default=4000)
    parser.add_argument("--kv", default="float", choices=("float", "int8"))
    parser.add_argument("--folder", type=Path, help="where the prefixes lie for the length of the run")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=("write", "read"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.only:
        {"write": write, "read": read}[given.only](given.checkpoint, given.tokens, given.kv)
        return
    command = [sys.executable, "-m", "bench.prefixes", given.checkpoint, "--tokens", str(given.tokens)]
    command += ["--kv", given.kv, "--only"]
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        environment = os.environ | {"GLM4LITE_PREFIXES": folder, "OMP_WAIT_POLICY": "PASSIVE"}  # as in commands
        subprocess.run([*command, "write"], env=environment, check=True)
        for state in ("memory", "disk") * given.rounds:
            if state == "disk":
                forget(Path(folder))
            done = subprocess.run([*command, "read"], env=environment, check=True, stdout=subprocess.PIPE)
            found = json.loads(done.stdout.splitlines()[-1])
            print(
                f"from {state}: {found['found']} tokens in {found['take']:.2f} s ({found['cpu']:.2f} s of processor "
                f"time), then the first token's step in {found['step']:.2f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
