"""Anthropic's Messages API: the official client's calls, and every event held to the official client's own types."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import pytest
from anthropic.types import Message, RawMessageStreamEvent
from pydantic import TypeAdapter

from glm4lite.engine.engine import Engine
from glm4lite.text.template import ChatTemplate
from tests.glm4lite.schemas import closed
from tests.glm4lite.served import Served, prompts_of, scripted, served

EVENTS: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)
MESSAGES = "/v1/messages"
HELLO: dict[str, Any] = {"role": "user", "content": "Hello"}
CALCULATOR: dict[str, Any] = {
    "name": "calculator",
    "description": "Calculate with + - * /",
    "input_schema": {
        "type": "object",
        "properties": {"expression": {"type": "string"}},
        "required": ["expression"],
    },
}
ASKED = {"role": "user", "content": "What is 37 * 24?"}
CALL = 'calculator\n{"expression": "37 * 24"}'
THINKS = (
    "[gMASK]<sop>{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n<think>{% endif %}"
)


@pytest.fixture(scope="module")
def nano() -> Iterator[Served]:
    with served(Engine.load("nano", quant="int8", device="cpu")) as server:
        yield server


def client(server: Served, key: str = "none") -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=server.url, api_key=key, max_retries=0, timeout=30)


def create(server: Served, messages: Any = (HELLO,), **more: Any) -> Any:
    return client(server).messages.create(**{"model": "nano", "max_tokens": 200, "messages": messages, **more})


def streamed(server: Served, **body: Any) -> list[dict[str, Any]]:
    """The events as they were sent, each checked against the official types."""
    asked = {"model": "nano", "max_tokens": 200, "messages": [HELLO], "stream": True, **body}
    with server.http.stream("POST", MESSAGES, json=asked) as answer:
        lines = [line for line in answer.iter_lines() if line and not line.startswith(":")]
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]
    assert [line.removeprefix("event: ") for line in lines[::2]] == [event["type"] for event in events]
    for event in events:
        assert EVENTS.validate_python(event).type == event["type"]
    return events


def kinds(events: list[dict[str, Any]]) -> list[str]:
    """Their types (of deltas their kind) without repetitions of one."""
    names = [event["delta"]["type"] if event["type"] == "content_block_delta" else event["type"] for event in events]
    return [name for place, name in enumerate(names) if not place or name != names[place - 1]]


TEXT = ["content_block_start", "text_delta", "content_block_stop"]
CALLED = ["content_block_start", "input_json_delta", "content_block_stop"]
THOUGHT = ["content_block_start", "thinking_delta", "signature_delta", "content_block_stop"]
ENDING = ["message_delta", "message_stop"]


def test_an_answer_whole_and_streamed_is_the_same(nano: Served) -> None:
    whole = create(nano)
    assert Message.model_validate(whole.to_dict()).stop_reason == "end_turn"
    assert whole.content[0].text == "Hello! How can I help you?"
    events = streamed(nano)
    assert kinds(events) == ["message_start", *TEXT, *ENDING]
    assert "".join(event["delta"]["text"] for event in events if "index" in event and "delta" in event) == (
        whole.content[0].text
    )
    counts = events[-2]["usage"]
    assert counts["output_tokens"] == whole.usage.output_tokens
    assert counts["input_tokens"] + counts["cache_read_input_tokens"] == events[0]["message"]["usage"]["input_tokens"]
    assert counts["cache_read_input_tokens"] > 0


def test_the_clients_own_stream_helper_understands_the_stream(nano: Served) -> None:
    with client(nano).messages.stream(model="nano", max_tokens=200, messages=[ASKED], tools=[CALCULATOR]) as stream:  # type: ignore[list-item]
        final = stream.get_final_message()
    [call] = final.content
    assert (final.stop_reason, call.type, call.input) == ("tool_use", "tool_use", {"expression": "37 * 24"})  # type: ignore[union-attr]


def test_a_whole_conversation_with_a_tool(nano: Served) -> None:
    first = create(nano, [ASKED], tools=[CALCULATOR])
    assert first.stop_reason == "tool_use"
    [call] = first.content
    assert (call.name, call.input) == ("calculator", {"expression": "37 * 24"})
    result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "888"}]}
    history = [ASKED, {"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}]
    second = create(nano, history, tools=[CALCULATOR])
    assert "888" in second.content[0].text
    assert second.stop_reason == "end_turn"


def test_a_call_that_is_required_is_made(nano: Served) -> None:
    other = {**CALCULATOR, "name": "unit_convert"}
    for choice in ({"type": "any"}, {"type": "tool", "name": "calculator"}):
        calls = create(nano, tools=[CALCULATOR, other], tool_choice=choice).content
        assert calls[0].type == "tool_use"
        assert choice["type"] == "any" or calls[0].name == "calculator"
    assert [one.type for one in create(nano, [ASKED], tools=[CALCULATOR], tool_choice={"type": "none"}).content] == [
        "text"
    ]


def test_blocks_come_in_their_order_and_calls_can_be_one_at_a_time() -> None:
    reply = f"\nLet me see.<|assistant|>{CALL}<|assistant|>{CALL}<|observation|>"
    with served(scripted(reply, reply, reply)) as server:
        assert [one.type for one in create(server, tools=[CALCULATOR]).content] == ["text", "tool_use", "tool_use"]
        events = streamed(server, tools=[CALCULATOR])
        assert kinds(events) == ["message_start", *TEXT, *CALLED, *CALLED, *ENDING]
        alone = {"type": "auto", "disable_parallel_tool_use": True}
        assert len(create(server, tools=[CALCULATOR], tool_choice=alone).content) == 2


def test_the_stop_text_that_ended_an_answer_is_told(nano: Served) -> None:
    whole = create(nano, stop_sequences=["zzz", " can"])
    assert (whole.content[0].text, whole.stop_reason, whole.stop_sequence) == ("Hello! How", "stop_sequence", " can")
    assert streamed(nano, stop_sequences=[" can"])[-2]["delta"] == {
        "stop_reason": "stop_sequence",
        "stop_sequence": " can",
    }
    cut = create(nano, max_tokens=3)
    assert (cut.stop_reason, cut.stop_sequence, cut.usage.output_tokens) == ("max_tokens", None, 3)


def test_a_thought_is_given_where_it_was_asked_for_and_does_not_come_back() -> None:
    reply = "\nWell, 2 + 2.</think>\n\nFour.<|user|>"
    engine = scripted(reply, reply, "\nFour.<|user|>", template=ChatTemplate(THINKS))
    asked = prompts_of(engine)
    thinking = {"type": "enabled", "budget_tokens": 1024}
    with served(engine) as server:
        whole = create(server, thinking=thinking)
        assert [one.type for one in whole.content] == ["thinking", "text"]
        assert (whole.content[0].thinking, whole.content[1].text) == ("Well, 2 + 2.", "Four.")
        history = [HELLO, {"role": "assistant", "content": [one.to_dict() for one in whole.content]}, HELLO]
        events = streamed(server, messages=history, thinking=thinking)
        assert kinds(events) == ["message_start", *THOUGHT, *TEXT, *ENDING]
        assert "Four." in asked[1]
        assert "Well" not in asked[1]
        assert [one.type for one in create(server).content] == ["text"]


def test_text_and_results_of_one_message_reach_the_model_in_their_order() -> None:
    engine = scripted("\nDone.<|user|>")
    asked = prompts_of(engine)
    calls = [{"type": "tool_use", "id": name, "name": "calculator", "input": {"expression": name}} for name in "ab"]
    results = [{"type": "tool_result", "tool_use_id": name, "content": f"result {name}"} for name in "ba"]
    history = [
        HELLO,
        {"role": "assistant", "content": [{"type": "text", "text": "I look."}, *calls]},
        {"role": "user", "content": [*results, {"type": "text", "text": "One"}, {"type": "text", "text": "two"}]},
    ]
    system = [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}]
    with served(engine) as server:
        create(server, history, tools=[CALCULATOR], system=system)
    [prompt] = asked
    places = [prompt.index(text) for text in ("Be brief.", "I look.", "result a", "result b", "One\ntwo")]
    assert places == sorted(places)


def test_a_call_that_failed_and_said_nothing_is_an_error_to_the_model() -> None:
    engine = scripted("\nDone.<|user|>")
    asked = prompts_of(engine)
    call = {"type": "tool_use", "id": "a", "name": "calculator", "input": {}}
    result = {"type": "tool_result", "tool_use_id": "a", "is_error": True}
    with served(engine) as server:
        create(server, [HELLO, {"role": "assistant", "content": [call]}, {"role": "user", "content": [result]}])
    assert "<|observation|>\nerror" in asked[0]


def test_system_messages_may_come_in_the_middle() -> None:
    engine = scripted("\nDone.<|user|>")
    asked = prompts_of(engine)
    block = {"type": "mid_conv_system", "content": [{"type": "text", "text": "Now in French."}]}
    with served(engine) as server:
        create(
            server, [HELLO, {"role": "system", "content": "Be brief."}, {"role": "user", "content": [block, *TEXTS]}]
        )
    [prompt] = asked
    assert prompt.count("<|system|>") == 2
    assert prompt.index("Be brief.") < prompt.index("Now in French.") < prompt.index("Go on")


TEXTS = [{"type": "text", "text": "Go on"}]


def test_an_answer_that_fills_the_context_says_so() -> None:
    with served(scripted("word " * 400, context=300)) as server:
        assert create(server, max_tokens=1000).stop_reason == "model_context_window_exceeded"


def test_tokens_are_counted_as_the_answer_counts_them(nano: Served) -> None:
    asked: Any = {"model": "nano", "messages": [ASKED], "tools": [CALCULATOR], "system": "Be brief."}
    count = client(nano).messages.count_tokens(**asked).input_tokens
    usage = client(nano).messages.create(**asked, max_tokens=1).usage
    assert count == usage.input_tokens + (usage.cache_read_input_tokens or 0)


def test_the_key_comes_as_anthropics_clients_send_it() -> None:
    with served(scripted(*["\nHi.<|user|>"] * 2), api_key="secret") as server:
        assert client(server, "secret").messages.create(model="nano", max_tokens=9, messages=[HELLO]).content  # type: ignore[list-item]
        with pytest.raises(anthropic.AuthenticationError) as refused:
            create(server)
        assert refused.value.body == {
            "type": "error",
            "error": {"type": "authentication_error", "message": "a valid API key is needed"},
        }


def test_models_are_listed_in_anthropics_form(nano: Served) -> None:
    [model] = client(nano).models.list().data
    assert (model.id, model.type, model.display_name) == ("nano", "model", "nano")
    assert client(nano).models.retrieve("nano").created_at.year >= 2025


def test_what_fails_on_the_way_is_an_error_event() -> None:
    engine = scripted("\nHi.<|user|>")
    engine.model.step = lambda *_: 1 / 0  # type: ignore[method-assign,assignment]
    with served(engine) as server:
        with pytest.raises(anthropic.APIStatusError, match="ZeroDivisionError"):
            list(create(server, stream=True))
        with pytest.raises(anthropic.InternalServerError, match="ZeroDivisionError"):
            create(server)


def user(*blocks: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(blocks)}]}


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"messages": None}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": ["Hello"]}, "messages[0]"),
    ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "system", "content": [{"type": "tool_result"}]}]}, "messages[0].content[0]"),
    ({"messages": [HELLO, {"role": "assistant", "content": "Go on"}]}, "messages[1].role"),
    ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
    (user(3), "messages[0].content[0]"),
    (user({"type": "image", "source": {}}), "messages[0].content[0]"),
    (user({"type": {}}), "messages[0].content[0]"),
    (user({"type": "text", "text": 3}), "messages[0].content[0].text"),
    (user({"type": "tool_use", "id": "a", "name": "b", "input": {}}), "messages[0].content[0]"),
    (user({"type": "tool_result", "content": "x"}), "messages[0].content[0].tool_use_id"),
    (user({"type": "tool_result", "tool_use_id": "a", "content": [{}]}), "messages[0].content[0].content[0]"),
    ({"system": 3}, "system"),
    ({"system": [{"type": "image"}]}, "system[0]"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"stop_sequences": [""]}, "stop_sequences[0]"),
    ({"temperature": -1}, "temperature"),
    ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools[0].type"),
    ({"tools": [{"name": "a b", "input_schema": {}}]}, "tools[0].name"),
    ({"tools": [{"name": "a", "input_schema": {"type": "string"}}]}, "tools[0].input_schema"),
    ({"tools": [CALCULATOR], "tool_choice": {"type": "tool"}}, "tool_choice.name"),
    ({"tools": [CALCULATOR], "tool_choice": {"type": "tool", "name": "b"}}, "tool_choice"),
    ({"tool_choice": {"type": "any"}}, "tool_choice"),
    ({"thinking": {"type": "enabled"}}, "thinking.budget_tokens"),
    ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking.budget_tokens"),
    ({"output_config": {"format": {"type": "xml"}}}, "output_config.format"),
    ({"mcp_servers": [{"url": "http://x"}]}, "mcp_servers"),
    ({"container": "x"}, "container"),
]  # fmt: skip


@pytest.fixture(scope="module")
def hi() -> Iterator[Served]:
    with served(scripted(*["\nHi.<|user|>"] * 100)) as server:
        yield server


@pytest.mark.parametrize(("change", "field"), WRONG, ids=lambda value: str(value)[:60])
def test_a_wrong_field_is_named_as_the_client_called_it(hi: Served, change: dict[str, Any], field: str) -> None:
    answer = hi.post(MESSAGES, {"model": "nano", "max_tokens": 9, "messages": [HELLO], **change})
    error = answer.json()["error"]
    assert (answer.status_code, error["type"]) == (400, "invalid_request_error"), error
    assert error["message"].startswith(f"{field}: ")
    assert len(error["message"]) < 500
    assert "\n" not in error["message"]


def test_other_refusals_have_anthropics_form_too(hi: Served) -> None:
    for path in (MESSAGES, "/messages", "/v1/messages/count_tokens"):
        unknown = hi.post(path, {"model": "claude", "max_tokens": 9, "messages": [HELLO]})
        assert (unknown.status_code, unknown.json()["error"]["type"]) == (404, "not_found_error")
        assert unknown.headers["request-id"] == unknown.headers["x-request-id"]
        assert hi.http.get(path).json()["type"] == "error"
    long = hi.post(MESSAGES, {"messages": [{"role": "user", "content": "one two " * 4000}]}).json()["error"]
    assert long["message"].startswith("prompt is too long: This model's maximum context length is 4096 tokens")


def test_an_answer_follows_the_schema_of_its_output_config(nano: Served) -> None:
    schema = closed({"sum": {"enum": [888, 999]}})
    answer = create(nano, [ASKED], output_config={"format": {"type": "json_schema", "schema": schema}})
    assert json.loads(answer.content[0].text)["sum"] in (888, 999)


def test_a_call_grows_while_it_is_written_and_a_tools_schema_that_cannot_be_held_is_named() -> None:
    odd = {"type": "object", "properties": {"a": {"type": "string", "pattern": "^(?!a)b"}}}
    tools = [CALCULATOR, {"name": "odd", "input_schema": odd}]
    with served(scripted(f"{CALL}<|observation|>", f"{CALL}<|observation|>")) as server:
        events = streamed(server, tools=tools)
        pieces = [event["delta"]["partial_json"] for event in events if "partial_json" in event.get("delta", {})]
        assert len(pieces) > 4
        assert json.loads("".join(pieces)) == {"expression": "37 * 24"}
        asked = {"model": "nano", "max_tokens": 50, "messages": [HELLO], "tools": tools}
        assert server.post(MESSAGES, asked).headers["X-Ignored-Fields"] == "tools[1].input_schema"
