"""Bodies that would cost much: refused early, with little memory, and nobody else waits."""

from __future__ import annotations

import asyncio
import gc
import json
import random
import threading
import time
import tracemalloc
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.requests import Request

from glm4lite.server.body import DEEPEST, MOST_CONTAINERS, MOST_VALUES, Bodies, Structure
from glm4lite.server.errors import ApiError
from glm4lite.server.question import MOST_ITEMS, in_order
from glm4lite.server.requests import MOST_MESSAGES
from glm4lite.text.messages import Message, ToolCall
from tests.glm4lite.served import Served, scripted, served

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HELLO: dict[str, Any] = {"model": "nano", "messages": [{"role": "user", "content": "Hello"}]}


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served(scripted(*["\nHi.<|user|>"] * 50)) as running:
        yield running


def chat(messages: str, more: str = "") -> bytes:
    return f'{{"model":"nano","messages":[{messages}]{more}}}'.encode()


def user(text: str) -> str:
    return f'{{"role":"user","content":"{text}"}}'


def schema(members: str) -> bytes:
    function = f'{{"name":"a","parameters":{{"type":"object",{members}}}}}'
    return chat(user("Hi"), f',"tools":[{{"type":"function","function":{function}}}]')


CALLS = ",".join(f'{{"id":"{n}","function":{{"name":"a"}}}}' for n in range(60_000))
LARGE = {
    "lists": chat("[]," * 2_000_000 + "[]"),
    "objects": chat("{}," * 2_000_000 + "{}"),
    "messages": chat(",".join([user("")] * 200_000)),
    "parts": chat('{"role":"user","content":[' + "{}," * 1_000_000 + "{}]}"),
    "calls": chat(f'{{"role":"assistant","tool_calls":[{CALLS}]}}'),
    "members": chat(user("Hi"), "," + ",".join(f'"{n}":1' for n in range(300_000))),
    "wide schema": schema('"properties":{' + ",".join(f'"{n}":{{}}' for n in range(300_000)) + "}"),
    "long schema": schema('"description":"' + "x " * (3 << 20) + '"'),
    "floats": chat(user("Hi"), ',"x":[' + "1.5," * 1_500_000 + "1]"),
    "ids": b'{"model":"nano","prompt":[' + b"100," * 1_500_000 + b"1]}",
    "depth": chat("[" * 3_000_000 + "]" * 3_000_000),
    "long number": chat(user("Hi"), ',"x":' + "1" * 8_000_000),
    "escapes": chat(user("\\u0041" * 1_300_000)),
    "control words": chat(user("<|" * 3_000_000)),
    "words": chat(user("one two " * 1_000_000)),
    "arguments": chat(
        '{"role":"assistant","tool_calls":[{"id":"c","function":{"name":"a","arguments":"['
        + "[]," * 2_000_000
        + '[]]"}}]}'
    ),
}


def post(server: Served, body: bytes) -> Any:
    path = TEXT if b'"prompt"' in body[:40] else CHAT
    return server.http.post(path, content=body, headers={"Content-Type": "application/json"})


@pytest.mark.parametrize("body", LARGE.values(), ids=LARGE.keys())
def test_a_body_made_to_be_expensive_is_refused_with_little_memory(server: Served, body: bytes) -> None:
    tracemalloc.start()
    try:
        answer = post(server, body)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert answer.status_code == 400
    assert len(answer.json()["error"]["message"]) < 400
    assert peak < 6 * len(body)


def test_nobody_waits_for_such_bodies(server: Served) -> None:
    waits, over = list[float](), threading.Event()

    def watch() -> None:
        while not over.is_set():
            started = time.monotonic()
            assert server.http.get("/health").status_code == 200
            waits.append(time.monotonic() - started)

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        senders = [threading.Thread(target=post, args=(server, LARGE[name])) for name in ("lists", "words", "ids")]
        for sender in senders:
            sender.start()
        for sender in senders:
            sender.join()
    finally:
        over.set()
        watching.join()
    assert max(waits) < 1  # 0.2 s on a quiet machine; it was 5 s and more


def structure_of(text: bytes, piece: int, context: int = 0) -> dict[str, int]:
    counting = Structure(context)
    for start in range(0, len(text), piece):
        counting.feed(text[start : start + piece])
    return counting.found


def counted(value: Any) -> dict[str, int]:
    """The same counts from parsed JSON."""
    total = {"lists and objects": 0, "members": 0, "values": 0}
    if isinstance(value, list | dict):
        inner = list(value.values()) if isinstance(value, dict) else value
        total["lists and objects"] = 1
        total["members"] = len(value) if isinstance(value, dict) else 0
        total["values"] = 1 + max(0, len(inner) - 1)
        for item in inner:
            total = {name: total[name] + more for name, more in counted(item).items()}
    return total


def anything(draw: random.Random, depth: int = 4) -> Any:
    if depth and draw.random() < 0.5:
        items = [anything(draw, depth - 1) for _ in range(draw.randint(0, 4))]
        return items if draw.random() < 0.5 else {f'{n}"]{{,:\\': item for n, item in enumerate(items)}
    return draw.choice([1, None, "", '"', "\\", '\\"', "[[{,:", "a\\\\", "\ud800", "語", 'x"]'])


def test_the_count_of_a_text_is_that_of_what_it_means_however_it_is_cut() -> None:
    draw = random.Random(11)
    for _ in range(300):
        value = anything(draw)
        text = json.dumps(value, ensure_ascii=draw.random() < 0.5).encode("utf-8", "replace")
        assert structure_of(text, draw.randint(1, 9)) == structure_of(text, 1 << 20) == counted(value)


def test_what_a_long_conversation_needs_is_within_the_bounds(server: Served) -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "[{,:}]" * 5}]}] * MOST_MESSAGES
    tools = [{"type": "function", "function": {"name": f"a{n}", "parameters": {"type": "object"}}} for n in range(128)]
    structure_of(json.dumps({"model": "nano", "messages": parts, "tools": tools}).encode(), 1 << 16)
    ids = list(range(1 << 20))
    structure_of(json.dumps({"model": "nano", "prompt": ids}).encode(), 1 << 16, context=1 << 20)
    for over in (MOST_CONTAINERS, MOST_VALUES):
        with pytest.raises(ApiError, match=str(over)):
            structure_of(b"[" + (b"[]," if over == MOST_CONTAINERS else b"1,") * (over + 1) + b"1]", 1 << 16)
    structure_of(b"[" * DEEPEST + b"]" * DEEPEST, 7)
    with pytest.raises(ApiError, match="too deeply"):
        structure_of(b"[" * (DEEPEST + 1) + b"]" * (DEEPEST + 1), 7)


def test_the_number_of_messages_is_bounded_by_name(server: Served) -> None:
    answer = post(server, chat(",".join([user("")] * (MOST_MESSAGES + 1))))
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "messages")


def test_the_number_of_parts_and_calls_of_a_message_is_bounded_by_name(server: Served) -> None:
    part, call = '{"type":"text","text":"a"}', '{"id":"c","function":{"name":"a"}}'
    for name, item in (("content", part), ("tool_calls", call)):
        answer = post(server, chat(f'{{"role":"assistant","{name}":[{",".join([item] * (MOST_ITEMS + 1))}]}}'))
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, f"messages[0].{name}")


def test_a_text_that_cannot_fit_is_refused_before_its_tokens_are_counted(server: Served) -> None:
    for answer, param in (
        (server.post(CHAT, {**HELLO, "messages": [{"role": "user", "content": "word " * 200_000}]}), "messages"),
        (server.post(TEXT, {"model": "nano", "prompt": "word " * 200_000}), "prompt"),
    ):
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", param)
        assert "at least" in error["message"]


def test_garbage_is_not_looked_for_while_a_body_is_prepared(server: Served) -> None:
    looked = list[dict[str, int]]()

    def look(phase: str, info: dict[str, int]) -> None:
        if threading.current_thread().name.startswith("requests"):
            looked.append(info)

    gc.callbacks.append(look)
    try:
        assert post(server, chat(",".join([user("word " * 60)] * MOST_MESSAGES))).status_code == 400
    finally:
        gc.callbacks.remove(look)
    assert gc.isenabled()
    assert len(looked) < 10  # between its steps; otherwise a hundred


def test_results_of_very_many_calls_are_put_in_order_in_time() -> None:
    calls = tuple(ToolCall(str(n), "a", "{}") for n in range(16_000))
    results = [Message("tool", call.id, tool_call_id=call.id) for call in reversed(calls)]
    started = time.thread_time()
    ordered = in_order([Message("assistant", tool_calls=calls), *results])
    assert time.thread_time() - started < 1
    assert [message.content for message in ordered[1:]] == [call.id for call in calls]


def test_bodies_that_are_held_together_are_bounded() -> None:
    def request(size: int) -> Request:
        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": b"1" * size, "more_body": False}

        headers = [(b"content-type", b"application/json")]
        return Request({"type": "http", "method": "POST", "headers": headers}, receive)

    async def together() -> None:
        bodies = Bodies(limit=100, together=150)
        async with bodies.read(request(100), 0):
            with pytest.raises(ApiError) as refused:
                async with bodies.read(request(100), 0):
                    pass
            assert (refused.value.status, refused.value.headers["Retry-After"]) == (503, "1")
            async with bodies.read(request(50), 0) as small:
                assert len(small) == 50
        assert bodies.held == 0

    asyncio.run(together())


HUGE = "1" * 4301
ODD = {
    "NUL": (user("a\\u0000b"), 200),
    "lone surrogates": (user("\\ud800\\udc00\\ud800"), 200),
    "twice": ('{"role":"user","content":"a","content":"b"}', 200),
    "a huge number": (f'{{"role":"user","content":"a","x":{HUGE}}}', 400),
    "a huge float": ('{"role":"user","content":"a","x":1e999}', 200),
    "a raw NUL": (user("a\0b"), 400),
    "depth in arguments": (
        '{"role":"assistant","tool_calls":[{"id":"c","function":{"name":"a","arguments":"' + "[" * 5000 + '"}}]}',
        400,
    ),
}


@pytest.mark.parametrize(("message", "status"), ODD.values(), ids=ODD.keys())
def test_odd_json_is_text_or_a_400_in_plain_words(server: Served, message: str, status: int) -> None:
    answer = post(server, chat(message))
    assert answer.status_code == status
    assert "set_int_max" not in answer.text
