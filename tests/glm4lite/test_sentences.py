"""Sentences with values: English for all, and what another language needs."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from glm4lite.base.errors import HubError, QueueFull, said_by
from glm4lite.base.sentences import Sentence

LONG = Sentence("it takes {all}", all=["1", 2000])
NESTED = Sentence("{name}: {why}, {count}", name="a{why}.txt", why=LONG, count=1234)


def test_a_sentence_is_its_text_with_commas_in_numbers_and_lists() -> None:
    assert NESTED == "a{why}.txt: it takes 1, 2,000, 1,234"
    assert Sentence("{a} and {b}", a="x") == "x and {b}"
    assert Sentence('{"json": {n}}', n=1) == '{"json": 1}'


def test_pattern_and_values_come_along() -> None:
    sent = json.loads(json.dumps(NESTED.to_json()))
    for again in (copy.deepcopy(NESTED), Sentence.from_json(sent)):
        assert again == NESTED
        assert again.to_json() == sent
    assert json.dumps(NESTED) == json.dumps(str(NESTED))


def test_what_is_no_sentence_is_refused() -> None:
    wrong: list[Any] = [None, 5, [], {}, {"said": 5}, {"said": "x", "values": []}]
    for data in (*wrong, {"said": "x", "values": {"a b": 1}}):
        with pytest.raises(ValueError, match="sentence"):
            Sentence.from_json(data)
    assert Sentence.from_json("{x}").to_json() == {"said": "{x}"}


def test_an_error_s_sentence_is_what_it_says_whoever_raised_it() -> None:
    error = HubError("{name} does not exist", name="{here}")
    assert str(error) == said_by(error) == "{here} does not exist"
    assert said_by(error).to_json() == {"said": "{name} does not exist", "values": {"name": "{here}"}}
    assert said_by(QueueFull(8, 3)).values == {"waiting": 8, "seconds": 3}
    assert said_by(HubError("with {braces}")).to_json() == {"said": "with {braces}"}
    assert said_by(KeyError()) == "KeyError"
    assert said_by(OSError(2, "No such\nfile")) == "[Errno 2] No such file"
