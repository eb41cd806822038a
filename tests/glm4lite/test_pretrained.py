"""What the model classes share with Transformers': switches, outputs, caches, embeddings, sizes, bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from glm4lite.pretrained.models import Glm4ForCausalLM
from tests.glm4lite.test_parity import SMALL, pair, tokens

transformers = pytest.importorskip("transformers", reason="transformers is the oracle (test extra)")


@torch.no_grad()
def test_the_configs_switches_hold_where_the_call_says_nothing() -> None:
    ours, oracle = pair("ForCausalLM")
    for model in (ours, oracle):
        model.config.output_hidden_states, model.config.use_cache = True, False
    found, wanted = ours(tokens()), oracle(tokens())
    assert list(found) == list(wanted) == ["logits", "hidden_states"]
    assert len(found.hidden_states) == len(wanted.hidden_states)
    ours.config.return_dict = False
    assert isinstance(ours(tokens()), tuple)
    assert ours(tokens(), return_dict=True, output_hidden_states=False).get("hidden_states") is None


def test_an_output_is_a_mapping_of_what_is_there() -> None:
    ours, oracle = pair("ForCausalLM")
    ids = tokens()
    found, wanted = ours(ids, labels=ids), oracle(ids, labels=ids)
    assert list(found.keys()) == list(wanted.keys())
    assert len(found) == len(wanted)
    assert "loss" in found
    assert "attentions" not in found
    assert found[0] is found["loss"] is found.to_tuple()[0]


@torch.no_grad()
def test_caches_of_transformers_and_pairs_are_gone_on_from() -> None:
    ours, oracle = pair("ForCausalLM")
    ids = tokens()
    whole = oracle(ids).logits[:, 10:]
    dynamic = oracle(ids[:, :10]).past_key_values
    pairs = [(layer.keys.clone(), layer.values.clone()) for layer in dynamic.layers]
    found = ours(ids[:, 10:], past_key_values=dynamic)
    assert found.past_key_values is dynamic
    assert dynamic.get_seq_length() == 21
    for logits in (found.logits, ours(ids[:, 10:], past_key_values=pairs).logits):
        torch.testing.assert_close(logits, whole, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="past_key_values has 2 layers, the model 3"):
        ours(ids, past_key_values=pairs[:2])
    with pytest.raises(ValueError, match=r"must be a KVCache, a DynamicCache or \(key, value\) pairs, found str"):
        ours(ids, past_key_values="cache")


@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_are_resized_as_the_references(tied: bool) -> None:
    ours, oracle = pair("ForCausalLM", tie_word_embeddings=tied)
    assert isinstance(ours, Glm4ForCausalLM)
    for size, multiple in ((170, None), (170, 64), (100, None)):
        for model in (ours, oracle):
            model.resize_token_embeddings(size, multiple)
        assert ours.config.vocab_size == oracle.config.vocab_size
        assert ours(tokens() % 100).logits.shape == oracle(tokens() % 100).logits.shape
        assert (ours.lm_head.weight is ours.get_input_embeddings().weight) == tied
        kept = oracle.get_input_embeddings().weight[:100]
        torch.testing.assert_close(ours.model.embed_tokens.weight[:100], kept)
    with pytest.raises(ValueError, match="a vocabulary needs at least one row, found 0"):
        ours.resize_token_embeddings(0)


def test_parameters_are_counted_as_the_references() -> None:
    ours, oracle = pair("ForCausalLM")
    choices: list[dict[str, bool]] = [{}, {"exclude_embeddings": True}, {"only_trainable": True}]
    for options in choices:
        assert ours.num_parameters(**options) == oracle.num_parameters(**options)
    plain = Glm4ForCausalLM.from_pretrained("nano").num_parameters()
    assert Glm4ForCausalLM.from_pretrained("nano", quant="int8").num_parameters() == plain


def test_gradients_are_the_same_where_layers_are_computed_again() -> None:
    ours, _ = pair("ForCausalLM")
    ids, found = tokens(), list[Any]()
    ours.train()
    for again in (False, True):
        if again:
            ours.gradient_checkpointing_enable()
        assert ours.is_gradient_checkpointing == again
        ours.zero_grad()
        ours(ids, labels=ids).loss.backward()
        found.append([torch.clone(parameter.grad) for parameter in ours.parameters() if parameter.grad is not None])
        assert len(found[-1]) == len(list(ours.parameters()))
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"input_ids": tokens()[0]}, r"input_ids must be \[batch, tokens\]"),
        ({"input_ids": tokens() + SMALL["vocab_size"]}, r"this model's ids are 0 to 159"),
        ({"input_ids": tokens(), "attention_mask": torch.ones(2, 20)}, r"attention_mask must be \[2, 21\], found"),
        ({"input_ids": tokens(), "position_ids": torch.arange(20)[None]}, r"position_ids must be \[2 or 1, 21\]"),
        ({"input_ids": tokens(), "labels": tokens()[:, 1:]}, r"labels must have the shape \[2, 21\]"),
        ({"input_ids": tokens(), "labels": tokens() + 160}, r"labels holds \d+; classes are 0 to 159"),
        ({"inputs_embeds": torch.zeros(2, 3, 5)}, r"inputs_embeds must be \[batch, tokens, 64\]"),
    ],
)
def test_inputs_that_do_not_fit_are_one_sentence(inputs: dict[str, Any], message: str) -> None:
    ours, _ = pair("ForCausalLM")
    with pytest.raises(ValueError, match=message):
        ours(**inputs)


def test_a_problem_that_is_none_and_labels_out_of_range_are_named() -> None:
    ours, _ = pair("ForSequenceClassification", num_labels=3)
    with pytest.raises(ValueError, match="labels holds 3; classes are 0 to 2"):
        ours(tokens(), labels=torch.tensor([0, 3]))
    ours.config.problem_type = "guessing"
    with pytest.raises(ValueError, match=r"config\.problem_type must be one of regression, .*found 'guessing'"):
        ours(tokens(), labels=torch.tensor([0, 1]))
