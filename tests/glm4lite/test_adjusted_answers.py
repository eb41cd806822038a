"""Penalties, biases, least lengths and stop ids follow from an answer's own ids: alone, beside others, with guesses."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace

import pytest

from glm4lite.base.events import Done, TextDelta
from glm4lite.chat.completion import Completion
from glm4lite.engine.decoding import Generation
from glm4lite.engine.engine import Engine
from glm4lite.engine.sampling import SamplingParams
from glm4lite.engine.speculation import Speculation
from glm4lite_quant.kernels import native

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
    for change in (
        {"repetition_penalty": 1.8},
        {"frequency_penalty": 2.0},
        {"presence_penalty": 2.0},
        {"logit_bias": {usual[0]: -100.0}},
    ):
        assert list(engine.generate(prompt, replace(plain, **change))) != usual  # type: ignore[arg-type]
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
