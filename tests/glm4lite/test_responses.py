"""OpenAI's Responses API: the official client's calls, and every event held to the official client's own types."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter

from glm4lite.engine.engine import Engine
from glm4lite.server.errors import ApiError
from glm4lite.server.response_store import Kept, ResponseStore
from glm4lite.text.template import ChatTemplate
from tests.glm4lite.served import Served, prompts_of, scripted, served

EVENTS: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
RESPONSES = "/v1/responses"
CALCULATOR: dict[str, Any] = {
    "type": "function",
    "name": "calculator",
    "description": "Calculate with + - * /",
    "parameters": {
        "type": "object",
        "properties": {"expression": {"type": "string"}},
        "required": ["expression"],
        "additionalProperties": False,
    },
    "strict": False,
}
CALL = 'calculator\n{"expression": "37 * 24"}'
THINKS = (
    "[gMASK]<sop>{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n<think>{% endif %}"
)


@pytest.fixture(scope="module")
def nano() -> Iterator[Served]:
    with served(Engine.load("nano", quant="int8", device="cpu")) as server:
        yield server


def create(server: Served, text: Any = "Hello", **more: Any) -> Any:
    return server.client.responses.create(model="nano", input=text, **more)


def streamed(server: Served, **body: Any) -> list[dict[str, Any]]:
    """The events as they were sent, each checked against the official types."""
    with server.http.stream("POST", RESPONSES, json={"model": "nano", "stream": True, **body}) as answer:
        lines = [line for line in answer.iter_lines() if line and not line.startswith(":")]
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]
    assert [line.removeprefix("event: ") for line in lines[::2]] == [event["type"] for event in events]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    for event in events:
        assert EVENTS.validate_python(event).type == event["type"]
    return events


def kinds(events: list[dict[str, Any]]) -> list[str]:
    """Their types without repetitions of one."""
    names = [event["type"].removeprefix("response.") for event in events]
    return [name for place, name in enumerate(names) if not place or name != names[place - 1]]


ITEM = ["output_item.added", "content_part.added"]
TEXT = [*ITEM, "output_text.delta", "output_text.done", "content_part.done", "output_item.done"]
THOUGHT = [*ITEM, "reasoning_text.delta", "reasoning_text.done", "content_part.done", "output_item.done"]
CALLED = [
    *("output_item.added", "function_call_arguments.delta", "function_call_arguments.done"),
    "output_item.done",
]


def test_an_answer_whole_and_streamed_is_the_same(nano: Served) -> None:
    whole = create(nano)
    assert Response.model_validate(whole.to_dict()).status == "completed"
    assert whole.output_text == "Hello! How can I help you?"
    assert whole.usage.total_tokens == whole.usage.input_tokens + whole.usage.output_tokens > 0
    events = streamed(nano, input="Hello")
    assert kinds(events) == ["created", "in_progress", *TEXT, "completed"]
    assert "".join(event["delta"] for event in events if event["type"].endswith("text.delta")) == whole.output_text
    last = Response.model_validate(events[-1]["response"])
    assert last.output_text == whole.output_text
    assert last.usage is not None
    assert last.usage.output_tokens == whole.usage.output_tokens


def test_the_clients_own_stream_helper_understands_the_stream(nano: Served) -> None:
    with nano.client.responses.stream(model="nano", input="Hello") as stream:
        final = list(stream)[-1]
        assert final.type == "response.completed"
        assert stream.get_final_response().output_text == "Hello! How can I help you?"


def test_a_whole_conversation_with_a_tool_sent_back_item_by_item(nano: Served) -> None:
    asked: list[Any] = [{"role": "user", "content": "What is 37 * 24?"}]
    first = create(nano, asked, tools=[CALCULATOR])
    [call] = first.output
    assert (call.type, call.name, json.loads(call.arguments)) == (
        "function_call",
        "calculator",
        {"expression": "37 * 24"},
    )
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "888"}
    second = create(nano, [*asked, *first.output, result], tools=[CALCULATOR])
    assert "888" in second.output_text
    assert second.usage.input_tokens_details.cached_tokens > 0


def test_a_conversation_goes_on_from_a_response_that_was_stored(nano: Served) -> None:
    first = create(nano, "What is 37 * 24?", tools=[CALCULATOR])
    result = {"type": "function_call_output", "call_id": first.output[0].call_id, "output": "888"}
    second = create(nano, [result], tools=[CALCULATOR], previous_response_id=first.id)
    assert "888" in second.output_text
    assert second.previous_response_id == first.id
    assert nano.client.responses.retrieve(second.id).output_text == second.output_text
    nano.client.responses.delete(second.id)
    with pytest.raises(openai.NotFoundError, match=second.id):
        nano.client.responses.retrieve(second.id)
    private = create(nano, store=False)
    for lost in (second.id, private.id, "resp_nothing"):
        with pytest.raises(openai.NotFoundError) as refused:
            create(nano, previous_response_id=lost)
        assert refused.value.code == "previous_response_not_found"


def test_requests_are_counted_by_endpoint_with_and_without_v1(nano: Served) -> None:
    def counted() -> int:
        lines = nano.http.get("/metrics").text.splitlines()
        found = [line for line in lines if 'endpoint="/v1/responses",status="200"' in line]
        return int(found[0].split()[-1]) if found else 0

    before = counted()
    for path in ("/responses", "/v1/responses"):
        assert nano.post(path, {"input": "Hello"}).status_code == 200
    assert counted() == before + 2


def test_a_streamed_response_is_stored_too(nano: Served) -> None:
    last = streamed(nano, input="Hello")[-1]["response"]
    assert nano.client.responses.retrieve(last["id"]).output_text == "Hello! How can I help you?"


def test_an_item_is_found_again_by_its_id() -> None:
    engine = scripted("\nOne.<|user|>", "\nTwo.<|user|>")
    asked = prompts_of(engine)
    with served(engine) as server:
        said = create(server).output[0]
        create(server, [{"type": "item_reference", "id": said.id}, {"role": "user", "content": "And?"}])
        assert "One." in asked[1]
        with pytest.raises(openai.BadRequestError, match="send the item itself"):
            create(server, [{"type": "item_reference", "id": "msg_nothing"}])


def test_instructions_are_the_system_message_of_this_request_alone() -> None:
    engine = scripted("\nOne.<|user|>", "\nTwo.<|user|>")
    asked = prompts_of(engine)
    with served(engine) as server:
        first = create(server, "Hi", instructions="Answer as a pirate.")
        create(server, "And?", previous_response_id=first.id)
    assert "Answer as a pirate." in asked[0]
    assert "pirate" not in asked[1]
    assert "One." in asked[1]


def test_several_calls_and_the_text_before_them_are_items_in_their_order() -> None:
    reply = f"\nLet me see.<|assistant|>{CALL}<|assistant|>{CALL}<|observation|>"
    with served(scripted(reply, reply, reply)) as server:
        whole = create(server, tools=[CALCULATOR])
        assert [item.type for item in whole.output] == ["message", "function_call", "function_call"]
        assert len({item.call_id for item in whole.output[1:]}) == 2
        events = streamed(server, input="Hello", tools=[CALCULATOR])
        assert kinds(events) == ["created", "in_progress", *TEXT, *CALLED, *CALLED, "completed"]
        assert [event["output_index"] for event in events if event["type"].endswith("item.done")] == [0, 1, 2]
        alone = create(server, tools=[CALCULATOR], parallel_tool_calls=False)
        assert [item.type for item in alone.output] == ["message", "function_call"]


def test_a_call_that_is_required_is_made(nano: Served) -> None:
    allowed = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "calculator"}]}
    other = {**CALCULATOR, "name": "unit_convert"}
    for choice in ("required", {"type": "function", "name": "calculator"}, allowed):
        [call, *_] = create(nano, tools=[CALCULATOR, other], tool_choice=choice).output
        assert call.type == "function_call"
        assert choice == "required" or call.name == "calculator"
    assert [item.type for item in create(nano, tools=[CALCULATOR], tool_choice="none").output] == ["message"]


def test_a_thought_is_an_item_of_its_own_and_does_not_come_back() -> None:
    reply = "\nWell, 2 + 2.</think>\n\nFour.<|user|>"
    engine = scripted(reply, reply, reply, template=ChatTemplate(THINKS))
    asked = prompts_of(engine)
    with served(engine) as server:
        whole = create(server, "2 + 2?")
        assert [item.type for item in whole.output] == ["reasoning", "message"]
        assert whole.output[0].content[0].text == "Well, 2 + 2."
        assert whole.output_text == "Four."
        assert 0 < whole.usage.output_tokens_details.reasoning_tokens < whole.usage.output_tokens
        history = [{"role": "user", "content": "2 + 2?"}, *[item.to_dict() for item in whole.output]]
        events = streamed(server, input=[*history, {"role": "user", "content": "And?"}])
        assert kinds(events) == ["created", "in_progress", *THOUGHT, *TEXT, "completed"]
        assert "Four." in asked[1]
        assert "Well" not in asked[1]


def test_an_answer_that_is_cut_is_incomplete(nano: Served) -> None:
    whole = create(nano, max_output_tokens=3)
    assert (whole.status, whole.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert whole.output[-1].status == "incomplete"
    events = streamed(nano, input="Hello", max_output_tokens=3)
    assert kinds(events)[-1] == "incomplete"
    assert events[-1]["response"]["usage"]["output_tokens"] == 3


def test_an_answer_of_nothing_is_an_empty_message() -> None:
    with served(scripted("<|user|>", "<|user|>")) as server:
        assert create(server).output_text == ""
        assert kinds(streamed(server, input="Hi"))[2:] == [*ITEM, *TEXT[3:], "completed"]


def test_log_probabilities_come_where_they_are_included(nano: Served) -> None:
    include = ["message.output_text.logprobs"]
    part = create(nano, include=include, top_logprobs=2, temperature=0).output[0].content[0]
    assert "".join(entry.token for entry in part.logprobs) == part.text
    assert {len(entry.top_logprobs) for entry in part.logprobs} == {2}
    events = streamed(nano, input="Hello", include=include, temperature=0)
    sent = [one["token"] for event in events if event["type"].endswith("text.delta") for one in event["logprobs"]]
    assert "".join(sent) == part.text


def test_what_fails_on_the_way_is_a_failed_response() -> None:
    engine = scripted("\nHi.<|user|>")
    engine.model.step = lambda *_: 1 / 0  # type: ignore[method-assign,assignment]
    with served(engine) as server:
        last = streamed(server, input="Hi")[-1]
        assert (last["type"], last["response"]["status"]) == ("response.failed", "failed")
        assert "ZeroDivisionError" in last["response"]["error"]["message"]
        with pytest.raises(openai.InternalServerError, match="ZeroDivisionError"):
            create(server)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"input": None}, "input"),
    ({"input": []}, "input"),
    ({"input": 3}, "input"),
    ({"input": ["Hello"]}, "input[0]"),
    ({"input": [{"role": "wizard", "content": "x"}]}, "input[0].role"),
    ({"input": [{"role": "user", "content": 3}]}, "input[0].content"),
    ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input[0].content[0]"),
    ({"input": [{"type": "computer_call"}]}, "input[0].type"),
    ({"input": [{"type": {}}]}, "input[0].type"),
    ({"input": [{"type": "function_call", "call_id": "a", "name": "b"}]}, "input[0].arguments"),
    ({"input": [{"type": "function_call", "call_id": "a", "name": "b\nc", "arguments": "{}"}]}, "input[0].name"),
    ({"input": [{"type": "function_call", "call_id": "a", "name": "b", "arguments": "[" * 999}]}, "input[0].arguments"),
    ({"input": [{"type": "function_call_output", "output": "x"}]}, "input[0].call_id"),
    ({"input": [{"type": "item_reference"}]}, "input[0].id"),
    ({"instructions": ["x"]}, "instructions"),
    ({"max_output_tokens": 0}, "max_output_tokens"),
    ({"max_output_tokens": 5, "max_tokens": 5}, "max_tokens"),
    ({"messages": [{"role": "user", "content": "x"}]}, "messages"),
    ({"temperature": 3}, "temperature"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    ({"tools": [{"type": "function", "name": "a b"}]}, "tools[0].name"),
    ({"tools": [{**CALCULATOR, "parameters": {"type": "string"}}]}, "tools[0].parameters"),
    ({"tools": [{**CALCULATOR, "parameters": {"properties": {"a": 3}}}]}, "tools[0].parameters.properties.a"),
    ({"tools": [CALCULATOR], "tool_choice": {"type": "web_search"}}, "tool_choice"),
    ({"tools": [CALCULATOR], "tool_choice": {"type": "function", "name": "b"}}, "tool_choice"),
    ({"text": {"format": {"type": "yaml"}}}, "text.format.type"),
    ({"reasoning": {"effort": "huge"}}, "reasoning.effort"),
    ({"include": "x"}, "include"),
    ({"previous_response_id": 3}, "previous_response_id"),
    ({"background": True}, "background"),
    ({"conversation": "conv_1"}, "conversation"),
    ({"prompt": {"id": "p"}}, "prompt"),
    ({"truncation": "auto"}, "truncation"),
    ({"metadata": {"a": 1}}, "metadata.a"),
    ({"presence_penalty": "x"}, "presence_penalty"),
]  # fmt: skip


@pytest.fixture(scope="module")
def hi() -> Iterator[Served]:
    with served(scripted(*["\nHi.<|user|>"] * 100)) as server:
        yield server


@pytest.mark.parametrize(("change", "field"), WRONG, ids=lambda value: str(value)[:60])
def test_a_wrong_field_is_named_as_the_client_called_it(hi: Served, change: dict[str, Any], field: str) -> None:
    answer = hi.post(RESPONSES, {"model": "nano", "input": "Hello", **change})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, field), error
    assert field in error["message"]
    assert len(error["message"]) < 500
    assert "\n" not in error["message"]


def test_a_conversation_that_is_too_long_is_refused_in_the_words_that_clients_look_for(hi: Served) -> None:
    error = hi.post(RESPONSES, {"input": "one two " * 4000}).json()["error"]
    assert (error["code"], error["param"]) == ("context_length_exceeded", "input")
    assert error["message"].startswith("This model's maximum context length is 4096 tokens")


def test_what_means_nothing_here_is_named(hi: Served) -> None:
    body = {"input": "Hi", "reasoning": {"effort": "low", "summary": "auto"}, "text": {"verbosity": "low"}, "odd": 1}
    answer = hi.post(RESPONSES, {**body, "user": "me", "metadata": {"a": "b"}, "max_tool_calls": 3})
    assert answer.status_code == 200
    assert {"odd", "reasoning.summary", "text.verbosity"} <= set(answer.headers["X-Ignored-Fields"].split(", "))
    assert answer.json()["metadata"] == {"a": "b"}


def kept(name: str, previous: str | None = None, size: int = 100) -> Kept:
    said = {"id": f"msg_{name}", "type": "message", "previous": previous}
    items = json.dumps([{"role": "user", "content": name}]).encode()
    whole = Kept.of({"id": name, "previous_response_id": previous, "output": [said]}, items)
    return replace(whole, response=whole.response + b" " * (size - whole.size)) if size > whole.size else whole


def test_the_store_keeps_conversations_whole_and_a_bounded_number_of_bytes() -> None:
    store = ResponseStore(most=4, size=1000)
    for name, previous in (("a", None), ("b", "a"), ("x", None), ("c", "b")):
        store.keep(kept(name, previous))
    assert [item.get("content", item.get("id")) for item in store.conversation("c")] == [
        *("a", "msg_a", "b", "msg_b"),
        *("c", "msg_c"),
    ]
    store.keep(kept("d", "c"))  # a fifth: what goes is not what others go on from
    with pytest.raises(ApiError):
        store.conversation("x")
    assert len(store.conversation("d")) == 8
    store.keep(kept("large", size=1001))
    with pytest.raises(ApiError):
        store.response("large")
    store.keep(kept("fills", size=1000))
    assert len(store) == 1
    store.keep(kept("e", "d"))  # the one before it is gone
    assert len(store) == 1
    assert store.item("msg_fills") is not None
    assert store.item("msg_e") is None


def test_an_answer_follows_the_schema_of_its_text_format(nano: Served) -> None:
    class Sum(BaseModel):
        sum: Literal[888, 999]

    parsed = nano.client.responses.parse(model="nano", input="What is 37 * 24?", text_format=Sum)
    assert isinstance(parsed.output_parsed, Sum)
    asked = {"input": "Hi", "text": {"format": {"type": "json_schema", "name": "a", "schema": {"uniqueItems": True}}}}
    refused = nano.post(RESPONSES, asked).json()["error"]
    assert (refused["code"], refused["param"]) == ("unsupported_schema", "text.format")
    assert "uniqueItems" in refused["message"]


def test_a_call_grows_while_it_is_written_and_says_where_it_was_cut() -> None:
    with served(scripted(CALL, CALL)) as server:
        events = streamed(server, input="Go", tools=[CALCULATOR], tool_choice="required", max_output_tokens=8)
        pieces = [event["delta"] for event in events if event["type"].endswith("arguments.delta")]
        assert len(pieces) > 2
        assert events[-1]["type"] == "response.incomplete"
        [item] = events[-1]["response"]["output"]
        assert (item["status"], item["arguments"]) == ("incomplete", "".join(pieces))


def test_a_tools_schema_that_cannot_be_held_is_ignored_by_name_and_refused_where_it_is_strict(nano: Served) -> None:
    odd = {"type": "object", "properties": {"a": {"type": "string", "pattern": "^(?!a)b"}}}
    tool = {"type": "function", "name": "odd", "parameters": odd}
    body = {"input": "Hi", "max_output_tokens": 5, "tools": [CALCULATOR, tool]}
    assert nano.post(RESPONSES, body).headers["X-Ignored-Fields"] == "tools[1].parameters"
    assert nano.post(RESPONSES, {**body, "tools": [{**tool, "strict": True}]}).json()["error"]["param"] == "tools"
