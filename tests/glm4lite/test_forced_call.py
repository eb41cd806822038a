"""Forced calls: whatever a model would rather say, what comes out is a call of an allowed tool."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch

import glm4lite
from glm4lite.engine.forced_call import ForcedCall
from glm4lite.text.json_prefix import JsonObject
from glm4lite.text.output_parser import Call, OutputParser, parse_arguments
from glm4lite.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer.from_folder(Path(glm4lite.__file__).parent / "nano")
STOP, SEPARATOR = TOKENIZER.special["<|observation|>"], TOKENIZER.special["<|assistant|>"]

OBJECTS = [
    "{}",
    ' {"a" : 1 , "b":[ ] }',
    r'{"k\"ey": "v\\ \n \u00e9", "n": [-0.5e+10, 12, 0, true, false, null, {"x": {}}]}',
    '{"城市": "北京 🙂"}',
    '{"a": 1e5, "b": -3, "c": 0.25E-7}',
]
NO_OBJECTS = [
    "[]", "1", "{a: 1}", "{'a': 1}", '{"a" 1}', '{"a": 01}', '{"a": 1,}', '{"a": [1,]}', '{"a": +1}', '{"a": .5}',
    '{"a": tru}', '{"a": "line\nbreak"}', '{"a": "\\x"}', '{"a": NaN}', '{"a": 1e999}', '{"a": "\\ud800"}',
    '{"a": 1}}', '{"a": 1} x', '{"a": [}', "{,}", '{"a": ' + "1" * 400 + "}", '{"a":' + "[" * 40 + "]" * 40 + "}",
]  # fmt: skip


@pytest.mark.parametrize("text", OBJECTS)
def test_an_object_is_accepted_byte_by_byte_and_complete_at_its_end_only(text: str) -> None:
    place: JsonObject | None = JsonObject()
    body = text.encode()
    for index in range(len(body)):
        assert place is not None
        assert not place.complete
        place = place.then(body[index : index + 1])
    assert place is not None
    assert place.complete
    assert parse_arguments(text) is not None


@pytest.mark.parametrize("text", NO_OBJECTS)
def test_what_is_no_object_never_completes(text: str) -> None:
    place = JsonObject().then(text.encode())
    assert place is None or not place.complete


def test_the_way_on_leads_to_an_object_from_anywhere() -> None:
    for text in OBJECTS:
        body = text.strip().encode()
        for end in range(len(body)):
            written, place = body[:end], JsonObject().then(body[:end])
            for _ in range(60):
                assert place is not None
                if place.complete:
                    break
                letter = place.way_on().encode()
                written, place = written + letter, place.then(letter)
            assert isinstance(json.loads(written.decode("utf-8", "replace")), dict), written


def write(force: ForcedCall, seed: int, most: int = 400) -> tuple[str, int]:
    """What a model of random logits says under `force`, and how it ends."""
    generator = torch.Generator().manual_seed(seed)
    said: list[int] = []
    for _ in range(most):
        logits = torch.randn(TOKENIZER.size, generator=generator)
        token = force(int(logits.argmax()), logits)
        if token in (STOP, SEPARATOR):
            return TOKENIZER.text(said), token
        said.append(token)
    return TOKENIZER.text(said), -1


@pytest.mark.parametrize("seed", range(20))
def test_even_random_logits_give_a_call_of_an_allowed_tool(seed: int) -> None:
    names = {"get_weather", "get", "调用.tool-2"}
    said, end = write(ForcedCall(TOKENIZER, names, [STOP]), seed)
    name, newline, arguments = said.partition("\n")
    assert (name in names, newline) == (True, "\n")
    if end == -1:  # cut by the length: what is there is still the beginning of an object
        place = JsonObject().then(arguments.encode()[:20])
        assert place is not None
        return
    parser = OutputParser(names)
    assert parser.feed(said) == []
    [call] = parser.finish()
    assert isinstance(call, Call)
    assert call.name == name
    json.loads(call.arguments)


def test_what_the_model_wants_is_taken_where_it_fits() -> None:
    wanted = [*TOKENIZER.ids('calculator\n{"expression": "37 * 24"}'), SEPARATOR, *TOKENIZER.ids("\nHi")]
    force = ForcedCall(TOKENIZER, ["unit_convert", "calculator"], [STOP, SEPARATOR])
    assert [force(token, torch.zeros(TOKENIZER.size)) for token in wanted] == wanted


def test_behind_the_call_only_an_ending_comes() -> None:
    wanted = TOKENIZER.ids("calculator\n{}") + TOKENIZER.ids(" and more")
    force = ForcedCall(TOKENIZER, ["calculator"], [STOP])
    given = [force(token, torch.zeros(TOKENIZER.size)) for token in wanted]
    assert given[len(TOKENIZER.ids("calculator\n{}"))] == STOP


def test_random_bytes_never_raise() -> None:
    rng = random.Random(0)
    for _ in range(300):
        JsonObject().then(bytes(rng.choice(b'{}[]",:\\u0019-+.eEtrfalsn ') for _ in range(30)))
