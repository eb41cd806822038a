"""The scripts in examples/ run as they stand, on the embedded model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(script: str, *arguments: str) -> str:
    command = [sys.executable, str(EXAMPLES / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("way", ["torch", "trainer", "head only"])
def test_a_classifier_learns_is_saved_and_gives_the_same_answers_again(way: str, tmp_path: Path) -> None:
    more = {"torch": (), "trainer": ("--trainer",), "head only": ("--head-only", "--learning-rate", "0.01")}[way]
    if way == "trainer":
        pytest.importorskip("accelerate", reason="Transformers' Trainer needs it")
    said = run("finetune_classifier.py", "--steps", "6", "--out", str(tmp_path / "classifier"), *more)
    assert "loaded again it gives the same answers" in said
    right = int(said.split(" of 200 new questions")[0].split()[-1])
    assert right > (180 if way != "head only" else 100), said
    assert (tmp_path / "classifier" / "model.safetensors").exists()
