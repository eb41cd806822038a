"""Stop texts cut a stream at the same place however it is chunked; stop ids are a union."""

import random
from pathlib import Path

import pytest

import glm4lite
from glm4lite.base.errors import ConfigError
from glm4lite.engine.stop_ids import stop_ids
from glm4lite.model.config import Glm4Config
from glm4lite.text.stop_strings import StopStrings
from glm4lite.text.tokenizer import Tokenizer


def test_any_chunking_stops_at_the_same_place() -> None:
    text, stops = "abcabdabcabcd and more", ("abcabcd", "zz")
    for seed in range(50):
        rng, matcher, given, rest = random.Random(seed), StopStrings(stops), "", text
        while rest:
            size = rng.randint(1, 5)
            given += matcher.feed(rest[:size])
            rest = rest[size:]
        assert given + matcher.finish() == "abcabd"
        assert matcher.found


def test_of_two_stop_texts_the_one_that_is_whole_first_cuts() -> None:
    for size in (1, 2, 3, 9):
        matcher = StopStrings(("abc", "b"))
        given = "".join(matcher.feed("xabcx"[place : place + size]) for place in range(0, 5, size))
        assert given + matcher.finish() == "xa"


def test_the_beginning_of_a_stop_text_is_given_when_the_answer_ends() -> None:
    matcher = StopStrings(("STOP",))
    assert matcher.feed("go on ST") == "go on "
    assert matcher.finish() == "ST"
    assert not matcher.found


def test_stop_ids_are_the_union_of_config_generation_config_and_tokenizer() -> None:
    tokenizer = Tokenizer.from_folder(Path(glm4lite.__file__).parent / "nano")
    config = Glm4Config(vocab_size=tokenizer.size, eos_token_id=3)
    names = ("<|endoftext|>", "<|user|>", "<|observation|>")
    wanted = {3, 4, 5, *(tokenizer.special[name] for name in names)}
    assert stop_ids(config, {"eos_token_id": [4, 5, 10**6]}, tokenizer) == wanted
    assert stop_ids(config, {"eos_token_id": 4}, tokenizer) == wanted - {5}
    with pytest.raises(ConfigError, match="eos_token_id must be whole numbers, found 'x'"):
        stop_ids(config, {"eos_token_id": "x"}, tokenizer)
