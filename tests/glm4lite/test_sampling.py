"""SamplingParams refuse what cannot be meant; the sampler obeys its filters and its seed."""

from typing import Any

import pytest
import torch

from glm4lite.base.errors import ModelError, SamplingError
from glm4lite.engine.sampling import Adjustments, Sampler, SamplingParams, _pick

LOGITS = torch.tensor([1.0, 4.0, 3.9, -2.0, 0.5, 3.0])


def draws(count: int = 200, **params: Any) -> set[int]:
    sampler = Sampler(SamplingParams(**{"temperature": 1.0, "top_p": 1.0, "seed": 1, **params}))
    return {sampler(LOGITS, []) for _ in range(count)}


def test_temperature_zero_is_greedy() -> None:
    assert draws(temperature=0.0) == {1}


def test_top_k_keeps_the_k_likeliest() -> None:
    assert draws(top_k=2) == {1, 2}


def test_top_p_keeps_the_smallest_set_that_holds_p() -> None:
    assert draws(top_p=0.5) == {1, 2}
    assert draws(top_p=0.0) == {1}


def sorted_draw(logits: torch.Tensor, params: SamplingParams, drawn: float) -> int:
    """The specification: sort everything, apply Transformers' filters one after the other, go along the sums."""
    probs, ids = (logits.double() / params.temperature).softmax(-1).sort(descending=True)
    if params.top_k:
        probs[params.top_k :] = 0
        probs /= probs.sum()
    if params.top_p < 1:
        kept = probs.cumsum(-1) - probs <= params.top_p
        kept[0] = True
        probs *= kept
    probs *= probs >= params.min_p * probs[0]
    sums = probs.cumsum(-1)
    return int(ids[min(int((sums <= drawn * sums[-1]).sum()), int((probs > 0).sum()) - 1)])


@pytest.mark.parametrize(
    "filters",
    [
        {},
        {"top_p": 0.1},
        {"top_p": 0.9},
        {"top_p": 0.9999},
        {"top_k": 40},
        {"top_k": 2000},
        {"min_p": 0.02},
        {"top_k": 1500, "top_p": 0.9, "min_p": 0.01},
    ],
    ids=str,
)
@pytest.mark.parametrize("spread", [0.01, 1.0, 8.0])
def test_draws_from_a_large_vocabulary_are_those_of_a_full_sort(spread: float, filters: dict[str, float]) -> None:
    logits = torch.randn(5000, generator=torch.Generator().manual_seed(3)) * spread
    params = SamplingParams(**{"temperature": 0.7, "top_p": 1.0, **filters})  # type: ignore[arg-type]
    scaled = (logits - logits.max()) / params.temperature
    rank = logits.argsort(descending=True).argsort()
    for step in range(64):
        got, want = int(_pick(scaled, params, step / 64)), sorted_draw(logits, params, step / 64)
        assert abs(int(rank[got]) - int(rank[want])) <= 1  # sums in float32 round at the border of two ids


def test_a_draw_beyond_the_likeliest_ids_finds_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("glm4lite.engine.sampling.FEW", 4)
    logits, params = -torch.arange(4000) / 1000, SamplingParams(temperature=1, top_p=1)
    for drawn in (0.0, 0.0009, 0.5, 0.9, 0.9999999):
        assert abs(int(_pick(logits, params, drawn)) - sorted_draw(logits, params, drawn)) <= 1


def test_logits_that_are_no_numbers_are_an_error_and_no_token() -> None:
    for temperature in (0.0, 1.0):
        sampler = Sampler(SamplingParams(temperature=temperature))
        for bad in (float("nan"), float("inf")):
            with pytest.raises(ModelError, match="not finite"):
                sampler(torch.tensor([1.0, bad, 2.0]), [])


def test_min_p_is_relative_to_the_likeliest() -> None:
    assert draws(min_p=0.3) == {1, 2, 5}


def test_without_filters_every_id_can_come() -> None:
    assert draws(2000, temperature=3.0) == set(range(6))


def test_repetition_penalty_makes_seen_ids_less_likely_whatever_their_sign() -> None:
    params = SamplingParams(temperature=0.0, repetition_penalty=1.5)
    assert Sampler(params)(LOGITS, [1]) == 2
    assert Sampler(params)(torch.tensor([-1.0, -1.1]), [0, 0]) == 1


PROMPT, STOPS = [3, 7, 7, 11, 40], (2, 7)


def adjusted(params: SamplingParams, answer: list[int], logits: torch.Tensor) -> torch.Tensor:
    """As an answer that grows to this one has its logits adjusted, step by step."""
    adjust = Adjustments(params, len(PROMPT), STOPS)
    for count in range(len(answer)):
        adjust(logits, PROMPT + answer[:count])
    return adjust(logits, PROMPT + answer)


ANSWERS = [[], [7], [5, 5, 9], [3, 5, 7, 5, 40, 5, 49, 0]]


@pytest.mark.parametrize("answer", ANSWERS, ids=len)
def test_bias_penalty_and_least_length_are_transformers(answer: list[int]) -> None:
    processing = pytest.importorskip("transformers.generation.logits_process", reason="the oracle (test extra)")
    logits = torch.randn(50, generator=torch.Generator().manual_seed(len(answer))) * 5
    bias, stops = {5: 2.5, 7: -100.0, 11: 0.125}, list(STOPS)
    params = SamplingParams(logit_bias=bias, repetition_penalty=1.7, min_new_tokens=3)
    ids, scores = torch.tensor([PROMPT + answer]), logits[None]
    for processor in (
        processing.SequenceBiasLogitsProcessor({(token,): value for token, value in bias.items()}),
        processing.RepetitionPenaltyLogitsProcessor(1.7),
        processing.MinNewTokensLengthLogitsProcessor(len(PROMPT), 3, stops),
    ):
        scores = processor(ids, scores)
    assert torch.equal(adjusted(params, answer, logits), scores[0])


@pytest.mark.parametrize("answer", ANSWERS, ids=len)
def test_frequency_and_presence_penalties_are_openais_formula_over_new_ids(answer: list[int]) -> None:
    logits = torch.randn(50, generator=torch.Generator().manual_seed(9))
    got = adjusted(SamplingParams(frequency_penalty=0.75, presence_penalty=-1.5), answer, logits)
    for token, value in enumerate(logits.tolist()):
        count = answer.count(token)
        assert float(got[token]) == pytest.approx(value - 0.75 * count + 1.5 * (count > 0), abs=1e-6)


def test_what_asks_for_nothing_leaves_the_logits_as_they_are() -> None:
    params = SamplingParams(logit_bias={}, frequency_penalty=0.0, presence_penalty=0, repetition_penalty=1.0)
    assert Adjustments(params)(LOGITS, [1, 2]) is LOGITS


def test_an_answer_that_can_only_end_ends_before_its_least_length() -> None:
    only = torch.full((50,), float("-inf"))
    only[7] = 1.0  # all that a constraint has left
    assert Sampler(SamplingParams(temperature=0, min_new_tokens=9), 0, STOPS)(only, []) == 7
    only[8] = -50.0
    assert Sampler(SamplingParams(temperature=0, min_new_tokens=9), 0, STOPS)(only, []) == 8


def test_prompt_ids_that_no_logits_stand_for_are_passed_over() -> None:
    params = SamplingParams(temperature=0, repetition_penalty=2.0, presence_penalty=1.0, logit_bias={60: 100.0})
    assert Sampler(params, 2)(LOGITS, [60, 1, 70]) == 2


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("frequency_penalty", 2.1),
        ("presence_penalty", -2.1),
        ("min_new_tokens", -1),
        ("logit_bias", [1]),
        ("logit_bias", {"5": 1.0}),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {5: float("inf")}),
        ("logit_bias", {5: True}),
        ("stop_token_ids", 5),
        ("stop_token_ids", (5, -1)),
        ("stop_token_ids", ("a",)),
        ("ignore_eos", 1),
    ],
)
def test_what_the_new_fields_cannot_be_is_named(name: str, value: Any) -> None:
    with pytest.raises(SamplingError, match=name):
        SamplingParams(**{name: value})


def test_ids_that_the_tokenizer_lacks_and_a_length_that_cannot_be_are_refused() -> None:
    for wrong in (SamplingParams(logit_bias={50: 1}), SamplingParams(stop_token_ids=(7, 50))):
        wrong.check_vocabulary(51)
        with pytest.raises(SamplingError, match="50 is no token of this model, whose ids are 0 to 49"):
            wrong.check_vocabulary(50)
    with pytest.raises(SamplingError, match="min_new_tokens is 6, more than max_new_tokens, which is 5"):
        SamplingParams(min_new_tokens=6, max_new_tokens=5)


def test_what_was_given_may_be_changed_later() -> None:
    bias = {5: 1.0}
    params = SamplingParams(logit_bias=bias, stop_token_ids=[3])  # type: ignore[arg-type]
    bias[6] = 2.0
    assert (params.logit_bias, params.stop_token_ids) == ({5: 1.0}, (3,))
    assert hash(params) != hash(SamplingParams())


def test_the_same_seed_draws_the_same_ids() -> None:
    params = SamplingParams(temperature=1.0, seed=7)
    one, other = Sampler(params), Sampler(params)
    assert [one(LOGITS, []) for _ in range(50)] == [other(LOGITS, []) for _ in range(50)]


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", -1), ("top_p", 1.5), ("min_p", -0.1), ("repetition_penalty", 0), ("max_new_tokens", 0)],
)
def test_a_value_out_of_range_is_named(name: str, value: float) -> None:
    wrong: dict[str, Any] = {name: value}
    with pytest.raises(SamplingError, match=rf"{name} must be a (whole )?number .* found {value}"):
        SamplingParams(**wrong)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("top_k", 50.0),
        ("max_new_tokens", 1.5),
        ("seed", 2**64),
        ("seed", -1),
        ("temperature", 1e999),
        ("temperature", 2**70),
    ],
)
def test_a_value_torch_could_not_take_is_refused(name: str, value: float) -> None:
    wrong: dict[str, Any] = {name: value}
    with pytest.raises(SamplingError, match=name):
        SamplingParams(**wrong)


def test_a_tiny_temperature_is_nearly_greedy() -> None:
    assert draws(temperature=1e-39) == {1}


def test_a_stop_text_that_is_not_in_a_list_is_refused() -> None:
    with pytest.raises(SamplingError, match="list of texts"):
        SamplingParams(stop="abc")  # type: ignore[arg-type]


def test_a_bad_generation_config_names_its_file() -> None:
    with pytest.raises(SamplingError, match=r"generation_config\.json: top_k must be a whole number"):
        SamplingParams.from_generation_config({"top_k": 2.5})


def test_an_empty_stop_text_is_refused() -> None:
    with pytest.raises(SamplingError, match="empty"):
        SamplingParams(stop=("",))


def test_generation_config_gives_defaults_and_the_caller_wins() -> None:
    values = {"do_sample": True, "temperature": 0.95, "top_p": 0.7, "eos_token_id": [1]}
    params = SamplingParams.from_generation_config(values, top_p=0.9, seed=None)
    assert (params.temperature, params.top_p, params.seed) == (0.95, 0.9, None)
    assert SamplingParams.from_generation_config({"do_sample": False}).temperature == 0
    assert SamplingParams.from_generation_config({"do_sample": False}, temperature=0.3).temperature == 0.3
