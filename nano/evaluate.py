"""Measures `nano` end to end: `python -m nano.evaluate --quant none|int8|int4 --count 300`.

Each held-out dialogue runs through `ChatSession`, as in use: the model writes its calls, the tools give back the
dialogue's observations, the model answers. A turn is right when the calls are exactly the expected ones, in order, and
the answer holds every value it should pass on; small talk and refusals have to be the expected sentence. A dialogue is
right when all its turns are. The first dialogue is the README's: "What is 37 * 24?" with the built-in tools.
"""

from __future__ import annotations

import argparse
import collections
import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from glm4lite.base.events import TextDelta, ToolCallStarted
from glm4lite.chat.session import ChatSession
from glm4lite.engine.engine import Engine
from glm4lite.tools.builtin.tools import BUILTIN_TOOLS
from glm4lite.tools.tool import Tool
from nano.dialogues import Dialogue, generate
from nano.toolbox import Call, Schema, Step

README_PROMPT = Step(
    "What is 37 * 24?",
    (Call("calculator", {"expression": "37 * 24"}, "888"),),
    "37 * 24 = 888.",
    ("888",),
    "calculator",
)


@dataclass
class Score:
    """Right and all, per category of turns and for whole dialogues; and what went wrong."""

    right: collections.Counter[str] = field(default_factory=collections.Counter)
    total: collections.Counter[str] = field(default_factory=collections.Counter)
    failures: list[dict[str, Any]] = field(default_factory=list)

    def add(self, name: str, right: bool) -> None:
        self.right[name] += right
        self.total[name] += 1

    def table(self) -> str:
        names = [name for name in sorted(self.total) if name not in ("turn", "dialogue")] + ["turn", "dialogue"]
        rows = [
            f"| {name} | {self.right[name]}/{self.total[name]} | {self.right[name] / self.total[name]:.1%} |"
            for name in names
        ]
        return "\n".join(["| category | right | share |", "| --- | --- | --- |", *rows])


def held_out_dialogues(count: int, seed: int) -> list[Dialogue]:
    """The README's dialogue, then generated ones with reserved values."""
    rng = random.Random(f"evaluate {seed}")
    readme = Dialogue(tuple(tool.schema()["function"] for tool in BUILTIN_TOOLS), "", (README_PROMPT,))
    return [readme, *(generate(rng, held_out=True, most_turns=3) for _ in range(count - 1))]


def _tool(schema: Schema, observe: Callable[[str, dict[str, Any]], str]) -> Tool:
    def function(**arguments: Any) -> str:
        return observe(str(schema["name"]), arguments)

    return Tool(schema["name"], schema["description"], schema["parameters"], function)


def evaluate_dialogue(engine: Engine, dialogue: Dialogue, score: Score) -> None:
    """Runs the turns of one dialogue; the history is what the model itself said."""
    expected: list[Call] = []

    def observe(name: str, arguments: dict[str, Any]) -> str:
        for call in expected:
            if call.name == name and call.arguments == arguments:
                return call.observation
        return "Error: not found"

    session = ChatSession(
        engine,
        [_tool(schema, observe) for schema in dialogue.tools],
        dialogue.system or None,
        engine.params(max_new_tokens=300),
        max_tool_rounds=2,
    )
    whole = True
    for step in dialogue.steps:
        expected[:] = step.calls
        events = list(session.send(step.user))
        calls = [(event.name, event.arguments) for event in events if isinstance(event, ToolCallStarted)]
        answer = "".join(event.text for event in events if isinstance(event, TextDelta))
        right = calls == [(call.name, call.arguments) for call in step.calls] and all(
            fact in answer for fact in step.facts
        )
        whole &= right
        score.add(step.category, right)
        score.add("turn", right)
        if not right:
            wanted = {"calls": [(c.name, c.arguments) for c in step.calls], "answer": step.answer}
            tools = [schema["name"] for schema in dialogue.tools]
            found = {"calls": calls, "answer": answer}
            score.failures.append(
                {"category": step.category, "tools": tools, "user": step.user, "wanted": wanted, "found": found}
            )
    score.add("dialogue", whole)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=str, default="nano", help="a checkpoint folder, or nano")
    parser.add_argument("--quant", choices=("none", "int8", "int4"), default="none")
    parser.add_argument("--count", type=int, default=300, help="dialogues")
    parser.add_argument("--seed", type=int, default=2026)
    parser.add_argument("--failures", type=Path, help="write the wrong turns there, one JSON object a line")
    arguments = parser.parse_args()
    engine = Engine.load(arguments.model, quant=None if arguments.quant == "none" else arguments.quant)
    score, started = Score(), time.monotonic()
    for dialogue in held_out_dialogues(arguments.count, arguments.seed):
        evaluate_dialogue(engine, dialogue, score)
    if arguments.failures:
        lines = [json.dumps(failure, ensure_ascii=False) + "\n" for failure in score.failures]
        arguments.failures.write_text("".join(lines), encoding="utf-8")
    print(f"{arguments.model}, {arguments.quant}, {arguments.count} dialogues, {time.monotonic() - started:.0f} s")
    print(score.table())


if __name__ == "__main__":
    main()
