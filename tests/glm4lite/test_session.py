"""Sessions on exact model outputs: events, the tool loop, history, the kept prefix, stopping."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import pytest
from pydantic import BaseModel, Field, field_validator

import glm4lite
from glm4lite.base.errors import ContextLengthError, Glm4liteError, ModelReplaced, SchemaError, TemplateError
from glm4lite.base.events import (
    Done,
    Event,
    TextDelta,
    ThinkingDelta,
    ToolCallDelta,
    ToolCallFinished,
    ToolCallStarted,
)
from glm4lite.chat.session import ChatSession
from glm4lite.cli.terminal import Terminal
from glm4lite.engine.engine import Engine
from glm4lite.engine.sampling import SamplingParams
from glm4lite.text.messages import Message, ToolCall
from glm4lite.text.template import Begun, ChatTemplate
from glm4lite.text.tokenizer import Tokenizer
from glm4lite.tools.builtin.tools import BUILTIN_TOOLS
from glm4lite.tools.tool import Tool, tool
from glm4lite_quant.kernels import native
from tests.glm4lite.scripted import ScriptedModel, scripted_engine

needs_native = pytest.mark.skipif(native.backend() is None, reason=f"no native library: {native.status()}")
NANO = Path(glm4lite.__file__).parent / "nano"
CALL = 'calculator\n{"expression": "37 * 24"}'


@tool
def broken(city: str) -> str:
    """Always fails.

    Args:
        city: Any city.
    """
    raise RuntimeError(f"no {city} here")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(NANO)


@pytest.fixture(scope="module")
def template() -> ChatTemplate:
    found = ChatTemplate.from_folder(NANO)
    assert found is not None
    return found


Start = Callable[..., ChatSession]


@pytest.fixture
def start(tokenizer: Tokenizer, template: ChatTemplate) -> Start:
    def begin(*replies: str, context: int = 4096, **options: Any) -> ChatSession:
        options.setdefault("tools", [*BUILTIN_TOOLS, broken])
        return ChatSession(scripted_engine(tokenizer, template, list(replies), context), **options)

    return begin


def without_deltas(events: Iterable[Event]) -> list[Event]:
    return [event for event in events if not isinstance(event, ToolCallDelta)]


def first_run(stream: Iterator[Event]) -> Event:
    """The first event that is not about a call being written."""
    return next(event for event in stream if not isinstance(event, ToolCallDelta))


def text_of(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, TextDelta))


def test_a_tool_call_runs_and_its_result_is_answered_from(start: Start) -> None:
    session = start(CALL + "<|observation|>", "\n37 * 24 = 888.<|user|>")
    events = without_deltas(session.send("What is 37 * 24?"))
    assert events[0] == ToolCallStarted("call_1", "calculator", {"expression": "37 * 24"})
    assert events[1] == ToolCallFinished("call_1", "calculator", "888", error=False)
    assert text_of(events) == "37 * 24 = 888."
    assert isinstance(events[-1], Done)
    assert events[-1].finish_reason == "stop"
    assert session.messages == [
        Message("user", "What is 37 * 24?"),
        Message("assistant", tool_calls=(ToolCall("call_1", "calculator", '{"expression": "37 * 24"}'),)),
        Message("tool", "888", tool_call_id="call_1", name="calculator"),
        Message("assistant", "37 * 24 = 888."),
    ]


def test_the_history_is_written_back_in_the_templates_own_form(start: Start) -> None:
    session = start(CALL + "<|observation|>", "\nIt is 888.<|user|>", "\nYes.<|user|>")
    list(session.send("37 * 24?"))
    list(session.send("Sure?"))
    prompt = session.template.render(session.messages[:-1], list(session.tools.values()))
    assert prompt.endswith(
        '<|user|>\n37 * 24?<|assistant|>calculator \n{"expression": "37 * 24"}<|observation|>\n888'
        "<|assistant|>\nIt is 888.<|user|>\nSure?<|assistant|>"
    )


def test_several_calls_of_one_turn_run_in_order(start: Start) -> None:
    second = 'unit_convert\n{"value": 5, "from_unit": "km", "to_unit": "m"}'
    session = start(f"{CALL}<|assistant|>{second}<|observation|>", "\n888 and 5000 m.<|user|>")
    events = list(session.send("Both, please"))
    results = [(event.name, event.content) for event in events if isinstance(event, ToolCallFinished)]
    assert results == [("calculator", "888"), ("unit_convert", "5000 m")]
    assert [message.role for message in session.messages] == ["user", "assistant", "tool", "tool", "assistant"]


def test_a_call_behind_a_sentence_runs_and_is_drawn_behind_it(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    session = start(f"\nLet me see.\n{CALL}<|observation|>", "\nIt is 888.<|user|>")
    events = list(session.send("37 * 24?"))
    call = ToolCall("call_1", "calculator", '{"expression": "37 * 24"}')
    assert session.messages[1:3] == [
        Message("assistant", "Let me see.", (call,)),
        Message("tool", "888", tool_call_id="call_1", name="calculator"),
    ]
    monkeypatch.setattr("sys.stdout", drawn := io.StringIO())
    monkeypatch.setattr("sys.stderr", drawn)
    Terminal().show_all(events)
    assert drawn.getvalue().splitlines() == [
        *("Let me see.", 'calculator({"expression": "37 * 24"})', "  -> 888", "It is 888."),
    ]


def test_a_tool_that_raises_becomes_an_error_observation(start: Start) -> None:
    session = start('broken\n{"city": "Oslo"}<|observation|>', "\nThat did not work.<|user|>")
    events = list(session.send("Try it"))
    finished = next(event for event in events if isinstance(event, ToolCallFinished))
    assert finished.error
    assert finished.content.startswith("Error: ")
    assert "no Oslo here" in finished.content
    assert text_of(events) == "That did not work."


def test_a_model_that_keeps_calling_is_stopped_and_it_is_said(start: Start) -> None:
    session = start(*[CALL + "<|observation|>"] * 4, max_tool_rounds=2)
    events = list(session.send("Loop"))
    assert sum(isinstance(event, ToolCallStarted) for event in events) == 2
    assert isinstance(events[-1], Done)
    assert events[-1].finish_reason == "tool_rounds"
    assert session.messages[-1].content == "Error: the call was not run"


def test_no_tool_rounds_means_no_tool_runs(start: Start) -> None:
    events = without_deltas(start(CALL + "<|observation|>", max_tool_rounds=0).send("Loop"))
    assert [type(event) for event in events] == [Done]


def test_what_only_looks_like_a_call_is_shown_as_text(start: Start) -> None:
    assert text_of(list(start('\nrobot\n{"a": 1}<|user|>').send("Write JSON"))) == 'robot\n{"a": 1}'
    cut = start(CALL, params=SamplingParams(temperature=0, max_new_tokens=8)).send("Again")
    assert text_of(list(cut)) == 'calculator\n{"expression": "37 * '


def test_the_second_turn_computes_only_its_new_tokens(start: Start, tokenizer: Tokenizer) -> None:
    session = start("\nHello.<|user|>", "\nFine.<|user|>")
    first, second = (list(session.send(text))[-1] for text in ("Hi", "How are you?"))
    assert isinstance(first, Done)
    assert isinstance(second, Done)
    assert first.prefilled_tokens == first.prompt_tokens
    said = tokenizer.ids("\nHello.")  # computed while it was said; only the stop token was not
    assert second.prefilled_tokens == second.prompt_tokens - first.prompt_tokens - len(said)


def test_a_stop_text_ends_the_answer_before_it(start: Start) -> None:
    session = start("\nOne, two, three.<|user|>", params=SamplingParams(temperature=0, stop=("two", "zzz")))
    events = list(session.send("Count"))
    assert text_of(events) == "One, "
    assert isinstance(events[-1], Done)
    assert events[-1].finish_reason == "stop"


def test_stop_ends_an_answer_and_what_was_said_stays_in_the_history(start: Start) -> None:
    session = start("\nOne two three four five six.<|user|>")
    events: list[Event] = []
    for event in session.send("Count"):
        events.append(event)
        session.stop()
    assert isinstance(events[-1], Done)
    assert events[-1].finish_reason == "cancelled"
    assert session.messages[-1] == Message("assistant", text_of(events))
    assert 0 < len(text_of(events)) < 10


def test_a_call_that_was_cancelled_keeps_its_place_in_the_history(start: Start) -> None:
    session = start(f"{CALL}<|assistant|>{CALL}<|observation|>")
    stream = session.send("Both")
    assert isinstance(first_run(stream), ToolCallStarted)
    session.stop()
    rest = list(stream)
    assert isinstance(rest[-1], Done)
    assert rest[-1].finish_reason == "cancelled"
    assert [message.role for message in session.messages] == ["user", "assistant", "tool", "tool"]


def test_stop_does_not_wait_for_a_slow_tool(start: Start) -> None:
    released = threading.Event()

    @tool
    def slow() -> str:
        """Waits."""
        threading.Timer(0.2, session.stop).start()
        released.wait(100)
        return "late"

    session = start("slow\n{}<|assistant|>slow\n{}<|observation|>", tools=[slow])
    started = time.monotonic()
    events = list(session.send("Wait"))
    released.set()
    assert time.monotonic() - started < 50
    assert isinstance(events[-1], Done)
    assert events[-1].finish_reason == "cancelled"
    assert sum(isinstance(event, ToolCallFinished) for event in events) == 1


def test_stop_texts_do_not_tear_several_calls_apart(start: Start) -> None:
    params = SamplingParams(temperature=0, stop=("}END",))
    session = start(f"{CALL}<|assistant|>{CALL}<|observation|>", "\nDone.<|user|>", params=params)
    events = list(session.send("Both"))
    assert sum(isinstance(event, ToolCallFinished) for event in events) == 2
    assert text_of(events) == "Done."


def test_a_reader_that_goes_away_leaves_a_history_that_can_go_on(start: Start) -> None:
    session = start(f"{CALL}<|assistant|>{CALL}<|observation|>")
    stream = session.send("Both")
    assert isinstance(first_run(stream), ToolCallStarted)
    stream.close()
    assert [message.role for message in session.messages] == ["user", "assistant", "tool", "tool"]
    assert session.messages[-1].content == "Error: the call was not run"


def test_a_prompt_that_does_not_fit_leaves_the_history_as_it_was(start: Start) -> None:
    session = start("\nHello.<|user|>", context=600)
    list(session.send("Hi"))
    before = list(session.messages)
    with pytest.raises(ContextLengthError, match="context is 600"):
        list(session.send("word " * 600))
    assert session.messages == before


@pytest.mark.parametrize("text", ["word " * 5000, "北京🙂" * 5000, "\0" * 20000])
def test_a_result_takes_half_of_the_context_that_is_left_and_the_model_still_answers(start: Start, text: str) -> None:
    reading = Tool("read", "Reads.", {"type": "object", "properties": {}}, lambda: text)
    session = start("read\n{}<|assistant|>read\n{}<|observation|>", "\nMuch.<|user|>", context=600, tools=[reading])
    events = list(session.send("Read it"))
    first, second = (event.content for event in events if isinstance(event, ToolCallFinished))
    assert text.startswith(first.partition("\n[cut: ")[0])
    assert first.endswith("more characters]")
    assert 10 < len(second) < len(first)
    assert text_of(events) == "Much."
    assert session.messages[2].content == first


def test_reset_forgets_all_but_the_system_prompt(start: Start) -> None:
    session = start("\nHello.<|user|>", system="Be brief.")
    list(session.send("Hi"))
    session.reset()
    assert session.messages == [Message("system", "Be brief.")]


def test_thinking_is_split_from_the_answer_and_left_out_of_the_history(tokenizer: Tokenizer) -> None:
    source = (
        "[gMASK]<sop>{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n<think>{% endif %}"
    )
    engine = scripted_engine(tokenizer, ChatTemplate(source), ["\nWell, 2 + 2.</think>\n\nFour.<|user|>"])
    session = ChatSession(engine)
    events = list(session.send("2 + 2?"))
    thought = "".join(event.text for event in events if isinstance(event, ThinkingDelta))
    assert thought.strip() == "Well, 2 + 2."
    assert text_of(events) == "Four."
    assert session.messages[-1] == Message("assistant", "Four.")


def resumed(session: ChatSession, begun: Begun, question: str = "37 * 24?") -> list[Event]:
    session.messages[:] = [Message("user", question)]
    return list(session.resume(begun.text, begun.thinking))


def test_a_cut_answer_goes_on_and_all_of_it_is_told(start: Start) -> None:
    session = start("8.<|user|>")
    events = resumed(session, Begun("It is 88\ufffd"))
    assert text_of(events) == "It is 888."
    assert session.messages[-1] == Message("assistant", "It is 888.")
    model: Any = session.engine.model
    prompt = [token for ids in model.fed for token in ids][: -len("8.")]
    assert session.engine.tokenizer.text(prompt, keep_special=True).endswith("37 * 24?<|assistant|>\nIt is 88")


def test_a_call_that_was_cut_is_a_call_once_it_is_whole(start: Start) -> None:
    for cut in (len("calc"), len("calculator\n"), len(CALL) - 1):
        session = start(CALL[cut:] + "<|observation|>", "\nIt is 888.<|user|>")
        events = without_deltas(resumed(session, Begun("Let me see.\n" + CALL[:cut])))
        assert [type(event) for event in events[:3]] == [TextDelta, ToolCallStarted, ToolCallFinished]
        assert text_of(events) == "Let me see.It is 888."
        assert session.messages[1] == Message(
            "assistant", "Let me see.", (ToolCall("call_1", "calculator", '{"expression": "37 * 24"}'),)
        )


def test_a_code_block_that_was_cut_is_still_one(start: Start) -> None:
    session = start(f"{CALL}\n```<|user|>")
    events = resumed(session, Begun("So:\n```\n"))
    assert text_of(events) == f"So:\n```\n{CALL}\n```"
    assert session.messages[-1] == Message("assistant", f"So:\n```\n{CALL}\n```")


THINKING = (
    "[gMASK]<sop>{% for m in messages %}<|{{ m.role }}|>\n{{ m.content.split('</think>')[-1].strip() }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n<think>{% endif %}"
)


@pytest.mark.parametrize(
    ("begun", "reply"),
    [
        (Begun(thinking="Well, 2"), " + 2.\n</think>\n\nFour, I say.<|user|>"),
        (Begun(thinking="Well, 2 + 2.\n"), "</think>\n\nFour, I say.<|user|>"),
        (Begun("Four, ", "Well, 2 + 2.\n"), "I say.<|user|>"),
        (Begun(), "\nWell, 2 + 2.\n</think>\n\nFour, I say.<|user|>"),
    ],
)
def test_a_thought_goes_on_and_is_told_again(tokenizer: Tokenizer, begun: Begun, reply: str) -> None:
    session = ChatSession(scripted_engine(tokenizer, ChatTemplate(THINKING), [reply]))
    events = resumed(session, begun, "2 + 2?")
    thought = "".join(event.text for event in events if isinstance(event, ThinkingDelta))
    assert (thought, text_of(events)) == ("Well, 2 + 2.\n", "Four, I say.")
    assert session.messages[-1] == Message("assistant", "Four, I say.")


def test_an_answer_that_cannot_go_on_is_as_it_was(start: Start) -> None:
    session = start("8.<|user|>", context=64)
    with pytest.raises(ContextLengthError):
        resumed(session, Begun("word " * 200))
    assert session.messages == [Message("user", "37 * 24?")]
    stopped = threading.Event()
    stopped.set()
    session = start("8.<|user|>", compute=lambda make_events, cancel: iter(()))
    session.messages[:] = [Message("user", "37 * 24?")]
    assert [type(event) for event in session.resume("It is", cancel=stopped)] == [Done]
    assert session.messages[-1] == Message("assistant", "It is")


def test_going_on_computes_only_what_was_not_kept(tokenizer: Tokenizer, template: ChatTemplate) -> None:
    session = ChatSession(Engine.load("nano"), params=SamplingParams(temperature=0, max_new_tokens=6))
    *_, cut = session.send("Tell me about the moon")
    assert isinstance(cut, Done)
    assert cut.finish_reason == "length"
    answered = session.messages.pop()
    *_, done = session.resume(answered.content)
    assert isinstance(done, Done)
    assert done.prefilled_tokens < cut.prefilled_tokens // 4


def test_a_prompt_never_meets_a_model_that_was_loaded_meanwhile(tokenizer: Tokenizer, template: ChatTemplate) -> None:
    old, new = (scripted_engine(tokenizer, template, ["Hi"]) for _ in range(2))
    session = ChatSession(old, compute=lambda make_events, _: make_events(new))
    with pytest.raises(ModelReplaced, match="ask again"):
        list(session.send("Hello"))
    assert session.messages == []


def test_a_base_model_is_sent_to_generate(tokenizer: Tokenizer) -> None:
    with pytest.raises(TemplateError, match="glm4lite generate"):
        ChatSession(Engine(ScriptedModel(tokenizer, []), tokenizer, None))  # type: ignore[arg-type]


def test_a_conversation_that_is_recalled_goes_on_with_ids_of_its_own(start: Start) -> None:
    first = start(CALL + "<|observation|>", "\n888.<|user|>", system="Be brief.")
    list(first.send("What is 37 * 24?"))
    second = start(CALL + "<|observation|>", "\n888.<|user|>")
    second.recall(first.messages)
    assert second.system == "Be brief."
    list(second.send("And again?"))
    calls = [call.id for message in second.messages for call in message.tool_calls]
    assert calls == ["call_1", "call_2"]
    second.reset()
    assert second.messages == [Message("system", "Be brief.")]


def test_the_system_prompt_can_be_set_changed_and_taken_away(start: Start) -> None:
    session = start("\nHi.<|user|>")
    session.instruct("One.")
    list(session.send("Hello"))
    session.instruct("Two.")
    assert [message.content for message in session.messages] == ["Two.", "Hello", "Hi."]
    session.instruct(None)
    assert [message.role for message in session.messages] == ["user", "assistant"]
    session.reset()
    assert session.messages == []


def test_a_stopped_answer_goes_on_as_if_it_had_not_been() -> None:
    engine = Engine.load("nano")
    whole, session = (ChatSession(engine, params=SamplingParams(temperature=0)) for _ in range(2))
    said = text_of(list(whole.send("Tell me about the moon")))
    for number, _ in enumerate(session.send("Tell me about the moon")):
        if number == 2:
            session.stop()
    assert session.cut is not None
    assert session.messages[-1] == Message("assistant", session.cut.text)
    assert text_of(list(session.go_on())) == said
    assert session.messages == whole.messages
    with pytest.raises(Glm4liteError, match="the last one is whole"):
        list(session.go_on())


def test_a_call_is_told_of_while_it_is_written(start: Start) -> None:
    session = start(f"\nI look.\n{CALL}<|assistant|>{CALL}<|observation|>", "\n888.<|user|>")
    events = list(session.send("What is 37 * 24?"))
    deltas = [event for event in events if isinstance(event, ToolCallDelta)]
    assert [(event.id, event.arguments) for event in deltas if not event.arguments] == [("call_1", ""), ("call_2", "")]
    for call in ("call_1", "call_2"):
        pieces = [event.arguments for event in deltas if event.id == call]
        assert "".join(pieces) == '{"expression": "37 * 24"}'
        assert len(pieces) > 4
    started = [event.id for event in events if isinstance(event, ToolCallStarted)]
    assert started == ["call_1", "call_2"]
    assert events.index(deltas[-1]) < next(at for at, one in enumerate(events) if isinstance(one, ToolCallStarted))


def test_a_call_that_is_cut_becomes_text_and_a_call_again_when_it_goes_on(start: Start) -> None:
    session = start(f"\nI look.\n{CALL}<|observation|>", params=SamplingParams(temperature=0, max_new_tokens=14))
    events = list(session.send("What is 37 * 24?"))
    assert any(isinstance(event, ToolCallDelta) for event in events)
    assert not any(isinstance(event, ToolCallStarted) for event in events)
    assert session.cut is not None
    assert f"I look.\n{CALL}".startswith(session.cut.text)
    assert text_of(events) == session.cut.text
    model: Any = session.engine.model
    model.replies.append(session.engine.tokenizer.ids("\n888.<|user|>", special=True))
    session.params = SamplingParams(temperature=0)
    again = list(session.go_on())
    assert [event.name for event in again if isinstance(event, ToolCallFinished)] == ["calculator"]
    assert text_of(again) == "I look.888."


def test_arguments_follow_their_schema_whatever_the_model_would_say(start: Start) -> None:
    session = start(
        'calculator\n{"formula": "1"}<|observation|>', params=SamplingParams(temperature=0, max_new_tokens=9)
    )
    written = "".join(event.arguments for event in session.send("1?") if isinstance(event, ToolCallDelta))
    assert written.startswith('{"expression')


class City(BaseModel):
    name: Annotated[str, Field(max_length=8)]
    inhabitants: Annotated[int, Field(ge=0, le=99)]


def test_an_answer_is_the_object_that_its_schema_describes(start: Start) -> None:
    session = start(
        '\n{"name": "Bonn", "inhabitants": 33}<|user|>', '\n{"name": "Köln", "inhabitants": 1}<|user|>', "\nHi.<|user|>"
    )
    assert session.ask("Which city?", schema=City) == City(name="Bonn", inhabitants=33)
    assert session.ask("Which other?", schema=City.model_json_schema()) == {"name": "Köln", "inhabitants": 1}
    assert session.ask("Hello") == "Hi."
    assert session.messages[1] == Message("assistant", '{"name": "Bonn", "inhabitants": 33}')
    assert session.schema is None


def test_an_answer_with_a_schema_may_call_tools_first(start: Start) -> None:
    session = start(CALL + "<|observation|>", '\n{"result": 888}<|user|>')
    schema = {"type": "object", "properties": {"result": {"type": "integer"}}, "required": ["result"]}
    assert session.ask("37 * 24?", schema=schema) == {"result": 888}
    assert [message.role for message in session.messages] == ["user", "assistant", "tool", "assistant"]


@needs_native
def test_nano_answers_as_a_schema_wants() -> None:
    session = ChatSession(Engine.load("nano", quant="int4"), params=SamplingParams(temperature=0, max_new_tokens=60))
    assert isinstance(session.ask("Which city is it?", schema=City), City)
    session.schema = {"enum": ["yes", "no"]}
    assert text_of(list(session.send("Is it warm?"))) in ('"yes"', '"no"')


def test_a_thought_comes_before_an_answer_with_a_schema(tokenizer: Tokenizer) -> None:
    reply = '\nWell, {.</think>\n\n{"name": "Bonn", "inhabitants": 3}<|user|>'
    session = ChatSession(scripted_engine(tokenizer, ChatTemplate(THINKING), [reply]))
    session.schema = City.model_json_schema()
    events = list(session.send("Which?"))
    assert "".join(event.text for event in events if isinstance(event, ThinkingDelta)) == "Well, {."
    assert text_of(events) == '{"name": "Bonn", "inhabitants": 3}'


def test_a_thoughts_budget_ends_it_before_an_answer_with_a_schema(tokenizer: Tokenizer) -> None:
    reply = "\nWell, well, well." * 20
    params = SamplingParams(temperature=0, thinking_budget=9, max_new_tokens=60)
    session = ChatSession(scripted_engine(tokenizer, ChatTemplate(THINKING), [reply]), params=params)
    session.schema = {"const": {"a": 1}}
    assert text_of(list(session.send("Which?"))).replace(" ", "") == '{"a":1}'


@pytest.mark.parametrize(
    ("schema", "why"),
    [
        ({"not": {}}, "Unimplemented keys"),
        ({"enum": ["x" * 300_000]}, "more than 250000"),
        (type("Odd", (BaseModel,), {"__annotations__": {"f": Callable[[], int]}}), "has no JSON schema"),
    ],
)
def test_a_schema_that_cannot_be_held_leaves_the_history_as_it_was(start: Start, schema: Any, why: str) -> None:
    session = start("\nHi.<|user|>")
    with pytest.raises(SchemaError, match=why):
        session.ask("Hello", schema=schema)
    assert (session.messages, session.schema) == ([], None)
    assert session.ask("Hello") == "Hi."


def test_an_answer_that_was_cut_is_no_object(start: Start) -> None:
    session = start('\n{"name": "Bonn"<|user|>', params=SamplingParams(temperature=0, max_new_tokens=4))
    with pytest.raises(SchemaError, match=r"ended \(length\) after 4 tokens"):
        session.ask("Which city?", schema=City)
    assert session.cut is not None


def test_what_a_models_own_validator_refuses_is_an_error_in_a_line(start: Start) -> None:
    class Even(BaseModel):
        value: int

        @field_validator("value")
        @classmethod
        def even(cls, value: int) -> int:
            if value % 2:
                raise ValueError("it is odd")
            return value

    with pytest.raises(SchemaError, match="it is odd"):
        start('\n{"value": 3}<|user|>').ask("A number?", schema=Even)
