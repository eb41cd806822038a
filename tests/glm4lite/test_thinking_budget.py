"""A limited thought: where it ends, what follows it, what is counted, and who is told where there is none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import glm4lite
from glm4lite.base.errors import SamplingError, TemplateError
from glm4lite.base.events import Done, Event, TextDelta, ThinkingDelta
from glm4lite.chat.session import ChatSession
from glm4lite.engine.engine import Engine
from glm4lite.engine.sampling import SamplingParams
from glm4lite.engine.thinking_budget import ThinkingBudget
from glm4lite.server.question import chat_question
from glm4lite.server.requests import ChatRequest
from glm4lite.server.thinking import wanted_thinking
from glm4lite.text.messages import Message
from glm4lite.text.template import END_OF_THOUGHT, ChatTemplate
from glm4lite.text.tokenizer import Tokenizer
from glm4lite.tools.builtin.tools import BUILTIN_TOOLS
from tests.glm4lite.scripted import scripted_engine
from tests.glm4lite.served import served

NANO = Path(glm4lite.__file__).parent / "nano"
HISTORY = (
    "[gMASK]<sop>{% for m in messages %}<|{{ m.role }}|>\n{{ m.content.split('</think>')[-1].strip() }}{% endfor %}"
)
Z1 = HISTORY + "{% if tools %}{% endif %}{% if add_generation_prompt %}<|assistant|>\n<think>{% endif %}"
BY_ITSELF = HISTORY + "{% if add_generation_prompt %}<|assistant|>{% endif %}"  # as Rumination: the model opens it
WELL = "\nWell, 2 + 2 is four. Or is it five?"  # what a model would think


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(NANO)


def session(tokenizer: Tokenizer, *replies: str, source: str = Z1, context: int = 4096, **sampling: Any) -> ChatSession:
    engine = scripted_engine(tokenizer, ChatTemplate(source), list(replies), context)
    return ChatSession(engine, BUILTIN_TOOLS, params=engine.params(**sampling))


def said(events: list[Event]) -> tuple[str, str, Done]:
    thought = "".join(event.text for event in events if isinstance(event, ThinkingDelta))
    text = "".join(event.text for event in events if isinstance(event, TextDelta))
    assert isinstance(events[-1], Done)
    return thought, text, events[-1]


def after(tokenizer: Tokenizer, thought: str, tokens: int, answer: str) -> str:
    """What a scripted model has to be told to say: for each pass that puts ids in it is asked once, in vain."""
    kept = tokenizer.ids(thought)[: tokens + 1]
    return tokenizer.text(kept) + answer


# --- where a thought ends


@pytest.mark.parametrize("budget", [2, 3, 7])
def test_a_thought_ends_at_its_budget_and_the_answer_follows(tokenizer: Tokenizer, budget: int) -> None:
    kept = tokenizer.ids(WELL)[:budget]
    found = session(tokenizer, after(tokenizer, WELL, budget, "Four.<|user|>"), thinking_budget=budget)
    thought, text, done = said(list(found.send("2 + 2?")))
    assert (thought, text, done.finish_reason) == (tokenizer.text(kept).lstrip("\n") + "\n", "Four.", "stop")
    assert found.messages[-1] == Message("assistant", "Four.")
    closing, answer = tokenizer.ids(END_OF_THOUGHT), tokenizer.ids("Four.")
    assert done.new_tokens == budget + len(closing) + len(answer) + 1  # with the stop id
    model: Any = found.engine.model
    assert closing in model.fed  # all of it in one pass
    assert [token for ids in model.fed[1:] for token in ids] == [*kept, *closing, *answer]


@pytest.mark.parametrize("source", [Z1, BY_ITSELF])
def test_no_budget_is_no_limit_and_a_larger_one_changes_nothing(tokenizer: Tokenizer, source: str) -> None:
    reply = ("" if source is Z1 else "<think>") + WELL + "\n</think>\n\nFour.<|user|>"
    for budget in (None, 400, len(tokenizer.ids(WELL + "\n</think>"))):
        found = session(tokenizer, reply, source=source, thinking_budget=budget)
        assert said(list(found.send("2 + 2?")))[:2] == (WELL.lstrip() + "\n", "Four.")


def test_a_budget_of_nothing_is_no_thought(tokenizer: Tokenizer) -> None:
    found = session(tokenizer, "\nFour.<|user|>", thinking_budget=0)
    events = list(found.send("2 + 2?"))
    assert said(events)[:2] == ("", "Four.")
    assert not any(isinstance(event, ThinkingDelta) for event in events)
    model: Any = found.engine.model
    assert tokenizer.text([*model.fed[0], *model.fed[1]]).endswith("<think>\n</think>\n\n")


def test_a_model_that_would_end_in_its_thought_gives_an_answer_instead(tokenizer: Tokenizer) -> None:
    found = session(tokenizer, "\nWell<|user|>Four.<|user|>", thinking_budget=len(tokenizer.ids("\nWell")))
    assert said(list(found.send("2 + 2?")))[:2] == ("Well\n", "Four.")


def test_a_thought_that_the_model_opens_itself_is_counted_from_there(tokenizer: Tokenizer) -> None:
    reply = "\n<think>" + after(tokenizer, WELL, 4, "Four.<|user|>")
    found = session(tokenizer, reply, source=BY_ITSELF, thinking_budget=4)
    thought = tokenizer.text(tokenizer.ids(WELL)[:4])
    assert said(list(found.send("2 + 2?")))[:2] == (thought.lstrip("\n") + "\n", "Four.")


def test_an_answer_may_speak_of_thoughts(tokenizer: Tokenizer) -> None:
    answer = "Models write <think> and " + "then " * 30 + "</think>."
    for source, begin in ((BY_ITSELF, "\n"), (Z1, "Hm.</think>\n\n")):
        found = session(tokenizer, f"{begin}{answer}<|user|>", source=source, thinking_budget=8)
        assert said(list(found.send("How?")))[1] == answer


def test_a_tag_that_was_begun_within_the_budget_is_finished(tokenizer: Tokenizer) -> None:
    thought = "\nWell\n"
    for part in range(1, len(tokenizer.ids("</think>"))):
        budget = len(tokenizer.ids(thought)) + part
        found = session(tokenizer, thought + "</think>\n\nFour.<|user|>", thinking_budget=budget)
        assert said(list(found.send("2 + 2?")))[:2] == ("Well\n", "Four.")


def test_what_only_looks_like_a_tag_does_not_go_on(tokenizer: Tokenizer) -> None:
    found = session(tokenizer, "\n" + "<" * 5 + "Four.<|user|>", thinking_budget=5)
    assert said(list(found.send("2 + 2?")))[:2] == ("<<<<\n", "Four.")


@pytest.mark.parametrize("budget", [2, 3])
def test_a_character_is_not_cut(tokenizer: Tokenizer, budget: int) -> None:
    assert len(tokenizer.ids("\n中")) == 4
    found = session(tokenizer, "\n中w四<|user|>", thinking_budget=budget)
    assert said(list(found.send("2 + 2?")))[:2] == ("中\n", "四")


def test_bytes_that_never_become_a_character_do_not_go_on(tokenizer: Tokenizer) -> None:
    half = tokenizer.ids("中")[:1]
    budget = ThinkingBudget(tokenizer, tokenizer.ids("<|assistant|>\n<think>", special=True), 2)
    taken = [budget(token) for token in half * 8]
    assert [bool(ids) for ids in taken].index(True) <= 2 + 3


def test_a_prompt_with_a_line_end_written_out_opens_a_thought_too(tokenizer: Tokenizer) -> None:
    source = HISTORY + "{% if add_generation_prompt %}<|assistant|>\\n<think>{% endif %}"  # as shipped with a Z1
    found = session(tokenizer, after(tokenizer, WELL, 3, "Four.<|user|>"), source=source, thinking_budget=3)
    assert "\\n<think>" in found.template.render([Message("user", "Hi")])
    assert said(list(found.send("2 + 2?")))[1] == "Four."


# --- what goes with it


def test_each_round_of_tools_has_the_budget_anew(tokenizer: Tokenizer) -> None:
    call = 'calculator\n{"expression": "37 * 24"}<|observation|>'
    replies = [after(tokenizer, WELL, 2, call), after(tokenizer, WELL, 2, "It is 888.<|user|>")]
    found = session(tokenizer, *replies, thinking_budget=2)
    thought, text, done = said(list(found.send("37 * 24?")))
    assert (thought, text, done.finish_reason) == ("W\nW\n", "It is 888.", "stop")
    assert [message.role for message in found.messages] == ["user", "assistant", "tool", "assistant"]


def test_stop_texts_are_not_found_in_what_ends_the_thought(tokenizer: Tokenizer) -> None:
    for stop in ("\n\n", "W\n", "think"):
        found = session(tokenizer, after(tokenizer, WELL, 2, "Fo\n\nur.<|user|>"), thinking_budget=2, stop=(stop,))
        thought, text, done = said(list(found.send("2 + 2?")))
        assert (thought, done.finish_reason) == ("W\n", "stop")
        assert text == ("Fo" if stop == "\n\n" else "Fo\n\nur.")


def test_a_limit_of_the_answer_that_leaves_no_room_to_end_the_thought_cuts_it(tokenizer: Tokenizer) -> None:
    room = len(tokenizer.ids(END_OF_THOUGHT))
    for most, ended in ((4 + room - 1, False), (4 + room, True), (4 + room + 1, True)):
        reply = after(tokenizer, WELL, 4, "Four.<|user|>")
        found = session(tokenizer, reply, thinking_budget=4, max_new_tokens=most)
        thought, text, done = said(list(found.send("2 + 2?")))
        assert done.finish_reason == "length"
        assert thought == tokenizer.text(tokenizer.ids(WELL)[:4]).lstrip() + ("\n" if ended else "")
        assert done.new_tokens == (4 if not ended else most)
        assert bool(text) == (most > 4 + room)


def test_going_on_counts_what_was_thought_before(tokenizer: Tokenizer) -> None:
    begun, budget = "Well, 2", 9
    spent = len(tokenizer.ids("\n" + begun))
    rest = " + 2 is four, I am sure of it"
    kept = tokenizer.text(tokenizer.ids(rest)[: budget - spent])
    found = session(tokenizer, after(tokenizer, rest, budget - spent, "Four.<|user|>"), thinking_budget=budget)
    found.messages.append(Message("user", "2 + 2?"))
    assert said(list(found.resume("", begun)))[:2] == (begun + kept + "\n", "Four.")


@pytest.mark.parametrize(("text", "thinking"), [("", "Well, 2 + 2"), ("Fo", "Well, 2 + 2"), ("Fo", "")])
def test_going_on_beyond_the_budget_answers_at_once(tokenizer: Tokenizer, text: str, thinking: str) -> None:
    reply = "ur.<|user|>" if text else " Four.<|user|>"
    found = session(tokenizer, reply, thinking_budget=2)
    found.messages.append(Message("user", "2 + 2?"))
    thought, answer, _ = said(list(found.resume(text, thinking)))
    assert (thought.rstrip("\n"), answer) == (thinking, "Four.")


def test_a_real_model_goes_on_as_if_it_had_ended_the_thought_itself(tmp_path: Path) -> None:
    folder = tmp_path / "thinking"
    shutil.copytree(NANO, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    config.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    (folder / "chat_template.jinja").write_text(Z1, "utf-8")
    engine, budget = Engine.load(folder, quant="none", dtype="float32"), 5
    prompt = engine.chat_template().encode(engine.tokenizer, [Message("user", "Tell me about the moon")])
    free = list(engine.generate(prompt, SamplingParams(temperature=0, max_new_tokens=40)))
    generation = engine.generate(prompt, SamplingParams(temperature=0, max_new_tokens=40, thinking_budget=budget))
    ids = list(generation)
    closed = [*free[:budget], *engine.tokenizer.ids(END_OF_THOUGHT)]
    assert ids[: len(closed)] == closed
    uncached = [*prompt, *closed]
    with torch.inference_mode():
        for drawn in ids[len(closed) : len(closed) + 8]:
            logits = engine.model(torch.tensor([uncached])).logits[0, -1, : engine.tokenizer.size]
            assert drawn == int(logits.argmax())
            uncached.append(drawn)
    kept = engine.prefixes.take([*prompt, *ids, 0]).ids
    assert kept == [*prompt, *ids][: len(kept)]
    assert len(ids) > len(closed)


# --- what no budget limits


@pytest.mark.parametrize("source", [Z1, BY_ITSELF])
def test_a_thought_that_never_ends_leaves_the_answer_its_room(tokenizer: Tokenizer, source: str) -> None:
    context = 400
    begin = "" if source is Z1 else "<think>"
    found = session(tokenizer, begin + "\nround " * 2000 + "<|user|>", source=source, context=context)
    model: Any = found.engine.model
    closing = tokenizer.ids(END_OF_THOUGHT)
    answered = {"left": tokenizer.ids("Four.<|user|>", special=True)}
    step = model.step

    def closed(spans: Any) -> Any:  # once the thought was ended, it answers
        if list(spans[0].ids)[-len(closing) :] == closing:
            model.left = answered["left"]
        return step(spans)

    model.step = closed
    thought, text, done = said(list(found.send("2 + 2?")))
    assert (text, done.finish_reason) == ("Four.", "stop")
    left = context - len(found._prompt(found.messages[:1]))
    assert 0.6 * left < len(tokenizer.ids(thought)) <= 0.75 * left + 2


def test_a_thought_that_never_ends_is_cut_where_the_answers_length_is_said(tokenizer: Tokenizer) -> None:
    found = session(tokenizer, "\nround " * 2000, max_new_tokens=30)
    thought, text, done = said(list(found.send("2 + 2?")))
    assert (text, done.finish_reason, done.new_tokens) == ("", "length", 30)
    assert thought.startswith("round")


def test_an_effort_is_a_budget() -> None:
    def budget(effort: str | None, **budgets: int | None) -> int | str | None:
        wanted = wanted_thinking({}, budgets, effort)
        return "nothing" if wanted is None else wanted.budget

    assert [budget(effort) for effort in (None, "none", "minimal", "low", "medium")] == ["nothing", 0, 128, 1024, 4096]
    assert [budget(effort) for effort in ("high", "xhigh", "max")] == [None] * 3
    assert budget("low", thinking_budget=2000) == 2000
    assert budget("low", thinking_budget=-1) is None


# --- what a template reads


READS = (
    HISTORY + "{% if mood is defined %}Be {{ mood }}.{% endif %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def test_template_variables_reach_the_template_over_http_and_from_python(tokenizer: Tokenizer) -> None:
    engine = scripted_engine(tokenizer, ChatTemplate(READS), ["\nHi.<|user|>"])
    asked = {"model": "nano", "messages": [{"role": "user", "content": "Hello"}]}

    def prompt(**variables: object) -> str:
        request = ChatRequest.read(asked | {"chat_template_kwargs": variables})
        return tokenizer.text(chat_question(engine, request).prompt, keep_special=True)

    assert "Be " not in prompt()
    assert prompt(mood="kind").endswith("Be kind.<|assistant|>")
    request = ChatRequest.read(asked | {"chat_template_kwargs": {"mood": "<|user|>"}})
    assert chat_question(engine, request).prompt.count(tokenizer.special["<|user|>"]) == 1  # the template's own
    with served(engine) as server:
        assert (
            server.post("/v1/chat/completions", asked | {"chat_template_kwargs": {"mood": "kind"}}).status_code == 200
        )
    found = ChatSession(engine, template_variables={"mood": "calm"})
    assert tokenizer.text(found._prompt([Message("user", "Hi")])).endswith("Be calm.")
    with pytest.raises(TemplateError, match="does not read 'temper'"):
        ChatSession(engine, template_variables={"temper": 1})


# --- who is told


def test_a_budget_that_is_no_number_of_tokens_is_refused() -> None:
    for wrong in (-1, 1.5, True, "4"):
        with pytest.raises(SamplingError, match="thinking_budget must be a whole number at least 0"):
            SamplingParams(thinking_budget=wrong)  # type: ignore[arg-type]


def test_a_model_that_does_not_think_refuses_a_budget_and_not_its_absence(tokenizer: Tokenizer) -> None:
    template = ChatTemplate.from_folder(NANO)
    assert template is not None
    engine = scripted_engine(tokenizer, template, ["\nFour.<|user|>"])
    with pytest.raises(TemplateError, match="this model does not think"):
        ChatSession(engine, params=engine.params(thinking_budget=4))
    found = ChatSession(engine, params=engine.params(thinking_budget=0))
    with pytest.raises(TemplateError, match="this model does not think"):
        found.params = engine.params(thinking_budget=4)
    assert said(list(found.send("2 + 2?")))[:2] == ("", "Four.")


def thinking_engine(tokenizer: Tokenizer, *replies: str) -> Engine:
    return scripted_engine(tokenizer, ChatTemplate(Z1), list(replies))


BUDGETS: list[dict[str, Any]] = [
    {"thinking_budget": 2},
    {"thinking_token_budget": 2},
    {"thinking_budget_tokens": 2},
    {"reasoning_budget_tokens": 2, "thinking_budget": 2},
    {"thinking": {"type": "enabled", "budget_tokens": 2}},
    {"chat_template_kwargs": {"enable_thinking": True, "thinking_budget": 2}, "enable_thinking": True},
    {"reasoning_effort": "high", "thinking_budget": 2},
]
NO_THOUGHT: list[dict[str, Any]] = [
    {"thinking_budget": 0},
    {"enable_thinking": False, "thinking_budget": 0},
    {"thinking": {"type": "disabled"}},
    {"chat_template_kwargs": {"enable_thinking": False}},
    {"enable_thinking": False, "thinking_token_budget": -1},
    {"reasoning_effort": "none"},
]
CONTRADICTIONS: list[tuple[dict[str, Any], str]] = [
    ({"thinking_budget": 2, "thinking_token_budget": 3}, "thinking_token_budget"),
    ({"enable_thinking": False, "thinking_budget": 2}, "thinking_budget"),
    ({"enable_thinking": True, "thinking": {"type": "disabled"}}, "thinking"),
    ({"enable_thinking": True, "thinking_budget": 0}, "thinking_budget"),
    ({"reasoning_effort": "none", "thinking_budget": 2}, "thinking_budget"),
    ({"reasoning_effort": "low", "enable_thinking": False}, "enable_thinking"),
]


def test_every_word_for_a_budget_is_obeyed_over_http(tokenizer: Tokenizer) -> None:
    limited = after(tokenizer, WELL, 2, "Four.<|user|>")
    replies = [*[limited] * len(BUDGETS), *["\nFour.<|user|>"] * len(NO_THOUGHT), "Hm.</think>\n\nFour.<|user|>"]
    asked = {"model": "nano", "messages": [{"role": "user", "content": "2 + 2?"}]}
    with served(thinking_engine(tokenizer, *replies)) as server:

        def answer(fields: dict[str, Any]) -> tuple[str | None, str]:
            reply = server.post("/v1/chat/completions", asked | fields)
            assert (reply.status_code, reply.headers.get("x-ignored-fields")) == (200, None), reply.text
            message = reply.json()["choices"][0]["message"]
            return message.get("reasoning_content"), message["content"]

        assert [answer(fields) for fields in BUDGETS] == [("W\n", "Four.")] * len(BUDGETS)
        assert [answer(fields) for fields in NO_THOUGHT] == [(None, "Four.")] * len(NO_THOUGHT)
        assert answer({"thinking_budget": -1, "enable_thinking": True}) == ("Hm.", "Four.")
        for fields, param in CONTRADICTIONS:
            error = server.post("/v1/chat/completions", asked | fields).json()["error"]
            assert (error["param"], error["message"].endswith("contradict each other")) == (param, True)
        error = server.post("/v1/chat/completions", asked | {"thinking_budget": -2}).json()["error"]
        assert error["param"] == "thinking_budget"
        unknown = {"chat_template_kwargs": {"enable_thinking": False, "documents": [1]}}
        error = server.post("/v1/chat/completions", asked | unknown).json()["error"]
        said = "chat_template_kwargs.documents: this model's chat template does not read 'documents'"
        assert error["message"] == said


ELSEWHERE: list[tuple[str, dict[str, Any], list[tuple[str, str]]]] = [
    ("/v1/messages", {"thinking": {"type": "enabled", "budget_tokens": 2}}, [("thinking", "W\n"), ("text", "Four.")]),
    ("/v1/messages", {"thinking": {"type": "disabled"}}, [("text", "Four.")]),
    ("/v1/messages", {}, [("text", "Four.")]),
    ("/v1/responses", {"thinking_budget": 2}, [("reasoning", "W\n"), ("message", "Four.")]),
    (
        "/v1/responses",
        {"reasoning": {"effort": "high"}, "thinking_budget": 2},
        [("reasoning", "W\n"), ("message", "Four.")],
    ),
    ("/v1/responses", {"reasoning": {"effort": "none"}}, [("message", "Four.")]),
]


def test_a_budget_is_obeyed_in_responses_and_messages_too(tokenizer: Tokenizer) -> None:
    limited = after(tokenizer, WELL, 2, "Four.<|user|>")
    replies = [limited if len(parts) == 2 else "\nFour.<|user|>" for _, _, parts in ELSEWHERE]
    with served(thinking_engine(tokenizer, *replies)) as server:
        for path, fields, parts in ELSEWHERE:
            text = "input" if path == "/v1/responses" else "messages"
            asked = {"input": "2 + 2?"} if text == "input" else {"messages": [{"role": "user", "content": "2 + 2?"}]}
            body = server.post(
                path, {**asked, "max_tokens" if text == "messages" else "max_output_tokens": 99, **fields}
            ).json()
            if text == "input":
                found = [(item["type"], item["content"][0]["text"]) for item in body["output"]]
            else:
                found = [(item["type"], item[item["type"]]) for item in body["content"]]
            assert found == parts


def test_usage_and_log_probabilities_are_right_around_a_thought_that_was_ended(tokenizer: Tokenizer) -> None:
    with served(thinking_engine(tokenizer, after(tokenizer, WELL, 2, "Four.<|user|>"))) as server:
        reply = server.chat("2 + 2?", logprobs=True, extra_body={"thinking_budget": 2})
    tokens = [entry.token for entry in reply.choices[0].logprobs.content]
    assert ("".join(tokens), reply.choices[0].message.content) == ("Four.", "Four.")
    expected = 2 + len(tokenizer.ids(END_OF_THOUGHT)) + len(tokenizer.ids("Four.")) + 1
    assert reply.usage.completion_tokens == expected


@pytest.mark.parametrize("fields", BUDGETS)
def test_a_model_that_does_not_think_says_so_over_http(tokenizer: Tokenizer, fields: dict[str, Any]) -> None:
    template = ChatTemplate.from_folder(NANO)
    assert template is not None
    asked = {"model": "nano", "messages": [{"role": "user", "content": "2 + 2?"}]}
    with served(scripted_engine(tokenizer, template, ["\nFour.<|user|>"])) as server:
        reply = server.post("/v1/chat/completions", asked | fields)
        assert reply.status_code == 400
        assert "this model does not think" in reply.json()["error"]["message"]
        assert server.post("/v1/chat/completions", asked | NO_THOUGHT[0]).status_code == 200
