"""Answers that follow a schema: whatever a model would rather say, alone and beside others, guessed and not."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import date
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch

import glm4lite
from glm4lite.base.errors import SchemaError
from glm4lite.engine.constraint import Constraint, Grammars
from glm4lite.engine.decoding import Generation
from glm4lite.engine.engine import Engine
from glm4lite.engine.prefix_pool import PrefixPool
from glm4lite.engine.sampling import SamplingParams
from glm4lite.engine.scheduler import Scheduler
from glm4lite.engine.speculation import Speculation
from glm4lite.model.step import Span
from glm4lite.text.grammar import AnswerForm, Schema, ToolForm, checked_schema
from glm4lite.text.output_parser import Call, CallBegun, OutputParser
from glm4lite.text.tokenizer import Tokenizer
from glm4lite_quant.kernels import native
from tests.glm4lite.schemas import BY_HAND, CITY, TREE, closed, schemas

TOKENIZER = Tokenizer.from_folder(Path(glm4lite.__file__).parent / "nano")
SEPARATOR = TOKENIZER.special["<|assistant|>"]
GRAMMARS = Grammars(TOKENIZER, TOKENIZER.stop_ids, SEPARATOR)
WEATHER = ToolForm("get_weather", closed({"city": {"type": "string"}, "days": {"type": "integer"}}, "city"))
TOOLS = (WEATHER, ToolForm("add.2", {"type": "object", "properties": {}}))
TOKENS = [TOKENIZER.token_bytes(one) for one in range(TOKENIZER.size)]
CHECK = jsonschema.FormatChecker(("ipv4", "ipv6", "email", "uuid"))


@CHECK.checks("date", ValueError)  # type: ignore[untyped-decorator]
def is_date(text: object) -> bool:
    """Of RFC 3339, which has a year 0 where Python has none."""
    return not isinstance(text, str) or bool(date.fromisoformat(text.replace("0000-", "2000-", 1)))


needs_native = pytest.mark.skipif(native.backend() is None, reason=f"no native library: {native.status()}")


def said(constraint: Constraint, text: str) -> str:
    """As much of a text as may come."""
    ids = TOKENIZER.ids(text, special=True)
    return TOKENIZER.text(ids[: constraint.fitting(ids)], keep_special=True)


def check(schema: Schema, text: str) -> Any:
    """The value of a document, which follows the schema: jsonschema is the judge."""
    value = json.loads(text)
    jsonschema.Draft202012Validator(schema, format_checker=CHECK).validate(value)
    return value


def by_chance(constraint: Constraint, seed: int, most: int = 400) -> tuple[str, bool]:
    """What a model of random logits says, which likes to end and to close, and whether it came to an end."""
    generator = torch.Generator().manual_seed(seed)
    closing = torch.tensor(
        [any(mark in TOKENIZER.token_bytes(one) for mark in b'"}],0') for one in range(TOKENIZER.size)]
    )
    ids, stops = list[int](), sorted(TOKENIZER.stop_ids)
    while not constraint.complete and len(ids) < most:
        forced = constraint.forced()
        if not forced:
            logits = torch.randn(TOKENIZER.size, generator=generator) + 2.0 * closing
            logits[stops] += 3
            forced = [int(constraint.masked(logits).argmax())]
            if forced[0] in TOKENIZER.stop_ids:
                return TOKENIZER.text(ids, keep_special=True), True
        constraint.accept(forced)
        ids += forced
    return TOKENIZER.text(ids, keep_special=True), constraint.complete


# What may be said


@pytest.mark.parametrize(
    ("text", "end"),
    [
        ("hello there\nfine\n\n", ""),
        ('get_weather\n{"city": "北京"}<|assistant|>\nok', ""),
        ('\nget_weather \n{"city"', ""),
        ('get_weather\n{"city": "x"}<|observation|>', ""),
        ('I look.\nget_weather\n{"city": "a"}', ""),
        ("I look.\nget_weather\nis one", ""),
        ("I look.\nget_weather\n\nis one {", ""),
        ('nosuch\n{"a": 1}', ""),
        ("add.2\n{}\nadd.2\n{}<|assistant|>add.2\n{}<|observation|>", ""),
        ('```\nget_weather\n{"town": 1}\n```\n', ""),
        ("\n\nget_weather is\nfun get_weather\nget_weatherx\nadds\nadd-2\n{x", ""),
        ('get_weather\n{"town": "x"}', '"town": "x"}'),
        ("get_weather\nis one", "is one"),
        ('get_weather\n{"city": "x"} and', " and"),
        ('I look.\nget_weather\n{"town', "town"),
        ('add.2\n{"x"', '{"x"'),
        ('get_weather\n{"city": "\\u00e9', "u00e9"),
        ("<|system|>", "<|system|>"),
    ],
)
def test_a_declared_name_on_a_line_opens_its_schema_and_other_lines_are_text(text: str, end: str) -> None:
    taken = said(GRAMMARS.constraint(AnswerForm(tools=TOOLS)), text)
    assert text.startswith(taken)
    assert text.endswith(end)
    if not end:
        assert taken == text
    else:
        assert text.removesuffix(end).startswith(taken.rstrip('{"'))
        assert len(taken) < len(text)


def test_only_one_call_comes_where_several_are_not_wanted() -> None:
    constraint = GRAMMARS.constraint(AnswerForm(tools=TOOLS, parallel=False))
    text = 'get_weather\n{"city": "x"}'
    assert said(constraint, text + "<|assistant|>") == text
    assert said(constraint, "I look.<|assistant|>" + text) == "I look.<|assistant|>" + text
    constraint.accept(TOKENIZER.ids(text))
    assert constraint.complete


def test_calls_that_must_come_are_all_that_comes() -> None:
    constraint = GRAMMARS.constraint(AnswerForm(tools=TOOLS, must_call=("add.2",)))
    assert said(constraint, "add.2\n{}<|assistant|>add.2\n{}") == "add.2\n{}<|assistant|>add.2\n{}"
    assert said(constraint, "Hello") == said(constraint, "get_weather\n") == ""


def test_an_answer_with_a_schema_may_call_first() -> None:
    form = AnswerForm({"type": "array", "items": {"type": "integer"}}, TOOLS)
    for text in ("[1, 2]", "\n[1]", "add.2\n{}<|assistant|>add.2\n{}", "\nadd.2\n{}"):
        assert said(GRAMMARS.constraint(form), text) == text
    assert said(GRAMMARS.constraint(form), "{") == said(GRAMMARS.constraint(form), "So") == ""


def test_a_thought_may_come_before_what_follows_a_schema() -> None:
    thought = 'I think\nget_weather\n{"x"</think>\n\n'
    begun = GRAMMARS.constraint(AnswerForm(tools=TOOLS, must_call=("add.2",), begun_thought=True))
    assert said(begun, thought + "add.2\n{}") == thought + "add.2\n{}"
    assert said(begun, thought + "So") == thought
    free = GRAMMARS.constraint(AnswerForm(CITY, may_think=True))
    for text in ("\n<think>" + thought + '{"name"', '{"name"', '\n{"name"'):
        assert said(free, text) == text
    assert said(free, "\n\n") == said(free, " ") == ""
    assert said(free, "I think") == ""


def test_what_can_be_no_other_is_known_without_a_draw() -> None:
    constraint = GRAMMARS.constraint(AnswerForm(tools=(WEATHER,), must_call=("get_weather",)))
    constraint.accept(TOKENIZER.ids("get_weather\n"))
    assert TOKENIZER.text(constraint.forced()).startswith('{"city')


# What is refused


@pytest.mark.parametrize(
    ("schema", "why"),
    [
        ({"not": {"type": "string"}}, 'Unimplemented keys: ["not"]'),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"if": {}, "then": {}}, "Unimplemented keys"),
        ({"type": "string", "format": "phone"}, "Unknown format: phone"),
        ({"type": "string", "pattern": "^(?!a)b"}, "look-around"),
        ({"type": "string", "pattern": "("}, "unclosed group"),
        ({"$ref": "https://example.com/s"}, "https://example.com/s"),
        ({"$ref": "#/$defs/none"}, "does not exist"),
        ({"type": "strin"}, "Invalid type: strin"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "Unsatisfiable"),
        ({"enum": []}, "Unsatisfiable"),
        ({"$ref": "#"}, "cannot be held"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}, {"$ref": "#"}]}}}, "cannot be held"),
        (False, "Unsatisfiable"),
        ({"type": "object", "properties": 3}, "properties must be an object"),
        ({"oneOf": [{"type": "object"}, {"type": "object", "properties": {"a": {}}}]}, "oneOf"),
    ],
)
def test_a_schema_that_cannot_be_held_is_refused_in_a_line(schema: Schema, why: str) -> None:
    strict = ToolForm("f", schema, strict=True)
    for form in (AnswerForm(schema), AnswerForm(schema, begun_thought=True), AnswerForm(tools=(*TOOLS, strict))):
        with pytest.raises(SchemaError) as refused:
            GRAMMARS.constraint(form)
        assert why in str(refused.value)
        assert "\n" not in str(refused.value)
        assert "start:" not in str(refused.value)


def test_a_tool_that_is_not_strict_is_held_as_far_as_it_can_be() -> None:
    odd = {"type": "object", "properties": {"a": {"type": "string", "format": "phone"}}, "required": ["a"], "not": {}}
    held = GRAMMARS.constraint(AnswerForm(tools=(ToolForm("odd", odd),), must_call=("odd",)))
    assert held.loosened == ()
    assert said(held, 'odd\n{"b') == 'odd\n{"'
    with pytest.raises(SchemaError, match=r"tool 'odd' cannot be held: Unimplemented keys: \[\"not\"\]"):
        GRAMMARS.constraint(AnswerForm(tools=(*TOOLS, ToolForm("odd", odd, strict=True))))
    wrong = {"type": "object", "properties": {"a": {"type": "string", "pattern": "^(?!a)b"}}}
    loosened = GRAMMARS.constraint(AnswerForm(tools=(ToolForm("odd", wrong), WEATHER)))
    assert loosened.loosened == ("odd",)
    assert said(loosened, 'odd\n{"b": [1]}') == 'odd\n{"b": [1]}'
    assert said(loosened, 'get_weather\n{"b": [1]}') == 'get_weather\n{"'


def test_arguments_that_nothing_is_said_of_are_not_invented_and_those_that_may_come_do() -> None:
    def may(schema: dict[str, Any]) -> bool:
        form = AnswerForm(tools=(ToolForm("f", schema),), must_call=("f",))
        return said(GRAMMARS.constraint(form), 'f\n{"zz": 1}') == 'f\n{"zz": 1}'

    assert not may({"type": "object", "properties": {"a": {}}})
    assert not may({})
    assert may({"type": "object", "additionalProperties": True})
    assert may({"allOf": [{"properties": {"zz": {"type": "integer"}}}]})
    strict = ToolForm("f", {"type": "object", "properties": {"a": {}}}, strict=True)
    assert said(GRAMMARS.constraint(AnswerForm(tools=(strict,), must_call=("f",))), 'f\n{"zz"') == 'f\n{"zz"'


@pytest.mark.parametrize(
    "schema",
    [
        closed({f"property_{number}": {"type": "string"} for number in range(10_000)}, "property_0"),
        {"enum": [f"a word of many, number {number}" for number in range(8_000)]},
        {"type": "string", "pattern": "^(a?){900}(a|b|ab){900}$"},
        {"type": "array", "items": {"type": "string", "minLength": 9_000}, "minItems": 5_000},
        {"allOf": [{"anyOf": [{"properties": {f"a{i}": {"const": j}}} for j in range(8)]} for i in range(12)]},
        {"$ref": "#/$defs/a", "$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}, {"$ref": "#"}]}}},
        {"$defs": {f"d{i}": {"anyOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 9} for i in range(60)} | {"d60": {}}}
        | {"$ref": "#/$defs/d0"},
    ],
    ids=["properties", "enum", "pattern", "lengths", "products", "circle", "bomb"],
)
def test_what_a_schema_costs_is_bounded_before_anything_is_computed(schema: Schema) -> None:
    began = time.thread_time()
    with suppress(SchemaError):
        constraint = GRAMMARS.constraint(AnswerForm(checked_schema(schema)))
        constraint.masked(torch.zeros(TOKENIZER.size))
    assert time.thread_time() - began < 5


def test_a_schema_is_json_of_bounded_size() -> None:
    deep: Any = {}
    for _ in range(200):
        deep = {"items": deep}
    wrong: list[Any] = [deep, {"enum": ["x" * 300_000]}, {"const": math.nan}, {"const": object()}, [], "object", None]
    for schema in wrong:
        with pytest.raises(SchemaError):
            checked_schema(schema)
    circle: dict[str, Any] = {}
    circle["items"] = circle
    with pytest.raises(SchemaError):
        checked_schema(circle)


# The judge


@pytest.mark.parametrize("count", [30, pytest.param(600, marks=pytest.mark.slow)])
def test_whatever_is_drawn_follows_the_schema(count: int) -> None:
    whole = 0
    for number, schema in enumerate(list(schemas(600))[:: 600 // count]):
        text, ended = by_chance(GRAMMARS.constraint(AnswerForm(schema)), number)
        if ended:
            check(schema, text)
            whole += 1
    assert whole > 0.8 * count


@pytest.mark.parametrize("seed", range(25))
def test_whatever_is_drawn_is_text_or_calls_that_follow_their_schemas(seed: int) -> None:
    names = {tool.name: tool.schema for tool in TOOLS}
    must = () if seed % 2 else tuple(names)
    text, ended = by_chance(GRAMMARS.constraint(AnswerForm(tools=TOOLS, must_call=must)), seed, most=150)
    parser = OutputParser(names, certain=True)
    segments = []
    for part in text.split("<|assistant|>"):
        segments += [*parser.feed(part), *parser.separator()]
    begun, calls = ([one for one in segments if isinstance(one, kind)] for kind in (CallBegun, Call))
    assert [one.name for one in begun][: len(calls)] == [one.name for one in calls if isinstance(one, Call)]
    assert len(begun) - len(calls) <= (0 if ended else 1)
    for call in calls:
        assert isinstance(call, Call)
        check(names[call.name], call.arguments)
    assert not must or calls or not ended


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.load("nano", quant="int4", device="cpu")


def answers(engine: Engine, asked: Sequence[Schema], most: int) -> list[tuple[str, str]]:
    """nano's answers to a question, several at once, and how each ended."""
    question = engine.tokenizer.ids("What is 37 * 24?<|assistant|>", special=True)
    prompt = [*engine.tokenizer.prefix_ids, engine.tokenizer.special["<|user|>"], *question]
    answered, lock = dict[int, tuple[str, str]](), threading.Lock()

    def work(first: int) -> None:
        for number in range(first, len(asked), 4):
            params = SamplingParams(temperature=0.8, seed=number, max_new_tokens=most)
            generation = engine.generate(prompt, params)
            generation.constraint = engine.constraint(AnswerForm(asked[number]))
            text = "".join(piece or "" for piece in engine.pieces(generation))
            with lock:
                answered[number] = text, generation.finish_reason

    threads = [threading.Thread(target=work, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [answered[number] for number in range(len(asked))]


@needs_native
@pytest.mark.parametrize("count", [30, pytest.param(400, marks=pytest.mark.slow)])
def test_every_answer_of_nano_that_was_not_cut_follows_its_schema(engine: Engine, count: int) -> None:
    asked = list(schemas(400))[:: 400 // count][:count]
    whole = 0
    for schema, (text, reason) in zip(asked, answers(engine, asked, most=160), strict=True):
        assert reason in ("stop", "length")
        if reason == "stop":
            check(schema, text)
            whole += 1
    assert whole > 0.7 * count


# The engine


class Eager(Speculation):
    """Guesses whatever it can."""

    def length(self, agreed: int, most: int, sequences: int = 1, rows: int = 1) -> int:
        return most


def constrained(
    engine: Engine, number: int, scheduler: Scheduler | None = None, speculation: Speculation | None = None
) -> Generation:
    prompt = engine.tokenizer.prefix_ids + engine.tokenizer.ids('{"name": "Bonn", "inhabitants": 3}' * (1 + number % 3))
    form = (
        AnswerForm(CITY),
        AnswerForm(TREE),
        AnswerForm(tools=TOOLS, must_call=("get_weather",)),
        AnswerForm(tools=TOOLS),
        AnswerForm({"type": "array", "items": CITY, "maxItems": 4}),
    )[number % 5]
    params = SamplingParams(temperature=(0.0, 0.9)[number % 2], seed=number, max_new_tokens=12 + 7 * (number % 6))
    made = Generation(
        engine.model,
        prompt,
        params,
        engine.tokenizer.stop_ids,
        engine.tokenizer.size,
        speculation=speculation,
        scheduler=scheduler,
    )
    made.constraint, made.top_logprobs = engine.constraint(form), 2
    return made


@needs_native
def test_a_constrained_answer_has_its_bits_alone_beside_others_and_with_guesses(engine: Engine) -> None:
    alone = [constrained(engine, number) for number in range(20)]
    for one in alone:
        list(one)
    accepted = 0
    for speculation in (None, Eager()):
        scheduler = Scheduler(engine.model, PrefixPool(engine.model), parallel=4, speculation=speculation)
        together = [constrained(engine, number, scheduler, speculation) for number in range(20)]
        for one in together:
            one.begin()
        for one, like in zip(together, alone, strict=True):
            assert list(one) == like.ids
            assert one.logprobs == like.logprobs
            assert (one.finish_reason, one.stop_id) == (like.finish_reason, like.stop_id)
            accepted += one.drafts.accepted if one.drafts else 0
    assert accepted > 20


@needs_native
def test_an_answer_that_gave_its_memory_away_goes_on_as_its_schema_wants(engine: Engine) -> None:
    wanted = [constrained(engine, number) for number in range(4)]
    for one in wanted:
        list(one)
    scheduler = Scheduler(engine.model, PrefixPool(engine.model), parallel=4)
    made = [constrained(engine, number, scheduler) for number in range(4)]
    for one in made:
        one.begin()
    next(iter(made[0]))
    for sequence in list(scheduler.running[1:]):  # as where memory is short
        scheduler.running.remove(sequence)
        scheduler.prefixes.drop(sequence.held())  # type: ignore[union-attr]
        sequence.give_up()
        scheduler.waiting.append(sequence)
    for one, like in zip(made[1:], wanted[1:], strict=True):
        assert list(one) == like.ids


@needs_native
def test_what_is_certain_takes_no_step_of_its_own(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    steps, step = list[int](), engine.model.step

    def counted(spans: Sequence[Span]) -> list[torch.Tensor]:
        steps.append(sum(len(span.ids) for span in spans))
        return step(spans)

    monkeypatch.setattr(engine.model, "step", counted)
    schema = closed({f"the_name_of_property_{number}": {"type": "boolean"} for number in range(6)})
    made = constrained(engine, 0)
    made.constraint = engine.constraint(AnswerForm(schema))
    made._sequence.limit = 10_000
    ids = list(made)
    check(schema, engine.tokenizer.text(ids))
    assert len(steps) < 0.6 * len(ids)


@needs_native
def test_log_probabilities_are_those_of_what_may_come(engine: Engine) -> None:
    made = constrained(engine, 0)
    made.constraint = engine.constraint(AnswerForm({"type": "boolean"}))
    made.top_logprobs = 20
    list(made)
    first = made.logprobs[0]
    assert 2 <= len(first.top) < 20  # the ways to begin true and false
    assert all(value > -math.inf for _, value in first.top)
    assert sum(math.exp(value) for _, value in first.top) == pytest.approx(1, abs=1e-4)
    assert all(one.logprob <= 0 for one in made.logprobs)
    assert len(made.logprobs) == len(made.ids)


@needs_native
@pytest.mark.parametrize("most", range(1, 12))
def test_the_limit_is_kept_where_much_is_certain(engine: Engine, most: int) -> None:
    made = constrained(engine, 2)
    made._sequence.limit = len(made.prompt) + most
    assert len(list(made)) == most
    assert made.finish_reason == "length"


@needs_native
def test_an_answer_that_cannot_go_on_fails_alone(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = Scheduler(engine.model, PrefixPool(engine.model), parallel=2)
    broken, other = constrained(engine, 1, scheduler), constrained(engine, 0, scheduler)
    like = list(constrained(engine, 0))
    assert broken.constraint is not None

    def fail(*_: object) -> torch.Tensor:
        raise SchemaError("too complex")

    monkeypatch.setattr(broken.constraint, "masked", fail)
    broken.begin()
    assert list(other) == like
    with pytest.raises(SchemaError, match="too complex"):
        list(broken)


def test_ids_that_may_not_come_are_an_error_and_not_taken_in_silence() -> None:
    constraint = GRAMMARS.constraint(AnswerForm(CITY))
    with pytest.raises(SchemaError):
        constraint.accept(TOKENIZER.ids("Hello"))


def test_schemas_by_hand_are_compiled_each() -> None:
    for schema in BY_HAND:
        GRAMMARS.constraint(AnswerForm(schema))


def test_a_vocabulary_without_an_end_is_held_too() -> None:
    constraint = Grammars(TOKENIZER, (), None).constraint(AnswerForm({"const": [1]}))
    text, ended = by_chance(constraint, 0)
    assert (text, ended) == ("[1]", True)
