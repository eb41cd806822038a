"""Generated dialogues: seeded, in the declared form, and without anything reserved for evaluation."""

from __future__ import annotations

import random
import re

import pytest

from glm4lite.text.messages import ToolCall
from glm4lite.tools.builtin.tools import BUILTIN_TOOLS
from glm4lite.tools.running import run_tool
from nano.dialogues import Dialogue, generate
from nano.values import Values, is_reserved

JSON_TYPES: dict[str, type | tuple[type, ...]] = {"string": str, "number": (int, float), "integer": int}


def _dialogues(count: int, held_out: bool = False) -> list[Dialogue]:
    rng = random.Random(5)
    return [generate(rng, held_out) for _ in range(count)]


def test_the_same_seed_gives_the_same_dialogues() -> None:
    assert _dialogues(20) == _dialogues(20)


def test_arguments_have_the_declared_names_and_types() -> None:
    for dialogue in _dialogues(300):
        declared = {tool["name"]: tool["parameters"] for tool in dialogue.tools}
        for call in (call for step in dialogue.steps for call in step.calls):
            assert list(call.arguments) == declared[call.name]["required"]
            for name, value in call.arguments.items():
                assert isinstance(value, JSON_TYPES[declared[call.name]["properties"][name]["type"]])


def test_observations_of_the_calculator_are_its_own() -> None:
    calculator = BUILTIN_TOOLS[0]
    calls = [call for dialogue in _dialogues(200) for step in dialogue.steps for call in step.calls]
    calls = [call for call in calls if call.name == calculator.name]
    assert len(calls) > 20
    for call in calls:
        assert run_tool(calculator, ToolCall("1", call.name, call.arguments_json())).content == call.observation


def test_training_never_asks_for_the_numbers_of_the_readme() -> None:
    for dialogue in _dialogues(1000):
        for step in dialogue.steps:
            for call in step.calls:
                if call.name == "calculator":
                    numbers = re.findall(r"\d+(?:\.\d+)?", call.arguments["expression"])
                    assert not {"37", "24"} & set(numbers)


@pytest.mark.parametrize("kind", ["city", "person", "number", "word", "code", "date", "topic", "phone"])
@pytest.mark.parametrize("held_out", [False, True])
def test_open_values_stay_on_their_side_of_the_split(kind: str, held_out: bool) -> None:
    values = Values(random.Random(3), held_out)
    drawn = [values.draw(kind, chinese) for chinese in (False, True) for _ in range(100)]
    parts = [re.split(r"[.]", value)[0] for value in drawn] if kind == "number" else drawn
    assert all(is_reserved(part) == held_out for part in parts if len(part) > 1)


def test_a_right_answer_passes_on_what_the_tools_said() -> None:
    for dialogue in _dialogues(300, held_out=True):
        for step in dialogue.steps:
            assert all(fact in step.answer for fact in step.facts)
