"""What a schema costs each step: the mask over the whole vocabulary, and taking the id that came.

    python -m bench.constraints FOLDER            # with tokenizer.json; --steps 2000, --step-ms 200, --sequences 4

Prints milliseconds of processor time a step for each kind of answer (median, 99 of 100, slowest), for one sequence and
for several, one behind the other as the scheduler draws them, and their share of a step of --step-ms; one JSON line
last. The answers are drawn from random logits among what may come, anew where one is whole. Ids that could be no others
take no mask and are not counted as steps.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from glm4lite.engine.constraint import Constraint, Grammars
from glm4lite.engine.engine import SEPARATOR
from glm4lite.text.grammar import AnswerForm, ToolForm
from glm4lite.text.tokenizer import Tokenizer

_WORDS = {"type": "string"}
_PERSON = {
    "type": "object",
    "properties": {
        "name": _WORDS,
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "born": {"type": "string", "format": "date"},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}},
        "note": {"anyOf": [_WORDS, {"type": "null"}]},
    },
    "required": ["name", "age", "born", "tags", "note"],
    "additionalProperties": False,
}
_TOOLS = tuple(ToolForm(f"tool_{number}", _PERSON) for number in range(16))
FORMS = {
    "any JSON object": AnswerForm({"type": "object"}),
    "an object of five fields": AnswerForm(_PERSON),
    "a list of them": AnswerForm({"type": "array", "items": _PERSON, "minItems": 50}),
    "a pattern": AnswerForm({"type": "array", "items": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{4}( [a-z]+)*$"}}),
    "text or calls of 16 tools": AnswerForm(tools=_TOOLS),
    "a call of 16 tools": AnswerForm(tools=_TOOLS, must_call=tuple(tool.name for tool in _TOOLS)),
}


class Answer:
    """One answer after the other, drawn at random."""

    def __init__(self, start: Constraint, stops: list[int], size: int, seed: int) -> None:
        self._start, self._stops, self._now = start, stops, start.copy()
        self._generator, self._size = torch.Generator().manual_seed(seed), size

    def step(self) -> float:
        """Draws an id; the seconds that its mask took, and that taking it did."""
        logits = torch.randn(self._size, generator=self._generator)
        began = time.thread_time()
        masked = self._now.masked(logits)
        spent = time.thread_time() - began
        token = int(masked.argmax())
        began = time.thread_time()
        over = token in self._stops
        if not over:
            self._now.accept([token])
            if forced := self._now.forced():
                self._now.accept(forced)
            over = self._now.complete
        spent += time.thread_time() - began
        if over:
            self._now = self._start.copy()
        return spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--step-ms", type=float, default=200.0)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = Tokenizer.from_folder(asked.folder)
    stops = sorted(tokenizer.stop_ids)
    grammars = Grammars(tokenizer, stops, tokenizer.special.get(SEPARATOR))
    began = time.thread_time()
    grammars.constraint(AnswerForm({"type": "boolean"}))
    print(f"{tokenizer.size} ids, made ready in {time.thread_time() - began:.2f} s")
    found = {}
    for name, form in FORMS.items():
        began = time.thread_time()
        start = grammars.constraint(form)
        compiled = 1e3 * (time.thread_time() - began)
        for several in (1, asked.sequences):
            answers = [Answer(start, stops, tokenizer.size, seed) for seed in range(several)]
            spent = [1e3 * sum(answer.step() for answer in answers) for _ in range(asked.steps)]
            cuts = statistics.quantiles(spent, n=100)
            kind = {"compiled_ms": compiled, "median": cuts[49], "p99": cuts[98], "slowest": max(spent)}
            kind["share"] = statistics.fmean(spent) / asked.step_ms
            found[f"{name}, {several}"] = {key: round(value, 4) for key, value in kind.items()}
            print(
                f"{name}, {several}: median {cuts[49]:.2f} ms, p99 {cuts[98]:.2f}, slowest {max(spent):.2f}; "
                f"{kind['share']:.2%} of a step of {asked.step_ms:g} ms; compiled in {compiled:.1f} ms"
            )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
