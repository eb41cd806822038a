"""glm4lite beside its peers: same weights, same threads, one run, repetitions interleaved.

`python -m bench.peers [--shape 9b] [--layers N] [--rounds 5] [--work FOLDER] [--engines NAME,...]` writes a checkpoint
of random weights, quantizes it with each engine's own quantizer, then measures in rounds: each engine once a round,
each in a process of its own that loads, warms up and times a prompt of 128 tokens and the tokens after it. Ratios are
of one round and one group (int4, int8), so a noisy minute hits both sides. A table for people, one JSON line last.

llama.cpp runs where llama-cpp-python is installed (bench/llama.py says how to build it). NF4, torch-int4 and bf16 are
linear layers only, times the number of layers, with random weights of the same shapes. All 40 layers of the 9B take
about 56 GB of disk at the worst moment and half an hour; `--layers 4` takes 13 GB and some minutes. Files that are in
the work folder already are used and stay there; without --work everything is deleted at the end. Several sequences at
once are bench/batched.py's.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.comparison import engine_table, target_table, targets
from bench.make_checkpoint import SHAPES
from bench.peer_files import Files
from glm4lite import Glm4liteError
from glm4lite.measure.benchmark import versions

SECONDS = 900  # for one engine's repetition, loading a cold file included


@dataclass(frozen=True)
class Engine:
    """A row of the table: what it is called, its kind for bench/engines.py, its file, the group it is compared in."""

    row: str
    name: str
    kind: str
    file: str
    group: str


ENGINES = (
    Engine("glm4lite-int4", "glm4lite int4", "glm4lite", "int4", "int4"),
    Engine("q4_0", "llama.cpp Q4_0", "llama", "Q4_0", "int4"),
    Engine("q4_k_m", "llama.cpp Q4_K_M", "llama", "Q4_K_M", "int4"),
    Engine("nf4", "bitsandbytes NF4 (linears only, head bf16)", "nf4", "config", "int4"),
    Engine("torch-int4", "torch int4 (linears only)", "torch-int4", "config", "int4"),
    Engine("bf16", "torch bf16 (linears only)", "bf16", "config", "int4"),
    Engine("glm4lite-int8", "glm4lite int8", "glm4lite", "int8", "int8"),
    Engine("q8_0", "llama.cpp Q8_0", "llama", "Q8_0", "int8"),
)
PACKAGES = {"llama": ("llama_cpp", "llama-cpp-python"), "nf4": ("bitsandbytes", "bitsandbytes")}


def absent(engine: Engine) -> str:
    """Why an engine cannot run here, "" where it can."""
    module, package = PACKAGES.get(engine.kind, ("torch", "torch"))
    if importlib.util.find_spec(module) is None:
        return f"not installed: pip install {package}"
    if engine.kind == "llama" and importlib.util.find_spec("gguf") is None:
        return "not installed: pip install gguf"
    return ""


def measure(engine: Engine, files: Files, threads: int, new_tokens: int, *more: str) -> dict[str, Any] | None:
    """One repetition in a process of its own; None, and a line on stderr, where it failed.

    more: further options of bench/engines.py.
    """
    command = [sys.executable, "-m", "bench.engines", engine.kind, str(files.path(engine.file))]
    command += ["--threads", str(threads), "--new-tokens", str(new_tokens), *more]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=True)
    except subprocess.CalledProcessError as error:
        why = error.stderr.strip().splitlines()[-1:] or [f"exit code {error.returncode}"]
        sys.stderr.write(f"{engine.name} failed: {why[0]}\n")
        return None
    except subprocess.TimeoutExpired:
        sys.stderr.write(f"{engine.name} failed: no result within {SECONDS} s\n")
        return None
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def run_rounds(engines: Sequence[Engine], files: Files, given: argparse.Namespace) -> dict[str, list[Any]]:
    """Row -> one result a round. Every second round goes backwards, so that no engine always follows the same one."""
    results: dict[str, list[Any]] = {engine.row: [] for engine in engines}
    for group in ("int4", "int8"):  # one after the other: all files together do not fit into the page cache
        members = [engine for engine in engines if engine.group == group]
        for index in range(given.rounds):
            for engine in members if index % 2 == 0 else reversed(members):
                found = measure(engine, files, given.threads, given.new_tokens)
                results[engine.row].append(found)
                if found:
                    speeds = f"{found['prefill_tokens_per_s']:.2f} and {found['decode_tokens_per_s']:.2f} tok/s"
                    sys.stderr.write(f"round {index + 1} of {given.rounds}: {engine.name}: {speeds}\n")
    return results


def report(engines: Sequence[Engine], results: dict[str, list[Any]], files: Files, given: argparse.Namespace) -> None:
    """Tables for people, then one JSON line."""
    own = {engine.row: f"glm4lite-{engine.group}" for engine in engines}
    notes = {engine.row: why for engine in engines if (why := absent(engine))}
    held = targets(results)
    layers = files.config.num_hidden_layers
    print(f"\n{machine()}, {given.threads} threads, {time.strftime('%Y-%m-%d')}; {given.shape}, {layers} layers,")
    print(
        f"128 tokens of prompt, {given.new_tokens} new ones, {given.rounds} rounds: median (slowest to fastest round)"
    )
    print(f"`python {' '.join(sys.argv)}`\n")
    print("\n".join(engine_table({engine.row: engine.name for engine in engines}, own, results, notes)))
    print()
    print("\n".join(target_table(held)))
    if files.seconds:
        print("\nseconds to make the files: " + ", ".join(f"{k} {v:.0f}" for k, v in files.seconds.items()))
    facts = {"machine": machine(), "threads": given.threads, "shape": given.shape, "layers": layers}
    facts |= {"versions": versions(), "made_s": files.seconds}
    print(json.dumps(facts | {"targets": held, "results": results}))


def machine() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


@contextmanager
def work_folder(given: Path | None) -> Iterator[Path]:
    """The folder given, or a temporary one that is gone afterwards."""
    if given is not None:
        yield given
        return
    with tempfile.TemporaryDirectory(prefix="glm4lite-peers-") as folder:
        yield Path(folder)


def arguments() -> argparse.Namespace:
    rows = [engine.row for engine in ENGINES]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shapes = [name for name, values in SHAPES.items() if values.get("model_type", "glm4") == "glm4"]
    parser.add_argument("--shape", choices=shapes, default="9b")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--work", type=Path, help="folder for the files; what is in it is used and kept")
    parser.add_argument("--engines", default=",".join(rows), help=f"some of {', '.join(rows)}")
    given = parser.parse_args()
    given.engines = given.engines.split(",")
    if not 1 <= given.threads <= (os.cpu_count() or 1) or given.rounds < 1 or given.new_tokens < 2:
        parser.error(f"--threads goes from 1 to {os.cpu_count()}, --rounds from 1, --new-tokens from 2")
    unknown = [name for name in given.engines if name not in rows]
    if unknown:
        parser.error(f"--engines: {unknown[0]!r} is not known; use some of {', '.join(rows)}")
    return given


def main() -> None:
    given = arguments()
    engines = [engine for engine in ENGINES if engine.row in given.engines]
    present = [engine for engine in engines if not absent(engine)]
    try:
        with work_folder(given.work) as folder:
            files = Files(folder, given.shape, given.layers, {engine.file for engine in present}, given.threads)
            files.check_disk()
            files.make()
            report(engines, run_rounds(present, files, given), files, given)
    except (Glm4liteError, subprocess.CalledProcessError) as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)


if __name__ == "__main__":
    main()
