"""How long answers wait for each other: a short question beside running answers and a long prompt.

    python -m bench.waiting CHECKPOINT [--long 4000] [--answers 3] [--ram SIZE] [--rounds N]

Some answers run, then a long prompt comes, then a short one. Said are the first token of the short one, the longest gap
of the running answers meanwhile, and the time that one part of the long prompt and one plain step take.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import statistics
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from glm4lite.engine.engine import Engine
from glm4lite.engine.worker import EngineWorker

if TYPE_CHECKING:
    from torch import Tensor

    from glm4lite.model.step import Span


class Steps:
    """Seconds of every step, and the most ids that a sequence had in it."""

    def __init__(self, engine: Engine) -> None:
        self.made = list[tuple[float, int]]()
        step = engine.model.step

        def timed(spans: Sequence[Span]) -> list[Tensor]:
            began = time.perf_counter()
            logits = step(spans)
            self.made.append((time.perf_counter() - began, max(len(span.ids) for span in spans)))
            return logits

        engine.model.step = timed  # type: ignore[method-assign]


def answer(worker: EngineWorker, prompt: list[int], tokens: int, times: list[float]) -> threading.Thread:
    """A thread that notes when each token of its answer came: text waits for whole characters."""

    def job(engine: Engine) -> Iterator[int]:
        yield from engine.generate(prompt, engine.params(temperature=0.0, max_new_tokens=tokens))

    def read() -> None:
        for _ in worker.run(job):
            times.append(time.perf_counter())

    thread = threading.Thread(target=read)
    thread.start()
    return thread


def measure(worker: EngineWorker, steps: Steps, answers: int, long: int, seed: int) -> None:
    """One round, printed as a line."""
    chance = random.Random(seed)
    running = [list[float]() for _ in range(answers)]
    threads = [answer(worker, chance.choices(range(20, 5000), k=40), 120, times) for times in running]
    while any(thread.is_alive() and len(times) < 5 for thread, times in zip(threads, running, strict=True)):
        time.sleep(0.01)
    plain = statistics.median(seconds for seconds, ids in steps.made if ids == 1)
    began, first = time.perf_counter(), len(steps.made)
    threads.append(answer(worker, chance.choices(range(20, 5000), k=long), 1, []))
    time.sleep(0.5)
    asked, short = time.perf_counter(), list[float]()
    threads.append(answer(worker, chance.choices(range(20, 5000), k=40), 4, short))
    for thread in threads:
        thread.join()
    parts = [seconds for seconds, ids in steps.made[first:] if ids > 8]
    gaps = [b - a for times in running for a, b in itertools.pairwise(times) if b > began]
    say(
        f"short question: first token after {short[0] - asked:.2f} s; longest gap of the answers {max(gaps):.2f} s; "
        f"a part of the prompt {statistics.median(parts):.2f} s ({max(parts):.2f} at most), a step {plain:.2f} s"
    )


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main() -> None:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line does
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path")
    parser.add_argument("--long", type=int, default=4000)
    parser.add_argument("--answers", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ram")
    given = parser.parse_args()
    engine = Engine.load(given.path, device="cpu", ram=given.ram, speculate="off", parallel=given.answers + 2)
    steps, worker = Steps(engine), EngineWorker(engine)
    for seed in range(given.rounds):
        measure(worker, steps, given.answers, given.long, seed)
    worker.close()


if __name__ == "__main__":
    main()
