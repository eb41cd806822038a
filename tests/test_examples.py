"""The scripts in examples/ run as they stand, on the embedded model, and say what they promise."""

from __future__ import annotations

import ast
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


Run = Callable[..., str]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """What `python examples/SCRIPT ARGUMENTS` prints; run in this process, which has imported torch already."""

    def script(name: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        monkeypatch.syspath_prepend(EXAMPLES)
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return script


def right_answers(said: str) -> int:
    found = re.search(r"(\d+) of 200 new questions", said)
    assert found, said
    return int(found[1])


def losses(said: str) -> tuple[float, float]:
    found = re.search(r"loss: ([\d.]+) at first, ([\d.]+) at last", said)
    assert found, said
    return float(found[1]), float(found[2])


def test_a_tool_of_ones_own_is_asked_for_called_and_answered_from(run: Run) -> None:
    said = run("chat_with_a_tool.py")
    assert "may get_weather run with" in said
    assert "it answered: 18 degrees and sunny in Lisbon\nIt is 18 degrees." in said
    assert "37 * 24 = 888." in said
    assert said.count("tokens, stop)") == 3


def test_a_batch_gives_the_answers_it_gives_in_turn(run: Run) -> None:
    said = run("batch.py")
    assert "I am nano, a tiny demonstration model of glm4lite." in said
    assert "in turn they are the same" in said


def test_a_batch_file_is_answered_and_its_answers_found_again(run: Run, tmp_path: Path) -> None:
    said = run("batch_file.py", "nano", str(tmp_path))
    assert "Who are you?                         I am nano, a tiny demonstration model of glm4lite." in said
    assert said == run("batch_file.py", "nano", str(tmp_path))  # from the file


def test_what_is_streamed_is_what_is_returned(run: Run) -> None:
    said = run("streaming.py")
    assert "I am nano" in said
    assert "streamed and returned ids are the same" in said


def test_a_checkpoint_is_made_quantized_and_loaded(run: Run) -> None:
    said = run("custom_checkpoint.py")
    assert "loaded again it computes the same" in said
    assert int(re.search(r"as int4: [\d,]+ bytes, (\d+)%", said)[1]) < 25  # type: ignore[index]
    assert float(re.search(r"unquantized model: ([\d.]+)", said)[1]) < 0.01  # type: ignore[index]


@pytest.mark.parametrize("way", ["all weights", "head only"])
def test_a_classifier_learns_is_saved_and_gives_the_same_answers_again(run: Run, way: str, tmp_path: Path) -> None:
    more = ("--head-only", "--learning-rate", "0.01") if way == "head only" else ()
    said = run("finetune_classifier.py", "--steps", "6", "--out", str(tmp_path / "classifier"), *more)
    assert "loaded again it gives the same answers" in said
    first, last = losses(said)
    assert last < first
    assert right_answers(said) > (180 if way != "head only" else 100), said
    assert (tmp_path / "classifier" / "model.safetensors").exists()


def test_transformers_trainer_trains_the_same(run: Run) -> None:
    pytest.importorskip("accelerate", reason="Transformers' Trainer needs it")
    said = run("finetune_with_trainer.py", "nano", "6")
    first, last = losses(said)
    assert last < first
    assert right_answers(said) > 180


def test_every_example_is_short_says_what_it_shows_and_is_run_here() -> None:
    tests = Path(__file__).read_text(encoding="utf-8")
    for file in EXAMPLES.glob("*.py"):
        text = file.read_text(encoding="utf-8")
        assert len(text.splitlines()) < 80, file.name
        assert ast.get_docstring(ast.parse(text)), file.name
        assert f'"{file.name}"' in tests or file.name == "questions.py", f"{file.name} is run by no test"
