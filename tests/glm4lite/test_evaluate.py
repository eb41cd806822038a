"""glm4lite eval: perplexity and KL divergence against plain formulas, and the texts and models it refuses."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from glm4lite import load
from glm4lite.base.errors import EvaluationError
from glm4lite.cli.app import main
from glm4lite.engine.engine import Engine
from glm4lite.measure.evaluate import Choice, cut_windows, evaluate, window_logits
from tests.glm4lite.checkpoints import tiny_config, write_checkpoint

TEXT = "What is 37 * 24? The answer is 888. It is sunny in Paris today, and the tower is 330 metres tall. " * 40
NANO = Choice("nano", "none", "float32")


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> object:
    monkeypatch.setattr(sys, "argv", ["glm4lite", *map(str, arguments)])
    with pytest.raises(SystemExit) as left:
        main()
    return left.value.code


@pytest.fixture(scope="module")
def nano() -> Engine:
    return NANO.load(None)


def plain_log_probabilities(ids: list[int], quant: str = "none") -> torch.Tensor:
    """[T, vocab]: of each token of the second half, by one pass over everything."""
    model = load("nano", quant=quant, dtype="float32")
    with torch.inference_mode():
        logits = model(torch.tensor([ids])).logits[0]
    return logits.double().log_softmax(-1)[len(ids) // 2 - 1 : -1]


def test_windows_do_not_overlap_and_each_has_the_prefix(nano: Engine) -> None:
    ids = nano.tokenizer.ids(TEXT)
    windows = cut_windows(nano, TEXT)
    assert len(windows) > 1
    assert all(len(window) == 512 and window[:2] == nano.tokenizer.prefix_ids for window in windows)
    joined = [token for window in windows for token in window[2:]]
    assert joined == ids[: len(joined)]
    assert len(ids) - len(joined) < 510


def test_the_second_half_is_scored_by_what_comes_before_it(nano: Engine) -> None:
    ids = cut_windows(nano, TEXT)[0]
    got = window_logits(nano, ids)
    assert got.shape == (256, 1280)
    torch.testing.assert_close(got.double().log_softmax(-1), plain_log_probabilities(ids), atol=1e-4, rtol=0)


def test_perplexity_and_divergence_are_the_formulas(nano: Engine) -> None:
    found = evaluate(Choice("nano", "int4"), TEXT, NANO, windows=1)
    ids = cut_windows(nano, TEXT)[0]
    mine, theirs = plain_log_probabilities(ids, "int4"), plain_log_probabilities(ids)
    targets = torch.tensor(ids[256:])
    loss = -mine[torch.arange(256), targets]
    assert found.scored_tokens == 256
    assert found.perplexity == pytest.approx(math.exp(loss.mean()), rel=1e-3)
    assert found.perplexity_error == pytest.approx(found.perplexity * float(loss.std()) / 16, rel=1e-2)
    assert found.against is not None
    divergence = (theirs.exp() * (theirs - mine)).sum(-1)
    assert found.against.kl_divergence == pytest.approx(float(divergence.mean()), rel=1e-3)
    assert found.against.kl_divergence > 0
    agreement = (mine.argmax(-1) == theirs.argmax(-1)).double().mean()
    assert found.against.top1_agreement == pytest.approx(float(agreement), abs=0.01)
    other = math.exp(-theirs[torch.arange(256), targets].mean())
    assert found.against.delta_perplexity == pytest.approx(found.perplexity - other, rel=1e-2, abs=1e-2)


def test_a_model_against_itself_does_not_differ() -> None:
    found = evaluate(Choice("nano"), TEXT, Choice("nano"), windows=1).against
    assert found is not None
    assert (found.kl_divergence, found.top1_agreement, found.delta_perplexity) == (0.0, 1.0, 0.0)


def test_a_short_text_is_one_shorter_window() -> None:
    found = evaluate(NANO, TEXT[:200])
    assert found.windows == 1
    assert 32 < found.window_tokens < 512
    with pytest.raises(EvaluationError, match="at least 32 are needed"):
        evaluate(NANO, "hello")


def test_a_context_shorter_than_a_window_bounds_it(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "short", tiny_config(max_position_embeddings=64))
    assert evaluate(Choice(str(folder), "none"), TEXT, windows=2).window_tokens == 64


def test_json_is_one_object(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "text.txt"
    file.write_text(TEXT, encoding="utf-8")
    options = ["--against", "nano", "--against-quant", "none", "--windows", "1", "--json"]
    assert run(monkeypatch, "eval", "nano", "--text", file, *options) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert found["prefix"] == "[gMASK]<sop>"
    assert found.keys() >= {"perplexity", "kl_divergence", "kl_divergence_error", "top1_agreement", "delta_perplexity"}


def test_the_prefix_and_the_figures_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "text.txt"
    file.write_text(TEXT, encoding="utf-8")
    assert run(monkeypatch, "eval", "nano", "--text", file, "--windows", "1", "--against", "nano") == 0
    shown = capsys.readouterr().out
    for word in ("[gMASK]<sop>", "perplexity", "KL divergence", "same top token"):
        assert word in shown


def test_other_vocabularies_are_refused(tmp_path: Path) -> None:
    tiny = Choice(str(write_checkpoint(tmp_path / "tiny", tiny_config())), "none")
    with pytest.raises(EvaluationError, match="same vocabulary"):
        evaluate(tiny, TEXT, NANO)


def test_other_tokens_of_the_same_number_are_refused(tmp_path: Path) -> None:
    config = tiny_config(vocab_size=1280)
    folder = tmp_path / "other"
    write_checkpoint(folder, config)
    with pytest.raises(EvaluationError, match="different tokens"):
        evaluate(Choice(str(folder), "none"), TEXT, NANO)


def test_less_than_one_window_is_refused() -> None:
    with pytest.raises(EvaluationError, match="windows is 0"):
        evaluate(NANO, TEXT, windows=0)
