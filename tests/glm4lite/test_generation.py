"""`generate` against Transformers' own on the same random weights: ids, scores, states, and what is refused."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from glm4lite.base.errors import ConfigError, ContextLengthError
from glm4lite.pretrained.generation import GenerationConfig
from glm4lite.pretrained.models import Glm4ForCausalLM
from tests.glm4lite.test_parity import SMALL, VARIANTS, pair, tokens

transformers = pytest.importorskip("transformers", reason="transformers is the oracle (test extra)")

PROMPTS = tokens(3, 7)


@pytest.fixture(scope="module")
def models() -> tuple[Glm4ForCausalLM, Any]:
    ours, oracle = pair("ForCausalLM")
    assert isinstance(ours, Glm4ForCausalLM)
    return ours, oracle


def padded() -> dict[str, Any]:
    """Three prompts of 7, 5 and 2 tokens, padded on the left with another id than the pad id."""
    ids, mask = PROMPTS.clone(), torch.ones_like(PROMPTS)
    for row, padding in enumerate((0, 2, 5)):
        ids[row, :padding], mask[row, :padding] = 3, 0
    return {"input_ids": ids, "attention_mask": mask}


def ends(oracle: Any, **inputs: Any) -> list[int]:
    """Ids that end the greedy texts of a batch at different steps."""
    free = oracle.generate(**inputs, max_new_tokens=12, do_sample=False, eos_token_id=None)
    new = free[:, -12:].tolist()
    return sorted({new[0][3], new[1][6]})


def both(models: tuple[Glm4ForCausalLM, Any], *inputs: Any, seed: int = 0, **settings: Any) -> tuple[Any, Any]:
    """What each makes of the same call, from the same seed of torch's generator."""
    made = []
    for model in models:
        torch.manual_seed(seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made.append(model.generate(*inputs, **settings))
    return made[0], made[1]


def test_the_documented_example_gives_the_references_ids(models: tuple[Glm4ForCausalLM, Any]) -> None:
    ours, wanted = both(models, PROMPTS[:1], max_length=30)
    assert ours.tolist() == wanted.tolist()
    assert ours.dtype == torch.int64


@pytest.mark.parametrize("variant", ["glm4", "glm", "glm4 kv1", "glm4 yarn"])
def test_greedy_batches_of_padded_prompts_equal_the_references(variant: str) -> None:
    models = pair("ForCausalLM", **VARIANTS[variant])
    stops = ends(models[1], **padded())
    for eos, pad in itertools.product((None, stops, stops[0]), (None, 2)):
        ours, wanted = both(models, **padded(), max_new_tokens=12, eos_token_id=eos, pad_token_id=pad)
        assert ours.tolist() == wanted.tolist(), (eos, pad)


def test_padding_is_found_by_the_pad_id_where_no_mask_is_given(models: tuple[Glm4ForCausalLM, Any]) -> None:
    ids = padded()["input_ids"]
    ids[ids == 3] = 0
    ours, wanted = both(models, ids, max_new_tokens=9)
    assert ours.tolist() == wanted.tolist()


SETTINGS: dict[str, dict[str, Any]] = {
    "min_new_tokens": {"min_new_tokens": 9},
    "min_length": {"min_length": 14},
    "repetition_penalty": {"repetition_penalty": 1.7},
    "sequence_bias": {"sequence_bias": {(5,): 4.0, (7, 9): -9.0, (80,): 3.0}, "repetition_penalty": 1.2},
    "sequence_bias as JSON": {"sequence_bias": [[[5], 4.0], [[80], 9.0]]},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2},
    "suppress_tokens": {"suppress_tokens": list(range(5, 90))},
    "begin_suppress_tokens": {"begin_suppress_tokens": list(range(80, 150))},
    "forced_eos_token_id": {"forced_eos_token_id": 9},
    "no cache": {"use_cache": False},
    "max_length": {"max_length": 13},
    "default length": {"max_new_tokens": None},
    "chunks": {"prefill_chunk_size": 2},
    "sampled": {"do_sample": True},
    "temperature": {"do_sample": True, "temperature": 2.5},
    "top_k": {"do_sample": True, "top_k": 5},
    "no top_k": {"do_sample": True, "top_k": 0, "temperature": 3.0},
    "top_p": {"do_sample": True, "top_p": 0.5, "top_k": 0},
    "min_p": {"do_sample": True, "min_p": 0.2, "temperature": 2.0},
    "typical_p": {"do_sample": True, "typical_p": 0.4},
    "all of sampling": {"do_sample": True, "temperature": 1.5, "top_k": 30, "top_p": 0.9, "min_p": 0.01},
    "several": {"do_sample": True, "num_return_sequences": 3, "repetition_penalty": 1.2},
    "renormalized": {"do_sample": True, "renormalize_logits": True},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_gives_the_references_ids(name: str, models: tuple[Glm4ForCausalLM, Any]) -> None:
    stops = ends(models[1], **padded())
    settings = {"max_new_tokens": 12, "eos_token_id": stops, "pad_token_id": 2, **SETTINGS[name]}
    for seed in range(3 if "do_sample" in settings else 1):
        ours, wanted = both(models, **padded(), seed=seed, **settings)
        assert ours.tolist() == wanted.tolist()


def test_draws_follow_the_references_distribution(models: tuple[Glm4ForCausalLM, Any]) -> None:
    model, oracle = models
    settings: dict[str, Any] = {"do_sample": True, "top_k": 6, "temperature": 2.0, "max_new_tokens": 1}
    torch.manual_seed(7)
    drawn = model.generate(PROMPTS[:1], num_return_sequences=4000, **settings)
    kept: dict[str, Any] = {"return_dict_in_generate": True, "output_scores": True}
    wanted = oracle.generate(PROMPTS[:1], **settings, **kept).scores[0].softmax(-1)[0]
    assert isinstance(drawn, Tensor)
    found = drawn[:, -1].bincount(minlength=SMALL["vocab_size"]) / 4000
    assert float((found - wanted).abs().max()) < 0.03


@pytest.mark.parametrize("use_cache", [True, False])
def test_scores_logits_and_states_equal_the_references(models: tuple[Glm4ForCausalLM, Any], use_cache: bool) -> None:
    wanted = ("scores", "logits", "attentions", "hidden_states")
    kept = {f"output_{name}": True for name in wanted}
    ours, theirs = both(
        models,
        **padded(),
        max_new_tokens=5,
        top_k=4,
        do_sample=True,
        use_cache=use_cache,
        return_dict_in_generate=True,
        **kept,
    )
    assert ours.sequences.tolist() == theirs.sequences.tolist()
    assert list(ours.keys()) == [*("sequences", *wanted), *(["past_key_values"] if use_cache else [])]
    real = padded()["attention_mask"].bool()
    for name in ("scores", "logits"):
        for found, expected in zip(ours[name], theirs[name], strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    for found, expected in zip(ours.hidden_states[0], theirs.hidden_states[0], strict=True):
        torch.testing.assert_close(found[real], expected[real], rtol=1e-4, atol=1e-4)
    for step, expected_step in zip(ours.attentions, theirs.attentions, strict=True):
        assert [tuple(layer.shape) for layer in step] == [tuple(layer.shape) for layer in expected_step]
    if use_cache:
        assert ours.past_key_values.get_seq_length() == theirs.past_key_values.get_seq_length() == 11
    for normalized in (True, False):
        torch.testing.assert_close(
            models[0].compute_transition_scores(ours.sequences, ours.scores, normalize_logits=normalized),
            models[1].compute_transition_scores(theirs.sequences, theirs.scores, normalize_logits=normalized),
            rtol=1e-4,
            atol=1e-4,
        )


def test_a_cache_of_the_beginning_is_gone_on_from(models: tuple[Glm4ForCausalLM, Any]) -> None:
    model, oracle = models
    whole = oracle.generate(PROMPTS, max_new_tokens=10)
    for cache in (model.new_cache(3), transformers.DynamicCache()):
        model(PROMPTS[:, :4], past_key_values=cache)
        found = model.generate(PROMPTS, past_key_values=cache, max_new_tokens=10)
        assert isinstance(found, Tensor)
        assert found.tolist() == whole.tolist()
        assert cache.get_seq_length() == 16
    with pytest.raises(ValueError, match=r"past_key_values holds 16 tokens, the prompt has 7"):
        model.generate(PROMPTS, past_key_values=cache)
    with pytest.raises(ValueError, match=r"past_key_values holds 3 sequences, the input 1"):
        model.generate(whole[:1], past_key_values=cache, max_new_tokens=1)


@pytest.mark.parametrize("use_cache", [True, False])
def test_vectors_stand_in_for_ids_and_only_new_ids_come_back(
    models: tuple[Glm4ForCausalLM, Any], use_cache: bool
) -> None:
    vectors = models[0].get_input_embeddings()(PROMPTS)
    for length in ({"max_new_tokens": 6}, {"max_length": 15}, {}, {"min_new_tokens": 4, "max_new_tokens": 6}):
        ours, wanted = both(models, inputs_embeds=vectors, use_cache=use_cache, **length)
        assert ours.tolist() == wanted.tolist()


def test_own_processors_criteria_and_allowed_ids_take_part(models: tuple[Glm4ForCausalLM, Any]) -> None:
    def even_only(ids: Tensor, scores: Tensor) -> Tensor:
        return scores.index_fill(1, torch.arange(1, scores.shape[1], 2), float("-inf"))

    def long_enough(ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.tensor([len(row) > 10 for row in ids])

    lists = {
        "logits_processor": transformers.LogitsProcessorList([even_only]),
        "stopping_criteria": transformers.StoppingCriteriaList([long_enough]),
    }
    ours, wanted = both(models, PROMPTS, max_new_tokens=9, **lists)
    assert ours.tolist() == wanted.tolist()
    assert ours.shape[1] == 11
    allowed, allowed_wanted = both(
        models, PROMPTS, max_new_tokens=5, prefix_allowed_tokens_fn=lambda row, ids: [10 + row, 20 + len(ids)]
    )
    assert allowed.tolist() == allowed_wanted.tolist()


def test_a_streamer_gets_the_prompt_and_every_id(models: tuple[Glm4ForCausalLM, Any]) -> None:
    class Recorder:
        def __init__(self) -> None:
            self.got: list[Any] = []

        def put(self, value: Tensor) -> None:
            self.got.append(value.tolist())

        def end(self) -> None:
            self.got.append("end")

    recorders = [Recorder(), Recorder()]
    for model, recorder in zip(models, recorders, strict=True):
        model.generate(PROMPTS[:1], max_new_tokens=4, streamer=recorder)
    assert recorders[0].got == recorders[1].got
    assert recorders[0].got[-1] == "end"
    with pytest.raises(ValueError, match="a streamer takes one sequence"):
        models[0].generate(PROMPTS, max_new_tokens=4, streamer=recorders[0])


class Letters:
    """A tokenizer of which each id is one letter."""

    def decode(self, token_ids: list[int], **_: Any) -> str:
        return "".join(chr(97 + i % 26) for i in token_ids)


def test_a_stop_text_ends_a_sequence_also_where_it_begins_in_the_prompt(
    models: tuple[Glm4ForCausalLM, Any],
) -> None:
    model, letters = models[0], Letters()
    free = model.generate(PROMPTS, max_new_tokens=12, eos_token_id=[159])
    assert isinstance(free, Tensor)
    texts = [letters.decode(row) for row in free.tolist()]
    for stop in (texts[0][6:8], texts[1][9:12]):
        found = model.generate(PROMPTS, max_new_tokens=12, eos_token_id=[159], stop_strings=stop, tokenizer=letters)
        assert isinstance(found, Tensor)
        for text, row in zip(texts, found.tolist(), strict=True):
            end = next((end for end in range(8, 20) if text[:end].endswith(stop)), 19)
            ours = letters.decode(row[:end])
            assert ours == text[:end]
            assert set(row[end:]) <= {0}
    with pytest.raises(ValueError, match="stop_strings needs the model's tokenizer"):
        model.generate(PROMPTS, stop_strings="ab")


def test_settings_come_from_the_call_then_the_object_then_the_model() -> None:
    models = pair("ForCausalLM")
    for model, config in zip(models, (GenerationConfig, transformers.GenerationConfig), strict=True):
        model.generation_config = config(max_new_tokens=3, repetition_penalty=1.5, pad_token_id=0, eos_token_id=[1])
    ours, wanted = both(models, PROMPTS)
    assert ours.tolist() == wanted.tolist()
    assert ours.shape[1] == 10
    objects = [GenerationConfig(max_new_tokens=4), transformers.GenerationConfig(max_new_tokens=4)]
    for given in (*objects, {"max_new_tokens": 4}):
        found = models[0].generate(PROMPTS, given)
        wanted = models[1].generate(PROMPTS, objects[1])
        assert found.tolist() == wanted.tolist()
        assert found.shape[1] == 11
    assert models[0].generate(PROMPTS, objects[0], max_new_tokens=2).shape[1] == 9


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 4}, r"^num_beams=4 is not supported by glm4lite's generate"),
        ({"penalty_alpha": 0.6}, r"^penalty_alpha=0.6 is not supported"),
        ({"assistant_model": object()}, r"^assistant_model is not supported"),
        ({"max_new_token": 3}, r"generate knows no 'max_new_token'; did you mean 'max_new_tokens'\?"),
        ({"atention_mask": None}, r"generate knows no 'atention_mask'; did you mean 'attention_mask'\?"),
        ({"frobnicate": 1}, r"^generate knows no 'frobnicate'$"),
        ({"temperature": 0.0, "do_sample": True}, r"temperature must be a number above 0, found 0.0; do_sample=False"),
        ({"top_p": 1.5}, r"^top_p: .*less than or equal to 1, found 1.5"),
        ({"top_k": -1}, r"^top_k: .*found -1"),
        ({"max_new_tokens": 0}, r"^max_new_tokens: .*found 0"),
        ({"max_new_tokens": "5"}, r"^max_new_tokens: .*found '5'"),
        ({"num_return_sequences": 0}, r"^num_return_sequences: "),
        ({"generation_config": 5}, r"generation_config must be a GenerationConfig or a dict, found 5"),
    ],
)
def test_a_setting_that_cannot_be_used_is_refused_by_name(
    settings: dict[str, Any], message: str, models: tuple[Glm4ForCausalLM, Any]
) -> None:
    with pytest.raises(ConfigError, match=message):
        models[0].generate(PROMPTS, **settings)


@pytest.mark.parametrize(
    "neutral",
    [{"num_beams": 1}, {"early_stopping": False}, {"synced_gpus": False}, {"cache_implementation": "dynamic"}],
)
def test_settings_that_ask_for_nothing_are_taken(neutral: dict[str, Any], models: tuple[Glm4ForCausalLM, Any]) -> None:
    ours, wanted = both(models, PROMPTS, max_new_tokens=3, **neutral)
    assert ours.tolist() == wanted.tolist()


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"inputs": PROMPTS[0]}, r"input_ids must be \[batch, tokens\], found a tensor of shape \[7\]"),
        ({"inputs": PROMPTS + 160}, r"input_ids holds \d+; this model's ids are 0 to 159"),
        ({"inputs": PROMPTS.float()}, r"input_ids must be whole numbers, found torch.float32"),
        ({"inputs": PROMPTS, "input_ids": PROMPTS}, r"give the prompt as inputs or as input_ids, not both"),
        ({"inputs": PROMPTS, "attention_mask": torch.ones(3, 6)}, r"attention_mask must be \[3, 7\] as the prompt"),
        ({"inputs": PROMPTS, "max_length": 7}, r"the prompt has 7 tokens and max_length is 7, which counts them too"),
        ({}, r"there is no prompt, and no bos_token_id to begin with"),
    ],
)
def test_inputs_that_cannot_be_used_are_one_sentence(
    inputs: dict[str, Any], message: str, models: tuple[Glm4ForCausalLM, Any]
) -> None:
    with pytest.raises(ValueError, match=message):
        models[0].generate(**inputs)


def test_a_prompt_as_long_as_the_context_is_refused_and_a_long_answer_cut_with_a_word(
    models: tuple[Glm4ForCausalLM, Any],
) -> None:
    with pytest.raises(ContextLengthError, match=r"the prompt has 512 tokens and the model's context is 512"):
        models[0].generate(tokens(1, 512))
    with pytest.warns(UserWarning, match=r"context of 512 tokens leaves room for 2 new ones"):
        found = models[0].generate(tokens(1, 510), max_new_tokens=9, eos_token_id=[159])
    assert found.shape[1] == 512
