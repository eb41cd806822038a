"""Bodies that are wrong in one place, each place and each way: an answer, or one line that says what is wrong."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest

from tests.glm4lite.served import Served, scripted, served

SCHEMA = {"type": "object", "properties": {"a": {"type": "string", "enum": ["x"]}}, "required": ["a"]}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        "model": "nano",
        "messages": [
            {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
            {"role": "user", "content": "Hi", "name": "me"},
            {"role": "assistant", "tool_calls": [{"id": "c", "function": {"name": "f", "arguments": "{}"}}]},
            {"role": "tool", "tool_call_id": "c", "content": "x"},
        ],
        "tools": [{"type": "function", "function": {"name": "f", "description": "d", "parameters": SCHEMA}}],
        "tool_choice": "auto",
        "max_tokens": 4,
    },
    "/v1/responses": {
        "model": "nano",
        "instructions": "Be brief.",
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
            {"type": "reasoning", "id": "rs_1", "summary": []},
            {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c", "output": [{"type": "input_text", "text": "x"}]},
        ],
        "tools": [{"type": "function", "name": "f", "description": "d", "parameters": SCHEMA, "strict": False}],
        "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "f"}]},
        "text": {"format": {"type": "text"}, "verbosity": "low"},
        "reasoning": {"effort": "low", "summary": "auto"},
        "include": ["message.output_text.logprobs"],
        "metadata": {"a": "b"},
        "max_output_tokens": 4,
        "store": True,
    },
    "/v1/messages": {
        "model": "nano",
        "max_tokens": 4,
        "system": [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}],
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "Hm", "signature": "s"},
                    {"type": "tool_use", "id": "c", "name": "f", "input": {"a": "x"}},
                ],
            },
            {
                "role": "user",
                "content": [{"type": "tool_result", "tool_use_id": "c", "content": "x", "is_error": True}],
            },
        ],
        "tools": [{"name": "f", "description": "d", "input_schema": SCHEMA}],
        "tool_choice": {"type": "auto", "disable_parallel_tool_use": True},
        "thinking": {"type": "disabled"},
        "stop_sequences": ["zzz"],
        "metadata": {"user_id": "me"},
    },
    "/tokenize": {"model": "nano", "prompt": "Hi", "add_special_tokens": True, "return_token_strs": True},
    "/detokenize": {"model": "nano", "tokens": [1, 2, 3]},
}
DEEP: Any = "x"
for _ in range(40):
    DEEP = {"type": "object", "properties": {"a": DEEP}, "content": [DEEP], "items": DEEP} if _ < 4 else [DEEP]
ODD: list[Any] = [
    *(None, True, -1, 1.5, 10**19, "", "a\nb<|user|>", "\ud800", "y" * 10_000),
    *([], {}, [None], ["x"], {"type": []}, {"type": "text"}, {"\n": {}}, DEEP),
]


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value in a body."""
    if path:
        yield path
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(inner, (*path, key))


def changed(body: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    body = copy.deepcopy(body)
    inner: Any = body
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return body


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served(scripted(*["\nHi.<|user|>"] * 5000)) as running:
        yield running


@pytest.mark.parametrize("every", [3, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("path", BODIES)
def test_whatever_stands_in_one_place_there_is_an_answer_or_a_line_that_says_what_is_wrong(
    server: Served, path: str, every: int
) -> None:
    """In every place each odd value, or with the quick one each third, beginning with another in the next place."""
    assert server.post(path, BODIES[path]).status_code == 200
    for number, place in enumerate(places(BODIES[path])):
        for value in ODD[number % every :: every]:
            body = changed(BODIES[path], place, value)
            try:
                answer = server.http.post(path, json=body)
            except UnicodeEncodeError:  # the client cannot send that; a body in ASCII can
                answer = server.http.post(path, content=ascii_json(body), headers={"Content-Type": "application/json"})
            assert answer.status_code in (200, 400, 404), (place, value, answer.text[:300])
            if answer.status_code != 200:
                message = answer.json()["error"]["message"]
                assert 0 < len(message) < 700, (place, value, message)
                assert message.isprintable(), (place, value, message)
    assert server.http.get("/health").json() == {"status": "ok", "waiting": 0, "running": 0}


def ascii_json(body: dict[str, Any]) -> bytes:
    import json

    return json.dumps(body).encode("ascii")
