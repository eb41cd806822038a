"""A small model guesses what a large one says: that changes how many steps are made, and no answer."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from glm4lite.base.errors import CheckpointError, ConfigError
from glm4lite.engine.decoding import Generation
from glm4lite.engine.draft_model import DraftModel
from glm4lite.engine.engine import Engine
from glm4lite.engine.prefix_pool import PrefixPool
from glm4lite.engine.sampling import SamplingParams
from glm4lite.engine.scheduler import Scheduler
from glm4lite.engine.speculation import Costs, Speculation
from glm4lite.model.step import Span
from glm4lite_quant.kernels import native
from tests.glm4lite.checkpoints import write_checkpoint

PARAMS = SamplingParams(temperature=0, max_new_tokens=30)

pytestmark = pytest.mark.skipif(native.backend() is None, reason=f"no native library: {native.status()}")


class Flat(Costs):
    """Rows cost nothing, so that as much is guessed as may be."""

    def of(self, rows: int) -> float:
        return 1.0


class Free(DraftModel):
    """Its steps cost nothing either."""

    def _cost(self, costs: Costs) -> float:
        return 0.0


class NoLookup(Speculation):
    """Only the small model guesses."""

    def __init__(self) -> None:
        super().__init__()
        self.costs = Flat()

    def length(self, agreed: int, most: int, sequences: int = 1, rows: int = 1) -> int:
        return 0


@pytest.fixture(scope="module")
def large() -> Engine:
    return Engine.load("nano", quant="int8", device="cpu")


@pytest.fixture(scope="module")
def small() -> Engine:
    return Engine.load("nano", quant="int4", device="cpu")


def prompts(engine: Engine, count: int) -> Iterator[tuple[list[int], SamplingParams]]:
    chance = random.Random(5)
    questions = ["What is 37 * 24?", "How many miles are 12 km?", "Hello", "What time is it?", "one two three"]
    for seed in range(count):
        text = chance.choice(questions) + " " + chance.choice(questions)
        yield engine.tokenizer.ids(text), replace(PARAMS, temperature=chance.choice((0.0, 0.7)), seed=seed)


def answers(large: Engine, asked: list[tuple[list[int], SamplingParams]], scheduler: Scheduler) -> list[Generation]:
    made = [
        Generation(
            large.model,
            prompt,
            params,
            large.tokenizer.stop_ids,
            large.tokenizer.size,
            scheduler=scheduler,
            speculation=scheduler.speculation,
        )
        for prompt, params in asked
    ]
    for one in made:
        one.top_logprobs = 1
        one.begin()
    for one in made:
        list(one)
    return made


@pytest.mark.parametrize("parallel", [1, 3])
def test_answers_are_what_they_are_without(
    large: Engine, small: Engine, parallel: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, steps, step = list(prompts(large, 16)), list[int](), large.model.step

    def counted(spans: Sequence[Span]) -> list[torch.Tensor]:
        steps.append(len(spans))
        return step(spans)

    monkeypatch.setattr(large.model, "step", counted)
    plain = answers(large, asked, Scheduler(large.model, PrefixPool(large.model), parallel))
    without = len(steps)
    draft = Free(small.model)
    scheduler = Scheduler(large.model, PrefixPool(large.model), parallel, NoLookup(), draft)
    guessed = answers(large, asked, scheduler)
    for one, like in zip(guessed, plain, strict=True):
        assert (one.ids, one.logprobs, one.finish_reason) == (like.ids, like.logprobs, like.finish_reason)
    assert sum(one.drafts.accepted for one in guessed if one.drafts) > 100
    assert len(steps) - without < 0.6 * without
    assert not draft._written
    assert draft.prefixes.nbytes <= draft.prefixes.memory


def test_what_it_guessed_rightly_is_not_computed_again_and_it_learns_that_it_was_right(
    small: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, rows, step = Engine.load("nano", quant="int4", device="cpu").model, list[int](), small.model.step

    def counted(spans: Sequence[Span]) -> list[torch.Tensor]:
        rows.append(sum(len(span.ids) for span in spans))
        return step(spans)

    draft = Free(model)
    monkeypatch.setattr(model, "step", counted)  # one and the same model guesses, so that all its guesses are right
    monkeypatch.setattr(type(model), "chunk", 16)
    prompt = small.tokenizer.ids("What is 37 * 24? How many miles are 12 km? What time is it? " * 3)
    scheduler = Scheduler(small.model, PrefixPool(small.model), 1, NoLookup(), draft)
    params, size = replace(PARAMS, max_new_tokens=60), small.tokenizer.size
    made = Generation(small.model, prompt, params, (), size, scheduler=scheduler, speculation=scheduler.speculation)
    assert len(list(made)) == 60
    assert made.drafts is not None
    assert made.drafts.accepted > 40
    assert sum(rows) <= len(prompt) + len(made.ids)
    assert len(rows) <= len(prompt) // 16 + 1 + len(made.ids)
    assert all(draft.odds.of(sure) >= Free(model).odds.of(sure) for sure in range(12))
    assert any(draft.odds.of(sure) > Free(model).odds.of(sure) for sure in range(12))


def test_how_far_it_guesses_follows_from_costs_and_from_how_often_it_was_right(large: Engine, small: Engine) -> None:
    asked = [(large.tokenizer.ids("What is 37 * 24?"), PARAMS)] * 6
    speculation, draft = NoLookup(), Free(small.model)

    def drafted() -> int:
        made = answers(large, asked, Scheduler(large.model, PrefixPool(large.model), 1, speculation, draft))
        return sum(one.drafts.drafted for one in made if one.drafts)

    assert drafted() > 40
    for sure in range(12):
        for _ in range(60):
            draft.odds.add(sure, False)
    speculation.costs = Tenth()
    assert drafted() < 20  # it was mostly wrong, it is believed
    speculation.costs = Dear()
    assert drafted() == 0


class Tenth(Costs):
    """A row costs a tenth of the first."""

    def of(self, rows: int) -> float:
        return 0.9 + 0.1 * rows


class Dear(Costs):
    """A row costs as much as the first."""

    def of(self, rows: int) -> float:
        return float(rows)


def test_a_small_model_that_fails_is_left_out_and_said(
    large: Engine, small: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked = list(prompts(large, 3))
    wanted = [one.ids for one in answers(large, asked, Scheduler(large.model))]

    def gives_out(_: object) -> None:
        raise MemoryError("no more")

    monkeypatch.setattr(small.model, "step", gives_out)
    scheduler = Scheduler(large.model, PrefixPool(large.model), 2, NoLookup(), DraftModel(small.model))
    assert [one.ids for one in answers(large, asked, scheduler)] == wanted
    assert "the draft model failed (no more): answers go on without it" in caplog.text


def test_an_answer_longer_than_the_small_models_context_goes_on_without_it(
    large: Engine, small: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = [(large.tokenizer.ids("one two three four five " * 4), PARAMS)]
    wanted = [one.ids for one in answers(large, asked, Scheduler(large.model))]
    monkeypatch.setattr(small.model.model, "context", len(asked[0][0]) + 12)
    scheduler = Scheduler(large.model, PrefixPool(large.model), 1, NoLookup(), DraftModel(small.model))
    assert [one.ids for one in answers(large, asked, scheduler)] == wanted


def test_an_engine_loads_both_and_refuses_one_of_another_vocabulary(tmp_path: Path) -> None:
    engine = Engine.load("nano", quant="int8", device="cpu", draft="nano")
    assert engine.scheduler.draft is not None
    found = list(engine.generate_many(["What is 37 * 24?"], temperature=0, max_new_tokens=20))
    wanted = list(
        Engine.load("nano", quant="int8", device="cpu").generate_many(
            ["What is 37 * 24?"], temperature=0, max_new_tokens=20
        )
    )
    assert found == wanted
    write_checkpoint(tmp_path)
    with pytest.raises(ConfigError, match="another vocabulary"):
        Engine.load("nano", device="cpu", draft=tmp_path)
    Engine.load("nano", quant="int8", device="cpu", ram="646MiB")
    with pytest.raises(CheckpointError, match="do not suffice"):
        Engine.load("nano", quant="int8", device="cpu", draft="nano", ram="646MiB")
