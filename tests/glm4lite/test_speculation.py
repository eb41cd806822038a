"""Guessed ids change how long an answer takes, never the answer."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
import torch

from glm4lite.base.errors import ConfigError
from glm4lite.engine.decoding import Generation
from glm4lite.engine.engine import Engine
from glm4lite.engine.sampling import SamplingParams
from glm4lite.engine.speculation import MOST, Costs, Drafts, Lookup, Odds, Speculation
from glm4lite.model.step import Span
from glm4lite_quant.kernels import native

GREEDY = SamplingParams(temperature=0, max_new_tokens=40)

pytestmark = pytest.mark.skipif(native.backend() is None, reason=f"no native library: {native.status()}")


@pytest.fixture(scope="module", params=["int8", pytest.param("float", marks=pytest.mark.slow)])
def engine(request: pytest.FixtureRequest) -> Engine:
    return Engine.load("nano", quant="int4", device="cpu", kv=request.param)


class Eager(Speculation):
    """Guesses whatever it can, as far as it can: how often that is right does not matter to what comes out."""

    def length(self, agreed: int, most: int, sequences: int = 1, rows: int = 1) -> int:
        return most


class Random(Speculation):
    """Guesses at random, now and then rightly."""

    def __init__(self, answer: list[int], prompt: int, seed: int) -> None:
        super().__init__()
        self.answer, self.prompt, self.random = answer, prompt, random.Random(seed)

    def find(self, last: Sequence[int], count: int) -> tuple[list[int], int]:
        return [self.random.randrange(20, 400) for _ in range(count)], 24

    def length(self, agreed: int, most: int, sequences: int = 1, rows: int = 1) -> int:
        return self.random.randint(0, most)


def generation(
    engine: Engine, prompt: list[int], params: SamplingParams, speculation: Speculation | None
) -> Generation:
    stops, size = engine.tokenizer.stop_ids, engine.tokenizer.size
    made = Generation(engine.model, prompt, params, stops, size, speculation=speculation)
    made.top_logprobs = 2
    return made


def rows_of_steps(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the ids of each step that is made from now on."""
    rows, step = list[int](), engine.model.step

    def counted(spans: Sequence[Span]) -> list[torch.Tensor]:
        rows.append(sum(len(span.ids) for span in spans))
        return step(spans)

    monkeypatch.setattr(engine.model, "step", counted)
    return rows


def prompts(engine: Engine, count: int) -> Iterator[tuple[list[int], SamplingParams]]:
    """Texts that repeat themselves, greedy and sampled."""
    chance = random.Random(7)
    words = ["the cat", " sat on", " the mat", ". What is", " 37 * 24", "? It is", " 888", ", 12 km", " in miles"]
    for seed in range(count):
        part = "".join(chance.choices(words, k=chance.randint(2, 6)))
        text = part * chance.randint(1, 5) + "".join(chance.choices(words, k=3))
        sampled = replace(GREEDY, temperature=chance.choice((0.0, 0.6, 1.2)), seed=seed, repetition_penalty=1.05)
        yield engine.tokenizer.prefix_ids + engine.tokenizer.ids(text), sampled


def test_an_answer_has_the_ids_and_the_bits_it_has_without_guesses(engine: Engine) -> None:
    accepted = 0
    for prompt, params in prompts(engine, 30):
        plain = generation(engine, prompt, params, None)
        wanted = list(plain)
        for speculation in (Eager(), Random(wanted, len(prompt), len(prompt))):
            guessed = generation(engine, prompt, params, speculation)
            assert list(guessed) == wanted
            assert guessed.logprobs == plain.logprobs
            assert guessed.finish_reason == plain.finish_reason
            assert guessed.cache.ids == plain.cache.ids
            assert guessed.drafts is not None
            accepted += guessed.drafts.accepted
    assert accepted > 100


def test_what_is_kept_for_the_next_prompt_holds_no_guess(engine: Engine) -> None:
    speculation = Eager()
    for prompt, params in prompts(engine, 8):
        first = generation(engine, prompt, replace(params, max_new_tokens=9), speculation)
        longer = [*prompt, *first, 30, 31]
        second = generation(engine, longer, params, speculation)
        second.cache = first.cache
        assert list(second) == list(generation(engine, longer, params, None))
        assert second.prefilled_tokens <= 3


class Known(Costs):
    """Another row costs a tenth of the first, whatever is measured."""

    def of(self, rows: int) -> float:
        return 0.9 + 0.1 * rows


def test_fewer_steps_are_made_where_an_answer_repeats_what_was_said(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = rows_of_steps(engine, monkeypatch)
    speculation = Speculation()
    speculation.costs = Known()
    prompt = engine.tokenizer.prefix_ids + engine.tokenizer.ids("one two three four five six seven " * 12)
    answered = list(generation(engine, prompt, replace(GREEDY, max_new_tokens=60), speculation))
    assert len(answered) > 30
    assert len(rows) < 0.6 * len(answered)


def test_what_steps_cost_is_learnt_from_steps(engine: Engine) -> None:
    speculation = Eager()
    prompt = engine.tokenizer.ids("one two three four five six seven " * 12)
    list(generation(engine, prompt, GREEDY, speculation))
    assert speculation.costs.seconds(MOST + 1)


def test_ids_that_are_put_in_and_guesses_make_no_more_rows_than_a_step_has(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = engine.tokenizer.ids("one two three four five six seven " * 12)
    answers, rows = [], rows_of_steps(engine, monkeypatch)
    for speculation in (None, Eager()):
        answered, drawn = generation(engine, prompt, GREEDY, speculation), iter(range(100))
        answered.replacement = lambda _, drawn=drawn: prompt[:5] if next(drawn) % 4 == 3 else []
        answers.append(list(answered))
    assert answers[0] == answers[1]
    assert max(count for count in rows if count < len(prompt) - 1) <= MOST + 1


def test_a_limit_and_the_end_of_the_context_are_kept(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = engine.tokenizer.ids("again and again and again and again and again and")
    for count in range(1, 12):
        answered = generation(engine, prompt, replace(GREEDY, max_new_tokens=count), Eager())
        assert len(list(answered)) <= count
    monkeypatch.setattr(engine.model.model, "context", len(prompt) + 5)
    assert len(list(generation(engine, prompt, GREEDY, Eager()))) <= 5


def test_a_cancelled_answer_stops_among_its_guesses(engine: Engine) -> None:
    cancel = threading.Event()
    prompt = engine.tokenizer.ids("one two three four five six seven " * 12)
    answered = Generation(engine.model, prompt, GREEDY, cancel=cancel, speculation=Eager())
    for count, _ in enumerate(answered):
        if count == 5:
            cancel.set()
    assert (answered.finish_reason, len(answered.ids)) == ("cancelled", 6)
    answered.cache.keep_common_prefix(prompt)
    assert list(Generation(engine.model, prompt, GREEDY, cache=answered.cache)) == list(
        Generation(engine.model, prompt, GREEDY)
    )


def test_the_longest_run_that_agrees_is_found_and_of_equal_ones_the_last() -> None:
    lookup = Lookup([1, 2, 3, 4, 50, 9, 2, 3, 4, 60, 0, 1, 2, 3, 4])
    assert lookup.find(lookup.ids[-6:], 2) == ([50, 9], 4)
    assert lookup.find([7, 2, 3, 4], 3) == ([60, 0, 1], 3)
    assert lookup.find([3, 4], 3) == ([60, 0, 1], 2)
    assert lookup.find([9, 4], 3) == lookup.find([4], 3) == ([], 0)
    assert Lookup([5] * 40).find([5] * 24, 7) == ([5], 24)


def test_a_guess_is_as_long_as_pays_and_none_is_made_that_does_not() -> None:
    speculation = Speculation()
    for _ in range(40):
        for rows, seconds in ((1, 1.0), (4, 1.2), (8, 2.0)):
            speculation.costs.add(rows, seconds)
        speculation.odds.add(24, True)
        speculation.odds.add(3, False)
    assert speculation.length(24, 7) == 7
    assert speculation.length(3, 7) == 0
    dear = Speculation()
    for _ in range(40):
        for rows in range(1, 9):
            dear.costs.add(rows, float(rows))
        dear.odds.add(24, True)
    assert dear.length(24, 7) == 0  # every row costs what a step costs


def test_one_slow_step_does_not_decide() -> None:
    costs = Costs()
    for turn in range(30):
        costs.add(1, 1.0)
        costs.add(4, 1.2 if turn != 20 else 60.0)
    assert costs.of(4) < 1.5
    assert 1 < costs.of(2) < costs.of(3) < costs.of(4) < costs.of(6)


def test_odds_are_learnt_without_a_guess_being_computed() -> None:
    speculation = Speculation(most=3)
    drafts = Drafts(speculation, [1, 2, 3, 9, 1, 2, 3, 8, 1, 2, 3])
    before = speculation.odds.of(3)
    assert drafts.next(0) == []  # no room: nothing is computed
    drafts.take(7)  # neither 9 nor 8 follows
    assert speculation.odds.of(3) < before
    assert Odds().of(3) == 0.5


def test_former_answers_serve_the_next_one_and_do_not_pile_up() -> None:
    speculation = Speculation()
    Drafts(speculation, [1]).done()
    first = Drafts(speculation, [1])
    for token in range(100, 140):
        first.take(token)
    first.done()
    second = Drafts(speculation, [100, 101, 102])
    assert second.next(MOST) == list(range(103, 103 + len(second.next(MOST))))
    for start in range(40):
        drafts = Drafts(speculation, [])
        for token in range(4000):
            drafts.take(token + start)
        drafts.done()
    assert len(speculation._former.ids) <= 70_000


@pytest.mark.parametrize("how", [0, 16, -1, "on", "1.5", ""])
def test_what_cannot_be_asked_for_is_refused(engine: Engine, how: str | int) -> None:
    with pytest.raises(ConfigError, match="use auto, off, or a number from 1 to 15"):
        engine.speculate(how)


def test_guesses_are_made_by_themselves_only_where_bits_stay_the_same() -> None:
    assert Engine.load("nano", quant="int8", device="cpu").scheduler.speculation is not None
    plain = Engine.load("nano", quant="none", device="cpu")
    assert plain.scheduler.speculation is None
    plain.speculate(4)
    assert plain.scheduler.speculation is not None
    assert plain.scheduler.speculation.most == 4


@pytest.mark.parametrize("rows", [2, 5, 8])
def test_the_last_norm_gives_a_row_the_bits_it_has_alone(engine: Engine, rows: int) -> None:
    norm = type(engine.model.model.norm)(4096, 1e-5)
    x = torch.randn(1, rows, 4096)
    alone = [norm(x[:, row : row + 1], torch.float32) for row in range(rows)]
    assert torch.equal(norm(x, torch.float32), torch.cat(alone, 1))
