"""Penalties, biases, least lengths and stop ids follow from an answer's own ids: alone, beside others, with guesses."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jsonschema
import pytest

from glm4lite.base.errors import SamplingError
from glm4lite.base.events import Done, TextDelta
from glm4lite.chat.completion import Completion
from glm4lite.engine.decoding import Generation
from glm4lite.engine.engine import Engine
from glm4lite.engine.sampling import SamplingParams
from glm4lite.engine.speculation import Speculation
from glm4lite.text.grammar import AnswerForm, ToolForm
from glm4lite_quant.kernels import native
from tests.glm4lite.served import served

pytestmark = pytest.mark.skipif(native.backend() is None, reason=f"no native library: {native.status()}")


class Eager(Speculation):
    """Guesses whatever it can."""

    def length(self, agreed: int, most: int, sequences: int = 1, rows: int = 1) -> int:
        return most


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.load("nano", quant="int4", device="cpu", parallel=5)


def asked(engine: Engine, count: int) -> Iterator[tuple[list[int], SamplingParams]]:
    """Texts that repeat themselves, under all that changes logits."""
    chance, size = random.Random(5), engine.tokenizer.size
    words = ["the cat", " sat on", " the mat", ". What is", " 37 * 24", "? It is", " 888", ", 12 km", " in miles"]
    for seed in range(count):
        part = "".join(chance.choices(words, k=chance.randint(2, 5)))
        ids = engine.tokenizer.prefix_ids + engine.tokenizer.ids(part * chance.randint(1, 4))
        yield (
            ids,
            SamplingParams(
                temperature=chance.choice((0.0, 0.8)),
                seed=seed,
                top_p=0.9,
                repetition_penalty=chance.choice((1.0, 1.2)),
                frequency_penalty=chance.choice((0.0, 0.4, -0.3)),
                presence_penalty=chance.choice((0.0, 0.7)),
                logit_bias={
                    chance.randrange(size): chance.choice((-100.0, 4.0)) for _ in range(chance.choice((0, 30)))
                },
                min_new_tokens=chance.choice((0, 20)),
                stop_token_ids=tuple(chance.sample(range(size), chance.choice((0, 8)))),
                ignore_eos=chance.random() < 0.3,
                max_new_tokens=24,
            ),
        )


Said = tuple[list[int], str, int | None]


def said(generation: Generation) -> Said:
    return list(generation), generation.finish_reason, generation.stop_id


def test_ids_alone_are_those_in_a_batch_and_those_with_guesses(engine: Engine) -> None:
    all_of_them, outcomes = list(asked(engine, 12)), list[list[Said]]()
    accepted = 0
    for how in ("alone", "alone, guessed", "together", "together, guessed"):
        engine.scheduler.speculation = Eager() if "guessed" in how else None
        made = [engine.generate(prompt, params) for prompt, params in all_of_them]
        if "together" in how:
            for one in made:
                one.begin()
        outcomes.append([said(one) for one in made])
        accepted += sum(one.drafts.accepted for one in made if one.drafts)
    assert outcomes[0] == outcomes[1] == outcomes[2] == outcomes[3]
    assert accepted > 20
    ends = {reason for _, reason, _ in outcomes[0]}
    assert ends == {"stop", "length"}


def test_each_of_them_changes_what_is_said(engine: Engine) -> None:
    engine.scheduler.speculation = None
    prompt = engine.tokenizer.prefix_ids + engine.tokenizer.ids("the cat sat on the mat. the cat sat on")
    plain = SamplingParams(temperature=0, max_new_tokens=30, ignore_eos=True)
    usual = list(engine.generate(prompt, plain))
    changes: list[dict[str, Any]] = [
        {"repetition_penalty": 1.8},
        {"frequency_penalty": 2.0},
        {"presence_penalty": 2.0},
        {"logit_bias": {usual[0]: -100.0}},
    ]
    for change in changes:
        assert list(engine.generate(prompt, replace(plain, **change))) != usual
    likely = list(engine.generate(prompt, replace(plain, logit_bias={70: 100.0})))
    assert likely == [70] * 30


def test_a_stop_id_of_ones_own_ends_the_answer_but_not_before_its_least_length(engine: Engine) -> None:
    prompt = engine.tokenizer.prefix_ids + engine.tokenizer.ids("the cat sat on")
    always = SamplingParams(temperature=0, max_new_tokens=9, logit_bias={70: 100.0, 71: 50.0}, stop_token_ids=(70,))
    first = engine.generate(prompt, always)
    assert said(first) == ([], "stop", 70)
    assert said(engine.generate(prompt, replace(always, min_new_tokens=4))) == ([71] * 4, "stop", 70)
    eos = min(engine.tokenizer.stop_ids)
    ending = replace(always, logit_bias={eos: 100.0, 71: 50.0}, stop_token_ids=())
    assert said(engine.generate(prompt, ending)) == ([], "stop", eos)
    assert said(engine.generate(prompt, replace(ending, ignore_eos=True))) == ([eos] * 9, "length", None)
    assert said(engine.generate(prompt, replace(ending, min_new_tokens=9))) == ([71] * 9, "length", None)


def test_a_stop_text_is_not_looked_for_before_the_least_length(engine: Engine) -> None:
    token = engine.tokenizer.ids("cat")[0]
    text = engine.tokenizer.text([token])
    events = list(
        Completion(engine).run(
            "The", temperature=0, logit_bias={token: 100.0}, stop=(text,), min_new_tokens=3, max_new_tokens=9
        )
    )
    assert "".join(event.text for event in events if isinstance(event, TextDelta)) == text * 3
    assert isinstance(events[-1], Done)
    assert events[-1].finish_reason == "stop"


# --- beside a schema

PLACE = {
    "type": "object",
    "properties": {"city": {"enum": ["Lisbon", "Rome", "Oslo"]}, "degrees": {"type": "integer"}},
    "required": ["city", "degrees"],
    "additionalProperties": False,
}
CALLED: dict[str, Any] = {"type": "object", "properties": {"text": {"enum": ["a", "b"]}}, "required": ["text"]}
CALLED |= {"additionalProperties": False}


def held(engine: Engine, form: AnswerForm, prompt: str = "How is the weather?", **sampling: Any) -> Generation:
    ids = engine.tokenizer.ids(prompt, special=True)
    made = engine.generate(
        ids, SamplingParams(**{"temperature": 1.5, "top_p": 1.0, "max_new_tokens": 80, "seed": 1, **sampling})
    )
    made.constraint = engine.constraint(form)
    return made


def test_what_adjusts_an_answer_does_not_lead_it_out_of_its_schema(engine: Engine) -> None:
    brace = engine.tokenizer.ids("}")[0]
    for seed in range(4):
        made = held(
            engine,
            AnswerForm(PLACE),
            seed=seed,
            repetition_penalty=1.3,
            frequency_penalty=1.0,
            presence_penalty=0.5,
            logit_bias={70: 100.0, brace: 5.0},
        )
        jsonschema.validate(json.loads(engine.tokenizer.text(list(made))), PLACE)
    biased = held(engine, AnswerForm({"enum": ["a", "b"]}), logit_bias={engine.tokenizer.ids("b")[0]: 100.0})
    assert json.loads(engine.tokenizer.text(list(biased))) == "b"


def test_a_least_length_gives_way_where_a_schema_ends(engine: Engine) -> None:
    made = held(engine, AnswerForm({"enum": [True, False]}), min_new_tokens=30)
    assert json.loads(engine.tokenizer.text(list(made))) in (True, False)
    assert made.finish_reason == "stop"
    longer = held(engine, AnswerForm({"type": "array", "items": {"type": "boolean"}}), min_new_tokens=30, temperature=0)
    assert len(list(longer)) >= 30


def test_a_stop_id_of_ones_own_ends_an_answer_where_its_grammar_lets_it_end(engine: Engine) -> None:
    end = engine.tokenizer.special["[gMASK]"]
    form = AnswerForm(tools=(ToolForm("say", CALLED, strict=True),))
    wanted = {end: 100.0}
    assert said(held(engine, form, logit_bias=wanted, stop_token_ids=(end,))) == ([], "stop", end)
    made = held(engine, replace(form, must_call=("say",)), logit_bias=wanted, stop_token_ids=(end,))
    name, _, arguments = engine.tokenizer.text(list(made)).strip().partition("\n")
    jsonschema.validate(json.loads(arguments), CALLED)
    assert (name.strip(), made.finish_reason) == ("say", "stop")


def test_stop_ids_are_not_looked_for_in_what_follows_a_schema(engine: Engine) -> None:
    comma = engine.tokenizer.ids(",")[0]
    events = Completion(engine).run(
        "Rome", schema=PLACE, stop_token_ids=(comma,), stop=("city",), max_new_tokens=80, seed=1
    )
    text = "".join(event.text for event in events if isinstance(event, TextDelta))
    jsonschema.validate(json.loads(text), PLACE)


def test_an_answer_that_follows_a_schema_has_an_end(engine: Engine) -> None:
    with pytest.raises(SamplingError, match="ignore_eos: what follows a schema has an end"):
        held(engine, AnswerForm(PLACE), ignore_eos=True)


def test_a_thought_is_ended_by_its_budget_before_what_follows_a_schema(engine: Engine) -> None:
    for budget in (0, 5):
        form = AnswerForm(PLACE, begun_thought=True)
        made = held(engine, form, "<|user|>\nRome?<|assistant|>\n<think>", thinking_budget=budget, seed=1, top_p=0.9)
        thought, closed, answer = engine.tokenizer.text(list(made)).partition("</think>")
        assert closed
        assert len(engine.tokenizer.ids(thought)) <= budget + 2
        jsonschema.validate(json.loads(answer), PLACE)


def test_several_answers_follow_a_schema_each_by_itself(engine: Engine) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "place", "schema": PLACE}}
    body = {"model": "nano", "n": 3, "seed": 1, "temperature": 1.8, "top_p": 1.0, "response_format": form}
    body |= {"messages": [{"role": "user", "content": "A place?"}], "max_tokens": 80}
    with served(engine) as server:
        answer = server.post("/v1/chat/completions", body).json()
        texts = [choice["message"]["content"] for choice in answer["choices"]]
        several = {**body, "prompt": ["A place: ", "Another: "], "best_of": 4, "n": 1}
        del several["messages"]
        texts += [choice["text"] for choice in server.post("/v1/completions", several).json()["choices"]]
    assert len(texts) == 5
    assert len(set(texts)) > 1
    for text in texts:
        jsonschema.validate(json.loads(text), PLACE)
