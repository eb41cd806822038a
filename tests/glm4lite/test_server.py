"""The API as programs use it: OpenAI's official client against a real server with the nano model."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterator
from typing import Any, Literal

import jsonschema
import openai
import pytest
from pydantic import BaseModel

from glm4lite.base.errors import ModelReplaced
from glm4lite.engine.engine import Engine
from glm4lite.server.answer import answer
from glm4lite.server.question import chat_question
from glm4lite.server.requests import ChatRequest
from glm4lite.text.template import ChatTemplate
from glm4lite.tools.builtin.tools import BUILTIN_TOOLS, calculator
from glm4lite.tools.running import run_tool
from glm4lite_quant.kernels import native
from tests.glm4lite.scripted import ScriptedModel
from tests.glm4lite.served import Served, scripted, served

TOOLS: Any = [tool.schema() for tool in BUILTIN_TOOLS]
CALL = 'calculator\n{"expression": "37 * 24"}'
OTHER = 'unit_convert\n{"value": 5, "from_unit": "km", "to_unit": "m"}'
ASKED: Any = {"role": "user", "content": "What is 37 * 24?"}


@pytest.fixture(scope="module")
def nano() -> Iterator[Served]:
    with served(Engine.load("nano", quant="int8", device="cpu")) as server:
        yield server


def calls_of(message: Any) -> list[tuple[str, dict[str, Any]]]:
    return [(call.function.name, json.loads(call.function.arguments)) for call in message.tool_calls or []]


def merged(stream: Any) -> dict[str, Any]:
    """A stream's deltas put together as clients do it."""
    content, thought, calls, reason = "", "", dict[int, dict[str, str]](), None
    for chunk in stream:
        for choice in chunk.choices:
            content += choice.delta.content or ""
            thought += getattr(choice.delta, "reasoning_content", None) or ""
            reason = choice.finish_reason or reason
            for part in choice.delta.tool_calls or []:
                call = calls.setdefault(part.index, {"id": "", "name": "", "arguments": ""})
                call["id"] += part.id or ""
                call["name"] += part.function.name or ""
                call["arguments"] += part.function.arguments or ""
    return {"content": content, "thought": thought, "calls": list(calls.values()), "reason": reason}


def test_a_question_never_meets_a_model_that_was_loaded_meanwhile() -> None:
    engine = scripted("Hi")
    body = {"model": "nano", "messages": [{"role": "user", "content": "Hi"}]}
    question = chat_question(engine, ChatRequest.read(body))
    other = Engine(engine.model, engine.tokenizer, engine.template)
    with pytest.raises(ModelReplaced):
        next(answer(other, question, threading.Event()))


def test_the_model_is_listed_by_its_name(nano: Served) -> None:
    [model] = nano.client.models.list().data
    assert model.id == "nano"
    assert nano.client.models.retrieve("nano").id == "nano"
    with pytest.raises(openai.NotFoundError, match="other"):
        nano.client.models.retrieve("other")


def test_an_answer_whole_and_streamed_is_the_same(nano: Served) -> None:
    whole = nano.chat()
    assert whole.choices[0].finish_reason == "stop"
    assert whole.choices[0].message.role == "assistant"
    assert merged(nano.chat(stream=True))["content"] == whole.choices[0].message.content == "Hello! How can I help you?"
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens


def test_usage_is_streamed_where_it_is_asked_for(nano: Served) -> None:
    chunks = list(nano.chat(stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == nano.chat().usage.completion_tokens
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert all(chunk.usage is None for chunk in nano.chat(stream=True))


def test_a_whole_conversation_with_a_tool(nano: Served) -> None:
    first = nano.chat(messages=[ASKED], tools=TOOLS)
    assert first.choices[0].finish_reason == "tool_calls"
    message = first.choices[0].message
    assert message.content is None
    assert calls_of(message) == [("calculator", {"expression": "37 * 24"})]
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "888"}
    second = nano.chat(messages=[ASKED, message, result], tools=TOOLS)
    assert "888" in second.choices[0].message.content
    assert second.choices[0].finish_reason == "stop"
    assert second.usage.prompt_tokens_details.cached_tokens > 0.8 * first.usage.prompt_tokens


def test_a_tool_call_is_streamed(nano: Served) -> None:
    got = merged(nano.chat(messages=[ASKED], tools=TOOLS, stream=True))
    assert (got["content"], got["reason"]) == ("", "tool_calls")
    [call] = got["calls"]
    assert call["id"].startswith("call_")
    assert (call["name"], json.loads(call["arguments"])) == ("calculator", {"expression": "37 * 24"})


def test_the_clients_own_stream_helper_understands_the_stream(nano: Served) -> None:
    with nano.client.chat.completions.stream(model="nano", messages=[ASKED], tools=TOOLS) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion()
    assert calls_of(final.choices[0].message) == [("calculator", {"expression": "37 * 24"})]


def test_several_calls_come_in_one_answer(nano: Served) -> None:
    text = "What is 38 * 25 and what time is it in Paris?"
    whole = nano.chat(text, tools=TOOLS)
    assert [name for name, _ in calls_of(whole.choices[0].message)] == ["calculator", "current_time"]
    assert len({call.id for call in whole.choices[0].message.tool_calls}) == 2
    assert [call["name"] for call in merged(nano.chat(text, tools=TOOLS, stream=True))["calls"]] == [
        "calculator",
        "current_time",
    ]
    alone = nano.chat(text, tools=TOOLS, parallel_tool_calls=False)
    assert [name for name, _ in calls_of(alone.choices[0].message)] == ["calculator"]
    assert alone.choices[0].finish_reason == "tool_calls"


def test_tool_choice_none_calls_nothing(nano: Served) -> None:
    answer = nano.chat(messages=[ASKED], tools=TOOLS, tool_choice="none").choices[0]
    assert answer.message.tool_calls is None
    assert answer.message.content
    assert answer.finish_reason == "stop"


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_that_is_required_is_made_whatever_the_question(nano: Served, stream: bool) -> None:
    free = nano.chat("Hello", tools=TOOLS).choices[0].message
    assert free.tool_calls is None
    for choice in ("required", {"type": "function", "function": {"name": "unit_convert"}}):
        given = nano.chat("Hello", tools=TOOLS, tool_choice=choice, stream=stream)
        if stream:
            got = merged(given)
            calls = [(call["name"], json.loads(call["arguments"])) for call in got["calls"]]
            reason = got["reason"]
        else:
            calls, reason = calls_of(given.choices[0].message), given.choices[0].finish_reason
        assert len(calls) >= 1
        assert reason == "tool_calls"
        assert choice == "required" or calls[0][0] == "unit_convert"


def test_a_named_call_still_gets_the_arguments_of_the_question(nano: Served) -> None:
    choice: Any = {"type": "function", "function": {"name": "calculator"}}
    answer = nano.chat(messages=[ASKED], tools=TOOLS, tool_choice=choice, stop=["37"])
    call = answer.choices[0].message.tool_calls[0]
    result = run_tool(calculator, type("Call", (), {"name": "calculator", "arguments": call.function.arguments})())
    assert result.content == "888"


def test_a_required_call_that_is_cut_is_a_call_with_its_length_said(nano: Served) -> None:
    answer = nano.chat(messages=[ASKED], tools=TOOLS, tool_choice="required", max_tokens=5).choices[0]
    assert answer.finish_reason == "length"
    assert answer.message.tool_calls[0].function.arguments.startswith("{")


def test_the_lengths_limit_is_held_and_said(nano: Served) -> None:
    for name in ("max_tokens", "max_completion_tokens"):
        limit: dict[str, Any] = {name: 3}
        answer = nano.chat(**limit)
        assert answer.choices[0].finish_reason == "length"
        assert answer.usage.completion_tokens == 3


def test_a_stop_text_ends_the_answer_before_it(nano: Served) -> None:
    for stop in (" can", [" zzz", " can"]):
        answer = nano.chat(stop=stop).choices[0]
        assert (answer.message.content, answer.finish_reason) == ("Hello! How", "stop")
        assert merged(nano.chat(stop=stop, stream=True))["content"] == "Hello! How"


def test_a_seed_makes_sampling_repeatable_and_no_temperature_greedy(nano: Served) -> None:
    def said(**sampling: Any) -> str:
        return nano.client.completions.create(model="nano", prompt="The", max_tokens=12, **sampling).choices[0].text

    first = said(temperature=2.0, top_p=1.0, seed=7)
    assert first == said(temperature=2.0, top_p=1.0, seed=7)
    assert len({said(temperature=2.0, top_p=1.0, seed=seed) for seed in range(4)}) > 1
    assert said(temperature=0) == said(temperature=2.0, top_p=0.0)


def test_logprobs_belong_to_the_tokens_of_the_answer(nano: Served) -> None:
    answer = nano.chat(logprobs=True, top_logprobs=3, temperature=0).choices[0]
    entries = answer.logprobs.content
    assert "".join(entry.token for entry in entries) == answer.message.content
    assert b"".join(bytes(entry.bytes) for entry in entries).decode() == answer.message.content
    for entry in entries:
        assert len(entry.top_logprobs) == 3
        assert entry.logprob == entry.top_logprobs[0].logprob <= 0  # greedy: the likeliest was taken
        assert sum(math.exp(other.logprob) for other in entry.top_logprobs) <= 1.0001
    chunks = list(nano.chat(logprobs=True, top_logprobs=3, temperature=0, stream=True))
    streamed = [e for chunk in chunks if chunk.choices[0].logprobs for e in chunk.choices[0].logprobs.content]
    assert [entry.token for entry in streamed] == [entry.token for entry in entries]
    assert nano.chat().choices[0].logprobs is None


def test_without_a_limit_a_chat_takes_what_the_context_leaves_and_a_completion_16_tokens() -> None:
    with served(scripted("word " * 400, "word " * 40, context=300)) as server:
        answer = server.chat()
        assert (answer.choices[0].finish_reason, answer.usage.total_tokens) == ("length", 300)
        model: Any = server.worker.engine.model
        assert isinstance(model, ScriptedModel)
        model.left.clear()
        text = server.client.completions.create(model="nano", prompt="On")
        assert text.usage is not None
        assert (text.choices[0].finish_reason, text.usage.completion_tokens) == ("length", 16)


def test_completions_go_on_from_a_text(nano: Served) -> None:
    create = nano.client.completions.create
    whole = create(model="nano", prompt="Hello", max_tokens=8, temperature=0, logprobs=2)
    choice = whole.choices[0]
    assert choice.finish_reason in ("length", "stop")
    assert choice.logprobs is not None
    assert "".join(choice.logprobs.tokens or []) == choice.text
    assert [len(top) for top in choice.logprobs.top_logprobs or []] == [2] * len(choice.logprobs.tokens or [])
    chunks = list(create(model="nano", prompt=["Hello"], max_tokens=8, temperature=0, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == choice.text
    tokenizer = nano.worker.engine.tokenizer
    ids = tokenizer.prefix_ids + tokenizer.ids("Hello")
    assert create(model="nano", prompt=ids, max_tokens=8, temperature=0).choices[0].text == choice.text


def test_a_thought_is_reasoning_content() -> None:
    source = (
        "[gMASK]<sop>{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n<think>{% endif %}"
    )
    reply = "\nWell, 2 + 2.</think>\n\nFour.<|user|>"
    with served(scripted(reply, reply, template=ChatTemplate(source))) as server:
        message = server.chat("2 + 2?").choices[0].message
        assert (message.reasoning_content, message.content) == ("Well, 2 + 2.", "Four.")
        got = merged(server.chat("2 + 2?", stream=True))
        assert (got["thought"], got["content"]) == ("Well, 2 + 2.", "Four.")


def test_a_required_call_of_a_thinking_model_may_come_behind_a_thought() -> None:
    source = "{% for m in messages %}{{ m.content }}{% endfor %}{{ tools and '' }}<|assistant|>\n<think>"
    reply = f"\nI calculate.\n</think>\n\n{CALL}<|observation|>"
    with served(scripted(reply, "\nI go on." * 20, template=ChatTemplate(source))) as server:
        message = server.chat(tools=TOOLS, tool_choice="required").choices[0].message
        assert calls_of(message) == [("calculator", {"expression": "37 * 24"})]
        assert message.reasoning_content == "I calculate.\n"
        budget: Any = {"thinking_budget": 5}
        ended = server.chat(tools=TOOLS, tool_choice="required", max_tokens=60, extra_body=budget).choices[0]
        assert ended.message.reasoning_content == "I go on\n"


def test_a_call_of_no_declared_tool_is_text_and_never_an_error() -> None:
    said = ('nosuch\n{"a": 1}', "I look.\ncalculator\nis one of them", '```\ncalculator\n{"a": 1} and more')
    with served(scripted(*(f"{text}<|user|>" for text in said))) as server:
        for text in said:
            choice = server.chat(tools=TOOLS).choices[0]
            assert (choice.message.content, choice.message.tool_calls) == (text, None)
            assert choice.finish_reason == "stop"


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_comes_as_it_is_written_and_what_is_cut_of_it_is_said(stream: bool) -> None:
    with served(scripted(f"{CALL}<|observation|>", CALL)) as server:
        whole = server.chat(tools=TOOLS, stream=stream)
        if stream:
            deltas = [one for chunk in whole for one in chunk.choices[0].delta.tool_calls or []]
            assert (deltas[0].function.name, deltas[0].function.arguments) == ("calculator", "")
            pieces = [one.function.arguments for one in deltas[1:]]
            assert len(pieces) > 4
            assert json.loads("".join(pieces)) == {"expression": "37 * 24"}
            assert {one.index for one in deltas} == {0}
        cut = server.chat(tools=TOOLS, stream=stream, max_tokens=8)
        if stream:
            got = merged(cut)
            [(name, arguments)], reason = [(call["name"], call["arguments"]) for call in got["calls"]], got["reason"]
        else:
            [call] = cut.choices[0].message.tool_calls
            name, arguments, reason = call.function.name, call.function.arguments, cut.choices[0].finish_reason
        assert (name, reason) == ("calculator", "length")
        assert '{"expression": "37 * 24"}'.startswith(arguments)
        assert 2 < len(arguments) < 25


SUM: Any = {
    "type": "object",
    "properties": {"sum": {"type": "integer", "maximum": 9999, "minimum": 0}, "sure": {"type": "boolean"}},
    "required": ["sum", "sure"],
    "additionalProperties": False,
}


def formatted(schema: Any, **more: Any) -> Any:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, **more}}


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_follows_the_schema_of_its_response_format(nano: Served, stream: bool) -> None:
    for wanted in (formatted(SUM), formatted(SUM, strict=True), {"type": "json_object", "schema": SUM}):
        given = nano.chat("What is 37 * 24?", response_format=wanted, stream=stream, max_tokens=60, stop=["sum"])
        content = merged(given)["content"] if stream else given.choices[0].message.content
        jsonschema.validate(json.loads(content), SUM)
    create = nano.client.completions.create
    completed = create(model="nano", prompt="37 * 24 = ", max_tokens=60, extra_body={"response_format": formatted(SUM)})
    jsonschema.validate(json.loads(completed.choices[0].text), SUM)
    free = nano.chat(response_format={"type": "text"}).choices[0].message.content
    assert free == nano.chat().choices[0].message.content


def test_json_of_any_form_is_an_object(nano: Served) -> None:
    choice = nano.chat("Hello", response_format={"type": "json_object"}, max_tokens=200, temperature=0).choices[0]
    if choice.finish_reason == "stop":
        assert isinstance(json.loads(choice.message.content), dict)
    else:
        assert choice.message.content.startswith("{")


def test_the_clients_own_helper_gets_its_object(nano: Served) -> None:
    class Sum(BaseModel):
        sum: Literal[888, 999]
        sure: bool

    parsed = nano.client.chat.completions.parse(
        model="nano", messages=[{"role": "user", "content": "What is 37 * 24?"}], response_format=Sum
    )
    assert isinstance(parsed.choices[0].message.parsed, Sum)


def test_a_strict_tool_gets_arguments_to_the_letter_and_an_odd_one_any(nano: Served) -> None:
    def declared(parameters: Any, **more: Any) -> Any:
        return [{"type": "function", "function": {"name": "answer", "parameters": parameters, **more}}]

    for more in ({}, {"strict": True}):
        answer = nano.chat("Go", tools=declared(SUM, **more), tool_choice="required", parallel_tool_calls=False)
        jsonschema.validate(calls_of(answer.choices[0].message)[0][1], SUM)
    odd = {"type": "object", "properties": {"a": {"type": "string", "pattern": "^(?!a)b"}}}
    body = {"model": "nano", "messages": [ASKED], "tools": declared(odd), "max_tokens": 30}
    loose = nano.post("/v1/chat/completions", body)
    assert (loose.status_code, loose.headers["X-Ignored-Fields"]) == (200, "tools[0].function.parameters")
    refused = nano.post("/v1/chat/completions", {**body, "tools": declared(odd, strict=True)})
    assert refused.status_code == 400
    assert "look-around" in refused.json()["error"]["message"]
    assert refused.json()["error"]["param"] == "tools"


@pytest.mark.parametrize(
    ("wanted", "param"),
    [
        ({"type": "grammar"}, "response_format.type"),
        ({}, "response_format.type"),
        ({"type": "json_schema"}, "response_format.json_schema"),
        ({"type": "json_schema", "json_schema": {"name": "a"}}, "response_format.json_schema"),
        (formatted([]), "response_format.json_schema.schema"),
        (formatted({"type": "nothing"}), "response_format"),
        (formatted({"type": "array", "uniqueItems": True}), "response_format"),
        (formatted({"enum": []}), "response_format"),
        (formatted({"$ref": "https://example.com/a"}), "response_format"),
        ("json", "response_format"),
    ],
)
def test_a_response_format_that_cannot_be_held_is_refused(nano: Served, wanted: Any, param: str) -> None:
    for path, asked in (("chat/completions", {"messages": [ASKED]}), ("completions", {"prompt": "Hi"})):
        refused = nano.post(f"/v1/{path}", {"model": "nano", "response_format": wanted, **asked})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)


def test_a_call_that_must_come_and_a_format_contradict_each_other(nano: Served) -> None:
    body = {"model": "nano", "messages": [ASKED], "tools": TOOLS, "response_format": {"type": "json_object"}}
    refused = nano.post("/v1/chat/completions", {**body, "tool_choice": "required"})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "tool_choice")
    assert nano.post("/v1/chat/completions", {**body, "tool_choice": "auto", "max_tokens": 5}).status_code == 200


def test_text_before_and_after_calls_is_kept() -> None:
    reply = f"\nLet me see.<|assistant|>{CALL}<|assistant|>{OTHER}<|observation|>"
    with served(scripted(reply, reply)) as server:
        message = server.chat(tools=TOOLS).choices[0].message
        assert message.content == "Let me see."
        assert [name for name, _ in calls_of(message)] == ["calculator", "unit_convert"]
        got = merged(server.chat(tools=TOOLS, stream=True))
        assert (got["content"], len(got["calls"])) == ("Let me see.", 2)


@pytest.mark.parametrize("parallel", [True, False])
def test_a_call_behind_a_sentence_of_one_part_is_a_call(parallel: bool) -> None:
    said = '\nI look.\ncalculator\n{"expression": "1"}\ncalculator\n{"expression": "2"}<|observation|>'
    options: Any = {"tools": TOOLS, "parallel_tool_calls": parallel}
    with served(scripted(said)) as server:
        choice = server.chat(**options).choices[0]
        assert (choice.message.content, choice.finish_reason) == ("I look.", "tool_calls")
        expected = [("calculator", {"expression": "1"}), ("calculator", {"expression": "2"})][: 1 + parallel]
        assert calls_of(choice.message) == expected
    with served(scripted(said)) as server:
        got = merged(server.chat(**options, stream=True))
        assert (got["content"], got["reason"], len(got["calls"])) == ("I look.", "tool_calls", 1 + parallel)


def test_results_reach_the_model_in_the_order_of_the_calls() -> None:
    engine = scripted("\nDone.<|user|>")
    ids = ("call_a", "call_b")
    calls = [{"id": at, "type": "function", "function": {"name": "calculator", "arguments": "{}"}} for at in ids]
    history: Any = [ASKED, {"role": "assistant", "content": None, "tool_calls": calls}]
    history += [{"role": "tool", "tool_call_id": at, "content": f"result {at}"} for at in reversed(ids)]
    with served(engine) as server:
        server.chat(messages=history, tools=TOOLS)
    model: Any = engine.model
    assert isinstance(model, ScriptedModel)
    prompt = engine.tokenizer.text(model.fed[0], keep_special=True)
    assert prompt.index("result call_a") < prompt.index("result call_b")


def test_metrics_and_health_say_what_happened(nano: Served) -> None:
    nano.chat()
    lines = nano.http.get("/metrics").text.splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert int(values['glm4lite_requests_total{endpoint="/v1/chat/completions",status="200"}']) >= 1
    assert int(values["glm4lite_new_tokens_total"]) > 0
    assert float(values["glm4lite_tokens_per_second"]) > 0
    assert int(values['glm4lite_weight_bytes{device="cpu"}']) > 1_000_000
    assert int(values["glm4lite_resident_bytes"]) > 10_000_000
    assert int(values["glm4lite_steps_total"]) > 0
    assert values["glm4lite_preempted_total"] == "0"
    if native.backend() is not None:
        assert 0 < int(values["glm4lite_kv_blocks_free"]) < int(values["glm4lite_kv_blocks"])  # one prefix is kept
    assert (values["glm4lite_queue_waiting"], values["glm4lite_running"]) == ("0", "0")
    assert nano.http.get("/health").json() == {"status": "ok", "waiting": 0, "running": 0}


@pytest.mark.parametrize("path", ["/health", "/v1/models", "/v1/models/nano", "/metrics"])
def test_head_says_what_get_says_without_a_body(nano: Served, path: str) -> None:
    head, get = nano.http.head(path), nano.http.get(path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"] == get.headers["content-type"]
    assert nano.http.head("/v1/models/other").status_code == 404
