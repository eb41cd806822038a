"""Bad requests: a 4xx that names the field, and the server goes on serving."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import Any

import pytest
from tokenizers import Regex, pre_tokenizers

from glm4lite.server import unsupported
from glm4lite.server.messages import MessagesBody
from glm4lite.server.requests import ChatRequest, CompletionRequest
from glm4lite.server.responses import ResponsesBody
from tests.glm4lite.served import Served, scripted, served

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
MESSAGES, RESPONSES = "/v1/messages", "/v1/responses"
HELLO: dict[str, Any] = {"model": "nano", "messages": [{"role": "user", "content": "Hello"}]}


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served(scripted(*["\nHi.<|user|>"] * 200)) as running:
        yield running


def tool(**function: Any) -> dict[str, Any]:
    return {"tools": [{"type": "function", "function": {"name": "a", **function}}]}


def parameters(schema: Any) -> dict[str, Any]:
    return tool(parameters=schema)


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "object"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


def message(**fields: Any) -> dict[str, Any]:
    return {"messages": [fields]}


FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"model": 3}, "model"),
    ({"messages": None}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": "Hello"}, "messages"),
    ({"messages": ["Hello"]}, "messages[0]"),
    (message(content="Hello"), "messages[0]"),
    (message(role="wizard", content="Hello"), "messages[0]"),
    (message(role="user", content=3), "messages[0]"),
    (message(role="user", content=[{"type": "image_url", "image_url": {"url": "http://x"}}]), "messages[0]"),
    (message(role="assistant", tool_calls="a"), "messages[0]"),
    (message(role="assistant", tool_calls=[{"id": "1"}]), "messages[0]"),
    (message(role="tool", content="x", tool_call_id=3), "messages[0]"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": "10"}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"max_tokens": True}, "max_tokens"),
    ({"max_tokens": 10**30}, "max_tokens"),
    ({"max_completion_tokens": -5}, "max_completion_tokens"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 2.1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"top_p": 1.1}, "top_p"),
    ({"seed": 1.5}, "seed"),
    ({"seed": 2**64}, "seed"),
    ({"n": 0}, "n"),
    ({"stop": ""}, "stop"),
    ({"stop": ["a", ""]}, "stop[1]"),
    ({"stop": 3}, "stop"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": True}, "stream_options"),
    ({"logprobs": 3}, "logprobs"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"n": 129}, "n"),
    ({"presence_penalty": 2.5}, "presence_penalty"),
    ({"frequency_penalty": "0"}, "frequency_penalty"),
    ({"logit_bias": {"five": 1}}, "logit_bias"),
    ({"logit_bias": {"5": 101}}, "logit_bias"),
    ({"logit_bias": {"-5": 1}}, "logit_bias"),
    ({"logit_bias": {"99999999": 1}}, "logit_bias"),
    ({"logit_bias": [[5, 1]]}, "logit_bias"),
    ({"stop_token_ids": [-1]}, "stop_token_ids[0]"),
    ({"stop_token_ids": [10**8]}, "stop_token_ids"),
    ({"stop_token_ids": [1] * 300}, "stop_token_ids"),
    ({"min_tokens": -1}, "min_tokens"),
    ({"min_tokens": 9, "max_tokens": 8}, "min_tokens"),
    ({"ignore_eos": 1}, "ignore_eos"),
    ({**tool(), "tool_choice": "required", "ignore_eos": True}, "ignore_eos"),
    ({"response_format": {"type": "json_object"}, "ignore_eos": True}, "ignore_eos"),
    ({"reasoning_effort": "huge"}, "reasoning_effort"),
    ({"chat_template_kwargs": {"nosuch": 1}}, "chat_template_kwargs.nosuch"),
    ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages"),
    ({"chat_template_kwargs": 3}, "chat_template_kwargs"),
    ({"response_format": {"type": "grammar"}}, "response_format.type"),
    ({"functions": [{"name": "a"}]}, "functions"),
    ({"tools": {}}, "tools"),
    ({"tools": [3]}, "tools[0]"),
    ({"tools": [{"type": "retrieval"}]}, "tools[0].type"),
    ({"tools": [{"type": "function"}]}, "tools[0].function"),
    (tool(name="two\nlines"), "tools[0].function.name"),
    (tool(name=""), "tools[0].function.name"),
    (tool(name="<|user|>"), "tools[0].function.name"),
    (tool(name="a" * 65), "tools[0].function.name"),
    (tool(description=3), "tools[0].function.description"),
    (parameters("x"), "tools[0].function.parameters"),
    (parameters({"type": "string"}), "tools[0].function.parameters"),
    (parameters({"type": "object", "properties": []}), "tools[0].function.parameters.properties"),
    (parameters({"properties": {"p": {"type": "text"}}}), "tools[0].function.parameters.properties.p.type"),
    (parameters({"type": "object", "required": "p"}), "tools[0].function.parameters.required"),
    (parameters({"properties": {"p": {"items": 3}}}), "tools[0].function.parameters.properties.p.items"),
    ({"tools": tool()["tools"] * 2}, "tools[1].function.name"),
    ({"tools": tool()["tools"] * 200}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({**tool(), "tool_choice": "always"}, "tool_choice"),
    ({**tool(), "tool_choice": {"type": "function", "function": {"name": "b"}}}, "tool_choice"),
    ({**tool(), "tool_choice": {"type": "function"}}, "tool_choice"),
    ({**tool(), "tool_choice": 3}, "tool_choice"),
    ({**tool(), "parallel_tool_calls": "no"}, "parallel_tool_calls"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "field"), FIELDS, ids=lambda value: str(value)[:60])
def test_a_wrong_field_is_named(server: Served, change: dict[str, Any], field: str) -> None:
    answer = server.post(CHAT, {**HELLO, **change})
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["param"]) == (400, "invalid_request_error", field)
    assert field in error["message"]
    assert len(error["message"]) < 400


def test_a_schema_that_is_nested_deeply_is_refused(server: Served) -> None:
    assert server.post(CHAT, {**HELLO, **parameters(nested(10))}).status_code == 200
    for depth in (40, 300):
        answer = server.post(CHAT, {**HELLO, **parameters(nested(depth))})
        assert answer.status_code == 400
        assert "nested" in answer.json()["error"]["message"]


UNSUPPORTED: dict[str, Any] = {
    "guided_json": {"type": "object"},
    "guided_choice": ["yes", "no"],
    "guided_regex": "yes|no",
    "guided_grammar": 'root ::= "yes"',
    "grammar": 'root ::= "yes"',
    "json_schema": {"type": "object"},
    "structured_outputs": {"choice": ["yes", "no"]},
    "format": "json",
    "regex": "a+",
    "allowed_token_ids": [3],
    "guided_decoding": {"choice": ["yes", "no"]},
    "response_schema": {"type": "object"},
    "extra_body": {"guided_choice": ["yes", "no"]},  # a client library's word for what it should have spread out
    "nvext": {"guided_choice": ["yes", "no"]},
    "suppress_tokens": [300],
    "banned_strings": ["no"],
    "stop_sequences": ["x"],
    "stop_strings": ["x"],
    "max_length": 10,
    "system": "Answer in French.",
    "bad_words": ["no"],
    "logits_processors": ["x"],
    "use_beam_search": True,
    "length_penalty": 1.2,
    "repeat_penalty": 1.1,
    "typical_p": 0.5,
    "mirostat": 2,
    "dry_multiplier": 0.8,
    "xtc_probability": 0.5,
    "prompt_logprobs": 1,
    "n_probs": 5,
    "suffix": "x",
    "add_generation_prompt": False,
    "continue_final_message": True,
    "chat_template": "{{ messages }}",
    "truncate_prompt_tokens": 5,
    "skip_special_tokens": False,
    "include_reasoning": False,
    "modalities": ["text", "audio"],
    "audio": {"voice": "a"},
    "web_search_options": {},
    "functions": [{"name": "a"}],
    "function_call": {"name": "a"},
    "max_new_tokens": 5,
    "enable_thinking": True,
    "thinking": {"type": "enabled"},
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_a_field_that_would_change_the_answer_is_refused_by_name(server: Served, name: str) -> None:
    answer = server.post(CHAT, {**HELLO, name: UNSUPPORTED[name]})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, name)
    assert error["message"].startswith(f"{name}: ")
    assert "is not supported" in error["message"]
    if "thinking" not in name:  # of chats
        again = server.post(TEXT, {"model": "nano", "prompt": "Hi", name: UNSUPPORTED[name]})
        assert (again.status_code, again.json()["error"]["param"]) == (400, name)
    again = server.post(RESPONSES, {"input": "Hi", name: UNSUPPORTED[name]})
    assert (again.status_code, again.json()["error"]["param"]) == (400, name)
    if name not in MessagesBody.model_fields and "thinking" not in name:  # which this API switches by itself
        again = server.post(MESSAGES, {**HELLO, "max_tokens": 9, name: UNSUPPORTED[name]})
        assert (again.status_code, again.json()["error"]["message"].partition(":")[0]) == (400, name)


def test_true_is_no_one_and_one_is_not_true(server: Served) -> None:
    for change in ({"n": True}, {"skip_special_tokens": 1}):
        assert server.post(CHAT, {**HELLO, **change}).status_code == 400


@pytest.mark.parametrize("field", ["function_call", "audio", "prefix"])
def test_what_a_message_says_in_unsupported_fields_is_not_lost_in_silence(server: Served, field: str) -> None:
    value = True if field == "prefix" else {"name": "a", "arguments": "{}"}
    history: list[dict[str, Any]] = [{"role": "user", "content": "Hi"}]
    history.append({"role": "assistant", "content": "Ho", field: value})
    error = server.post(CHAT, {**HELLO, "messages": history}).json()["error"]
    assert error["param"] == f"messages[1].{field}"
    assert server.post(CHAT, {**HELLO, "messages": [{**history[1], field: None}]}).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_fields_that_nobody_knows_are_ignored_and_the_answer_names_them(server: Served, stream: bool) -> None:
    body = {**HELLO, "stream": stream, "max_token": 5, "tempreature\r\nX: y": 1, "user": "me"}
    answer = server.post(CHAT, body)
    assert answer.status_code == 200
    assert answer.headers["X-Ignored-Fields"] == "max_token, tempreature??X??y"
    assert "X-Ignored-Fields" not in server.post(CHAT, HELLO).headers


def test_an_effort_means_nothing_to_a_model_that_does_not_think_and_the_answer_says_so(server: Served) -> None:
    for effort, said in (("low", "reasoning_effort"), ("max", "reasoning_effort"), ("none", None), (None, None)):
        answer = server.post(CHAT, {**HELLO, "reasoning_effort": effort})
        assert (answer.status_code, answer.headers.get("X-Ignored-Fields")) == (200, said)
    answer = server.post(RESPONSES, {"input": "Hi", "reasoning": {"effort": "low"}})
    assert (answer.status_code, answer.headers.get("X-Ignored-Fields")) == (200, "reasoning.effort")
    adaptive = {"thinking": {"type": "adaptive"}, "output_config": {"effort": "low"}}
    answer = server.post(MESSAGES, {**HELLO, "max_tokens": 9, **adaptive})
    assert (answer.status_code, answer.headers.get("X-Ignored-Fields")) == (200, "output_config.effort")


@pytest.mark.parametrize("path", [CHAT, TEXT, MESSAGES, RESPONSES])
def test_what_adjusts_an_answer_is_taken_by_every_endpoint(server: Served, path: str) -> None:
    asked: dict[str, dict[str, Any]] = {
        CHAT: {},
        TEXT: {"prompt": "Hi", "max_tokens": 6},
        MESSAGES: {"max_tokens": 9},
        RESPONSES: {"input": "Hi"},
    }
    own = asked[path] if path in (TEXT, RESPONSES) else {**HELLO, **asked[path]}
    adjusted = {"presence_penalty": 0.1, "frequency_penalty": 0.1, "logit_bias": {"5": -1}, "ignore_eos": True}
    answer = server.post(
        path,
        {**own, **adjusted, "min_tokens": 1, "stop_token_ids": [server.worker.engine.tokenizer.special["<|user|>"]]},
    )
    assert (answer.status_code, answer.headers.get("X-Ignored-Fields")) == (200, None), answer.text
    for name, wrong in (("logit_bias", {"99999999": 1}), ("stop_token_ids", [10**8]), ("presence_penalty", 3)):
        answer = server.post(path, {**own, name: wrong})
        assert (answer.status_code, answer.json()["error"]["message"].partition(":")[0]) == (400, name)


def test_every_field_of_an_endpoint_is_known_to_the_others() -> None:
    chat = set(ChatRequest.model_fields)
    forms = {
        CHAT: chat,
        TEXT: set(CompletionRequest.model_fields),
    }  # the others take what chats take
    forms |= {MESSAGES: chat | set(MessagesBody.model_fields), RESPONSES: chat | set(ResponsesBody.model_fields)}
    spoken = unsupported._FIELDS.keys() | unsupported._HARMLESS.keys()
    for form, other in itertools.permutations(forms, 2):
        unknown = forms[form] - forms[other] - spoken
        assert not unknown, f"{unknown} of {form} would be taken by {other} and ignored"


def test_top_k_minus_one_is_off_and_minus_two_is_wrong(server: Served) -> None:
    assert server.post(CHAT, {**HELLO, "top_k": -1, "temperature": 1, "seed": 3}).status_code == 200
    assert server.post(CHAT, {**HELLO, "top_k": -2}).json()["error"]["param"] == "top_k"


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [5, -1]}, "prompt"),
        ({"prompt": [10**9]}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"logprobs": 21}, "logprobs"),
        ({"suffix": "x"}, "suffix"),
        ({"max_tokens": -1}, "max_tokens"),
    ],
    ids=str,
)
def test_a_wrong_field_of_a_completion_is_named(server: Served, change: dict[str, Any], field: str) -> None:
    answer = server.post(TEXT, {"model": "nano", "prompt": "Hello", **change})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"].startswith(field)


BODIES = {
    "no JSON": b"{model: nano}",
    "nothing": b"",
    "half an object": json.dumps(HELLO).encode()[:-5],
    "a list": b"[]",
    "a number": b"3",
    "NaN": b'{"model": "nano", "messages": [{"role": "user", "content": "a"}], "temperature": NaN}',
    "no UTF-8": b'{"model": "nano", "messages": [{"role": "user", "content": "\xff\xfe"}]}',
    "cut UTF-8": b'{"model": "nano", "messages": [{"role": "user", "content": "\xe4\xb8"}]}',
    "UTF-16": json.dumps(HELLO).encode("utf-16"),
    "a huge number": b'{"model": "nano", "max_tokens": ' + b"9" * 5000 + b"}",
    "deep nesting": b'{"model": "nano", "messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
}


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES.keys())
def test_a_body_that_is_no_request_is_a_400(server: Served, body: bytes) -> None:
    for path in (CHAT, TEXT):
        answer = server.http.post(path, content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code == 400
        assert answer.json()["error"]["message"]


def test_an_unknown_model_and_an_unknown_path_are_404(server: Served) -> None:
    answer = server.post(CHAT, {**HELLO, "model": "gpt-4"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
    assert server.http.get("/v1/nothing").status_code == 404
    refused = server.http.get(CHAT)
    assert (refused.status_code, refused.headers["allow"]) == (405, "POST")
    assert "GET" in server.http.post("/health").headers["allow"]


def test_halves_of_surrogate_pairs_are_text_like_any_other(server: Served) -> None:
    body = b'{"model": "nano", "messages": [{"role": "user", "content": "a\\ud800b"}]}'
    assert server.http.post(CHAT, content=body, headers={"Content-Type": "application/json"}).status_code == 200
    body = b'{"model": "\\ud800", "messages": [{"role": "user", "content": "a"}]}'
    assert server.http.post(CHAT, content=body, headers={"Content-Type": "application/json"}).status_code == 404


@pytest.mark.parametrize(
    "change",
    [
        {"temperature": None, "max_tokens": None, "stop": None, "tools": None, "n": None, "stream": None},
        {"user": "me", "metadata": {"a": "b"}, "store": False, "reasoning_effort": "low", "unknown": [1]},
        {
            "presence_penalty": 0,
            "frequency_penalty": 0.0,
            "logit_bias": {},
            "n": 1,
            "response_format": {"type": "text"},
        },
        {"temperature": 1, "top_p": 1, "top_k": 40, "min_p": 0.1, "repetition_penalty": 1.1, "seed": -1},
        {"tools": [], "tool_choice": "auto"},
        {"top_k": -1, "top_p": 1.0, "min_p": 0, "function_call": "none", "functions": [], "suffix": "", "echo": False},
        {"function_call": "auto", "stop": [], "seed": None, "logit_bias": {"300": 0}, "best_of": 1, "min_tokens": 0},
        {
            "n": None,
            "min_tokens": 0,
            "ignore_eos": None,
            "stop_token_ids": None,
            "logit_bias": [],
            "presence_penalty": None,
        },
        {
            "best_of": None,
            "echo": None,
            "reasoning_effort": "none",
            "reasoning": None,
            "top_logprobs": 0,
            "logprobs": False,
        },
        {"guided_json": None, "grammar": "", "structured_outputs": {}, "ignore_eos": False, "stop_token_ids": []},
        {"chat_template_kwargs": {}, "add_generation_prompt": True, "skip_special_tokens": True, "mirostat": 0},
        {"enable_thinking": False, "thinking": {"type": "disabled"}, "modalities": ["text"], "repeat_penalty": 1.0},
        {"prediction": {"type": "content", "content": "x"}, "service_tier": "auto", "prompt_cache_key": "a"},
        {"messages": [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": ""}]},
        {"max_tokens": 100_000},
    ],
    ids=str,
)
def test_what_clients_usually_send_is_accepted(server: Served, change: dict[str, Any]) -> None:
    assert server.post(CHAT, {**HELLO, **change}).status_code == 200


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_a_text_at_which_the_models_tokenizer_fails_is_answered_with_its_words(path: str) -> None:
    engine = scripted("\nHi.<|user|>")
    backend = engine.tokenizer._backend
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex("(x+x+)+y"), "isolated"), backend.pre_tokenizer]
    )
    text = "x" * 30
    asked = {"model": "nano", "messages": [{"role": "user", "content": text}], "prompt": text}
    del asked["prompt" if path == CHAT else "messages"]
    with served(engine) as running:
        answer = running.http.post(path, json=asked)
        assert answer.status_code == 500
        assert "tokenizer.json: cannot be read as a tokenizer, or not used as one" in answer.json()["error"]["message"]
        assert running.http.get("/health").status_code == 200
