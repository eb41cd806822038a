"""SamplingParams refuse what cannot be meant; the sampler obeys its filters and its seed."""

import pytest
import torch

from glm4lite.errors import SamplingError
from glm4lite.sampling import Sampler, SamplingParams, _nucleus

LOGITS = torch.tensor([1.0, 4.0, 3.9, -2.0, 0.5, 3.0])


def draws(count: int = 200, **params: object) -> set[int]:
    sampler = Sampler(SamplingParams(**{"temperature": 1.0, "top_p": 1.0, "seed": 1, **params}))
    return {sampler(LOGITS, []) for _ in range(count)}


def test_temperature_zero_is_greedy() -> None:
    assert draws(temperature=0.0) == {1}


def test_top_k_keeps_the_k_likeliest() -> None:
    assert draws(top_k=2) == {1, 2}


def test_top_p_keeps_the_smallest_set_that_holds_p() -> None:
    assert draws(top_p=0.5) == {1, 2}
    assert draws(top_p=0.0) == {1}


@pytest.mark.parametrize("top_p", [0.1, 0.9, 0.99, 0.9999])
@pytest.mark.parametrize("spread", [0.01, 1.0, 8.0])
def test_the_nucleus_of_a_large_vocabulary_is_that_of_a_full_sort(spread: float, top_p: float) -> None:
    logits = torch.randn(5000, generator=torch.Generator().manual_seed(3)) * spread
    ordered, order = logits.softmax(-1).sort(descending=True)
    expected = set(order[ordered.cumsum(-1) - ordered <= top_p].tolist())
    kept = set(_nucleus(logits, top_p).isfinite().nonzero().flatten().tolist())
    assert len(kept ^ expected) <= 1 + len(expected) // 1000  # sums over fewer terms round differently at the edge


def test_min_p_is_relative_to_the_likeliest() -> None:
    assert draws(min_p=0.3) == {1, 2, 5}


def test_without_filters_every_id_can_come() -> None:
    assert draws(2000, temperature=3.0) == set(range(6))


def test_repetition_penalty_makes_seen_ids_less_likely_whatever_their_sign() -> None:
    sampler = Sampler(SamplingParams(temperature=0.0, repetition_penalty=1.5))
    assert sampler(LOGITS, [1]) == 2
    assert sampler(torch.tensor([-1.0, -1.1]), [0, 0]) == 1


def test_the_same_seed_draws_the_same_ids() -> None:
    params = SamplingParams(temperature=1.0, seed=7)
    one, other = Sampler(params), Sampler(params)
    assert [one(LOGITS, []) for _ in range(50)] == [other(LOGITS, []) for _ in range(50)]


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", -1), ("top_p", 1.5), ("min_p", -0.1), ("repetition_penalty", 0), ("max_new_tokens", 0)],
)
def test_a_value_out_of_range_is_named(name: str, value: float) -> None:
    with pytest.raises(SamplingError, match=rf"{name} must be a (whole )?number .* found {value}"):
        SamplingParams(**{name: value})


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
    with pytest.raises(SamplingError, match=name):
        SamplingParams(**{name: value})


def test_a_tiny_temperature_is_nearly_greedy() -> None:
    assert draws(temperature=1e-39) == {1}


def test_a_stop_text_that_is_not_in_a_list_is_refused() -> None:
    with pytest.raises(SamplingError, match="list of texts"):
        SamplingParams(stop="abc")


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
