"""Several sequences at once, glm4lite beside llama.cpp: total tokens/s, one run, repetitions interleaved.

`python -m bench.batched [--shape 9b] [--layers N] [--rounds 5] [--sequences 1,2,4,8] [--ram SIZE] [--work FOLDER]`
makes or takes the files of bench/peers.py, then measures in rounds: each engine once a round, in a process of its own
that loads once and gives each number of sequences its turn (bench/sequences.py), every second round from the largest
down. llama.cpp gets several seq_ids in one llama_batch. Ratios are of one round. Tables for people, one JSON line last.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.comparison import Rounds, spread, target_table
from bench.make_checkpoint import SHAPES
from bench.peer_files import Files
from bench.peers import ENGINES, Engine, absent, machine, measure, work_folder
from glm4lite import Glm4liteError
from glm4lite.measure.benchmark import versions

COMPARED = [engine for engine in ENGINES if engine.kind in ("glm4lite", "llama")]
OWN, PEER = "glm4lite-int4", "q4_0"


@dataclass(frozen=True)
class Target:
    """glm4lite's tokens/s with so many sequences, over a peer's with as many or (None) its own with one."""

    sequences: int
    peer: str | None
    must: float
    aim: float

    @property
    def name(self) -> str:
        """For a table."""
        against = "one, same engine" if self.peer is None else "llama.cpp Q4_0 with as many"
        return f"{self.sequences} sequences at once against {against}"


AGAINST_LLAMA = Target(4, PEER, 1.8, 2.5)
AGAINST_ONE = {  # by whether the processor multiplies bytes in one instruction (VNNI, NEON's dot products)
    True: (Target(4, None, 2.8, 3.6), Target(8, None, 3.5, 5.0)),
    False: (Target(4, None, 2.3, 2.8), Target(8, None, 2.7, 3.5)),
}


def run_rounds(engines: Sequence[Engine], files: Files, given: argparse.Namespace) -> dict[str, list[Any]]:
    """Row -> one result a round."""
    results: dict[str, list[Any]] = {engine.row: [] for engine in engines}
    for index in range(given.rounds):
        turn = -1 if index % 2 else 1
        counts = ",".join(map(str, given.sequences[::turn]))
        for engine in engines[::turn]:
            limit = ("--ram", given.ram) if given.ram else ()
            found = measure(engine, files, given.threads, given.new_tokens, "--sequences", counts, *limit)
            results[engine.row].append(found)
            if found:
                speeds = ", ".join(f"{found['tokens_per_s'][str(count)]:.2f}" for count in given.sequences)
                sys.stderr.write(f"round {index + 1} of {given.rounds}: {engine.name}: {speeds} tok/s\n")
    return results


def ratios(own: Rounds, sequences: int, peer: Rounds, others: int) -> list[float]:
    """Of every round that both have: the first with so many sequences over the second with so many."""
    return [
        mine["tokens_per_s"][str(sequences)] / theirs["tokens_per_s"][str(others)]
        for mine, theirs in zip(own, peer, strict=True)
        if mine and theirs
    ]


def targets(results: Mapping[str, Rounds], counts: Sequence[int]) -> list[dict[str, Any]]:
    """Median, spread and verdict of each target whose engines and numbers of sequences were measured."""
    own = results.get(OWN, ())
    backend = next((one["backend"] for one in own if one), "")
    found = []
    for target in (AGAINST_LLAMA, *AGAINST_ONE["vnni" in backend or "neon" in backend]):
        peer = own if target.peer is None else results.get(target.peer, [None] * len(own))
        others = 1 if target.peer is None else target.sequences
        values = ratios(own, target.sequences, peer, others) if {target.sequences, others} <= {*counts} else []
        if values:
            median = statistics.median(values)
            entry = {"target": target.name, "must": target.must, "aim": target.aim, "median": median}
            found.append(entry | {"min": min(values), "max": max(values), "met": median >= target.must})
    return found


def table(engines: Sequence[Engine], results: Mapping[str, Rounds], counts: Sequence[int]) -> list[str]:
    """Markdown: total tokens/s, and below each engine how that stands to its own with the fewest sequences."""
    lines = ["| tok/s, all together | " + " | ".join(map(str, counts)) + " |", "|---" * (len(counts) + 1) + "|"]
    for engine in engines:
        if why := absent(engine):
            lines.append(f"| {engine.name} | {why} |" + " |" * (len(counts) - 1))
            continue
        rounds = results[engine.row]
        cells = [spread([one["tokens_per_s"][str(count)] for one in rounds if one], ".2f") for count in counts]
        lines.append(f"| {engine.name} | {' | '.join(cells)} |")
        cells = [spread(ratios(rounds, count, rounds, counts[0]), ".2f") for count in counts]
        lines.append(f"| … against its own with {counts[0]} | {' | '.join(cells)} |")
        own = f"glm4lite-{engine.group}"
        if engine.row != own and own in results:
            cells = [spread(ratios(results[own], count, rounds, count), ".2f") for count in counts]
            lines.append(f"| … glm4lite {engine.group} against it | {' | '.join(cells)} |")
    return lines


def report(engines: Sequence[Engine], results: dict[str, list[Any]], files: Files, given: argparse.Namespace) -> None:
    """Tables for people, then one JSON line."""
    held = targets(results, given.sequences)
    layers = files.config.num_hidden_layers
    backends = sorted({one["backend"] for rounds in results.values() for one in rounds if one})
    print(f"\n{machine()} ({', '.join(backends)}), {given.threads} threads, {time.strftime('%Y-%m-%d')};")
    print(f"{given.shape}, {layers} layers, 128 tokens of prompt and {given.new_tokens} new ones for each sequence,")
    print(f"{given.rounds} rounds: median (slowest to fastest round)\n`python {' '.join(sys.argv)}`\n")
    print("\n".join(table(engines, results, given.sequences)) + "\n")
    print("\n".join(target_table(held)))
    facts = {"machine": machine(), "threads": given.threads, "shape": given.shape, "layers": layers}
    print(json.dumps(facts | {"versions": versions(), "targets": held, "results": results}))


def arguments() -> argparse.Namespace:
    rows = [engine.row for engine in COMPARED]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shapes = [name for name, values in SHAPES.items() if values.get("model_type", "glm4") == "glm4"]
    parser.add_argument("--shape", choices=shapes, default="9b")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sequences", default="1,2,4,8", help="how many at once, fewest first")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--ram", help="for glm4lite: what does not fit is read from disk for each step")
    parser.add_argument("--work", type=Path, help="folder for the files; what is in it is used and kept")
    parser.add_argument("--engines", default=f"{OWN},{PEER}", help=f"some of {', '.join(rows)}")
    given = parser.parse_args()
    given.engines, asked = given.engines.split(","), given.sequences.split(",")
    given.sequences = [int(count) for count in asked if count.isdecimal() and int(count)]
    if len(given.sequences) != len(asked):
        parser.error("--sequences: use numbers from 1 on, such as 1,2,4,8")
    if unknown := [name for name in given.engines if name not in rows]:
        parser.error(f"--engines: {unknown[0]!r} is not known; use some of {', '.join(rows)}")
    if given.rounds < 1 or given.new_tokens < 1:
        parser.error("--rounds and --new-tokens go from 1")
    return given


def main() -> None:
    given = arguments()
    engines = [engine for engine in COMPARED if engine.row in given.engines]
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
