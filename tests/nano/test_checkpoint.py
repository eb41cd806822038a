"""The embedded checkpoint: its form, its tokenizer, and that it does its job."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from glm4lite.engine.engine import Engine
from nano.evaluate import Score, evaluate_dialogue, held_out_dialogues
from nano.tokenizer import SPECIAL_TOKENS, load

PACKAGE = Path(__file__).parents[2] / "glm4lite" / "nano"


def test_all_files_together_are_at_most_12_mb() -> None:
    assert sum(file.stat().st_size for file in PACKAGE.iterdir()) <= 12_000_000


def test_the_config_is_a_small_glm4() -> None:
    config = json.loads((PACKAGE / "config.json").read_text(encoding="utf-8"))
    assert config["model_type"] == "glm4"
    assert config["attention_bias"]
    assert (config["partial_rotary_factor"], config["num_key_value_heads"]) == (0.5, 2)
    inputs = (config["hidden_size"], config["intermediate_size"], config["num_attention_heads"] * config["head_dim"])
    assert all(size % 128 == 0 for size in inputs)


def test_there_are_two_shards_and_an_index() -> None:
    index = json.loads((PACKAGE / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert set(index["weight_map"].values()) == {file.name for file in PACKAGE.glob("*.safetensors")}
    assert len(set(index["weight_map"].values())) == 2


def test_special_tokens_follow_the_base_vocabulary_in_the_order_of_0414() -> None:
    tokenizer = load(PACKAGE)
    ids = [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS]
    assert ids == list(range(tokenizer.get_vocab_size() - len(SPECIAL_TOKENS), tokenizer.get_vocab_size()))


def test_any_text_survives_the_tokenizer() -> None:
    tokenizer = load(PACKAGE)
    text = 'Zürich 東京 \U0001f600 \t\x00 naïve e\u0301 𠀀 37*24\r\n\n  {"a": 1}'
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("word", ["Vendrelli", "哈尔滨", "1048576", "gz-77"])
def test_a_word_has_the_same_pieces_in_a_sentence_and_in_json(word: str) -> None:
    tokenizer = load(PACKAGE)
    pieces = tokenizer.encode(word).ids
    for text in (f"What about {word}?", f'{{"city": "{word}"}}', f"那{word}呢"):
        ids = tokenizer.encode(text).ids
        assert any(ids[start : start + len(pieces)] == pieces for start in range(len(ids)))


@pytest.mark.parametrize("quant", [None, "int8", "int4"])
def test_the_readme_dialogue_is_answered(quant: str | None) -> None:
    score = Score()
    evaluate_dialogue(Engine.load(PACKAGE, quant=quant), held_out_dialogues(1, 0)[0], score)
    assert score.failures == []


@pytest.mark.slow
@pytest.mark.parametrize("quant", [None, "int8", "int4"])
def test_held_out_dialogues_are_right_end_to_end(quant: str | None) -> None:
    score, engine = Score(), Engine.load(PACKAGE, quant=quant)
    for dialogue in held_out_dialogues(100, 1):
        evaluate_dialogue(engine, dialogue, score)
    assert score.right["dialogue"] >= 0.92 * score.total["dialogue"], score.failures
