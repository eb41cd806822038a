"""What guessing ids is worth: the cost of a step by its rows, and the tokens a step that answers of a real model get.

    python -m bench.speculation rows CHECKPOINT [--rounds N] [--ram SIZE]
    python -m bench.speculation answers CHECKPOINT [--costs 1,1.1,...]
    python -m bench.speculation replay CHECKPOINT [--right 0.6] [--ram SIZE]

`rows` times steps of 1 to 16 ids behind a prompt, in turns (CHECKPOINT: the true shapes, see make_checkpoint.py).
`answers` lets a model write what it would write, greedily and sampled, and counts its steps; with the costs that `rows`
found (each relative to one row) it says what that makes on such a machine and model. `replay` answers twice in turns,
the second time with its first answer as guesses, of which the share `--right` is left as it was: the whole way through
the engine, with costs and odds learnt as always.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from glm4lite.engine.engine import Engine
    from glm4lite.model.step import Span

ROWS = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16)
CODE = """def total(prices, tax):
    result = 0
    for price in prices:
        result += price
    result = result * (1 + tax)
    return result


def average(values):
    if not values:
        return 0
    return sum(values) / len(values)


def largest(values):
    best = values[0]
    for value in values[1:]:
        if value > best:
            best = value
    return best
"""
PEOPLE = """Name: Ada Lovelace. Born: 10 December 1815. City: London. Job: mathematician.
Name: Alan Turing. Born: 23 June 1912. City: London. Job: computer scientist.
Name: Grace Hopper. Born: 9 December 1906. City: New York. Job: computer scientist.
"""
QUESTIONS = {
    "code edit": f"Rename the variable result to amount in this code and print the whole code again.\n{CODE}",
    "JSON from a text": f"Write this as a JSON list of objects with the keys name, born, city, job.\n{PEOPLE}",
    "summary": f"Summarize this text in two sentences.\n{PEOPLE}",
    "free chat": "Tell me how rainbows are made, and why the sky is blue.",
    "story": "Write a short story about a fisherman and the sea.",
}


def rows(path: str, rounds: int, ram: str | None) -> None:
    import torch

    from glm4lite import load

    model = load(path, device="cpu", ram=ram)
    ids = torch.randint(20, 5000, (1, 128), generator=torch.Generator().manual_seed(0))
    cache = model.new_cache()
    seconds: dict[int, list[float]] = {count: [] for count in ROWS}
    with torch.inference_mode():
        model(ids, past_key_values=cache, logits_to_keep=1)
        for turn in range(rounds + 1):
            for count in ROWS:
                cache.truncate(128)
                start = time.perf_counter()
                model(ids[:, :count], past_key_values=cache, logits_to_keep=count)
                if turn:  # the first is to warm up
                    seconds[count].append(time.perf_counter() - start)
    one = statistics.median(seconds[1])
    for count in ROWS:
        middle, low, high = statistics.median(seconds[count]), min(seconds[count]), max(seconds[count])
        say(f"{count} rows {middle * 1e3:7.1f} ms ({low * 1e3:.1f} to {high * 1e3:.1f}), {middle / one:.2f} of one")
    say("--costs " + ",".join(f"{statistics.median(seconds[count]) / one:.2f}" for count in ROWS))


def answers(path: str, costs: Sequence[float]) -> None:
    from glm4lite.chat.session import ChatSession
    from glm4lite.engine.engine import Engine
    from glm4lite.engine.speculation import Costs, Speculation

    class Given(Costs):
        def of(self, rows: int) -> float:
            return measured.of(rows)

    measured = Costs()
    for count, cost in zip(ROWS, costs, strict=True):
        measured.add(count, cost)

    engine = Engine.load(path, quant="int8", device="cpu")
    for name, question in QUESTIONS.items():
        for temperature in (0.0, 0.7):
            engine.scheduler.speculation = Speculation()
            engine.scheduler.speculation.costs = Given()
            steps = counted(engine)
            params = engine.params(temperature=temperature, max_new_tokens=256, seed=1)
            for _ in ChatSession(engine, params=params).send(question):
                pass
            taken, tokens = steps[1:], engine.totals.new_tokens
            engine.totals.new_tokens = 0
            rate = tokens / sum(measured.of(count) for count in taken)
            say(
                f"{name}, temperature {temperature}: {tokens} tokens in {len(taken)} steps, "
                f"{tokens / len(taken):.2f} a step, {rate:.2f} times as fast"
            )


def counted(engine: Engine) -> list[int]:
    """Grows by the rows of each step that is made from now on."""
    rows, step = list[int](), type(engine.model).step

    def counting(spans: Sequence[Span]) -> list[Tensor]:
        rows.append(sum(len(span.ids) for span in spans))
        return step(engine.model, spans)

    engine.model.step = counting  # type: ignore[method-assign]
    return rows


def replay(path: str, right: float, ram: str | None, rounds: int) -> None:
    from glm4lite.engine.decoding import Generation
    from glm4lite.engine.engine import Engine
    from glm4lite.engine.sampling import SamplingParams
    from glm4lite.engine.speculation import Speculation

    engine = Engine.load(path, device="cpu", ram=ram)
    prompt = random.Random(0).choices(range(20, 5000), k=128)
    params = SamplingParams(temperature=0, max_new_tokens=64)
    wanted = list(Generation(engine.model, prompt, replace(params, max_new_tokens=80)))

    class Replayed(Speculation):
        chance = random.Random(1)

        def find(self, last: Sequence[int], count: int) -> tuple[list[int], int]:
            at = generation.new_tokens
            return [token if self.chance.random() < right else 7 for token in wanted[at : at + count]], 24

    guesses, speeds = Replayed(), {"plain": list[float](), "guessed": list[float]()}
    for _ in range(rounds):
        for name, speculation in (("plain", None), ("guessed", guesses)):
            generation = Generation(engine.model, prompt, params, speculation=speculation)
            if list(generation) != wanted[: params.max_new_tokens]:
                raise SystemExit("another answer with guesses than without")
            speeds[name].append(generation.new_tokens / generation.seconds)
    for name, found in speeds.items():
        say(f"{name}: {statistics.median(found):.2f} tokens/s ({min(found):.2f} to {max(found):.2f})")
    say(f"{statistics.median(speeds['guessed']) / statistics.median(speeds['plain']):.2f} times as fast")


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main() -> None:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line does
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("rows", "answers", "replay"))
    parser.add_argument("path")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ram")
    parser.add_argument("--right", type=float, default=0.6)
    parser.add_argument("--costs", default="1,1.2,1.4,1.6,1.8,2,2.2,2.4,3.2,4", help="as `rows` says them")
    given = parser.parse_args()
    if given.what == "rows":
        rows(given.path, given.rounds, given.ram)
    elif given.what == "answers":
        answers(given.path, [float(cost) for cost in given.costs.split(",")])
    else:
        replay(given.path, given.right, given.ram, given.rounds)


if __name__ == "__main__":
    main()
