"""The recipe: batches, int4 rounding, and a short run that writes a whole checkpoint and can be resumed."""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import pytest
import torch

from glm4lite.model.attention import attend
from nano import batches, train
from nano.dialogues import generate
from nano.export import model_config
from nano.parallel import owners
from nano.render import encode
from nano.tokenizer import load

PACKAGE = Path(__file__).parents[2] / "glm4lite" / "nano"


@pytest.fixture(autouse=True)
def attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training puts its own in the model's place, which other tests of this process must not find."""
    monkeypatch.setattr("glm4lite.model.layers.attend", attend)


def test_a_chunk_is_reproducible_and_within_the_token_limit() -> None:
    tokenizer, rng = load(PACKAGE), random.Random(0)
    rows = [encode(tokenizer, generate(rng), None) for _ in range(40)]
    first = batches.group(rows, 2048, 0, random.Random(1))
    second = batches.group(rows, 2048, 0, random.Random(1))
    assert all(torch.equal(a.ids, b.ids) for a, b in zip(first, second, strict=True))
    assert sum(len(batch.ids) for batch in first) == len(rows)
    assert all(batch.ids.numel() <= 2048 or len(batch.ids) == 1 for batch in first)


def test_rounding_to_int4_leaves_sixteen_values_per_group() -> None:
    torch.manual_seed(0)
    weight = torch.randn(4, 64)
    rounded = train.round_to_int4(weight)
    assert all(len(group.unique()) <= 16 for group in rounded.view(-1, 32))
    assert (rounded - weight).abs().max() < 0.3


def test_every_parameter_is_updated_by_exactly_one_process() -> None:
    from glm4lite.model.config import Glm4Config
    from glm4lite.pretrained.models import Glm4ForCausalLM

    model = Glm4ForCausalLM(Glm4Config.from_dict(model_config(load(PACKAGE))))
    owner = owners(model, 2)
    assert set(owner) == {name for name, _ in model.named_parameters()}
    assert set(owner.values()) == {0, 1}


@pytest.mark.slow
def test_a_short_run_writes_a_checkpoint_and_can_be_resumed(tmp_path: Path) -> None:
    arguments = argparse.Namespace(
        minutes=60.0, steps=2, seed=0, rate=1e-3, tokens=1024, probes=2, probe_every=100, save_every=100, device="cpu",
        workers=1, threads=1, resume=False, out=tmp_path / "run", log=tmp_path / "log.jsonl", export=tmp_path / "nano",
    )  # fmt: skip
    train.train(arguments)
    assert (tmp_path / "nano" / "model.safetensors.index.json").is_file()
    arguments.resume, arguments.steps = True, 4
    train.train(arguments)
    steps = [json.loads(line)["step"] for line in arguments.log.read_text().splitlines()]
    assert steps == [2, 4]
