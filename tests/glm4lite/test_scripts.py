"""Scripts as people write them for Transformers: the same lines on its classes and on ours, and what bad input gets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import glm4lite
from glm4lite.hub.sources import nano_folder
from tests.glm4lite.test_parity import pair, tokens

transformers = pytest.importorskip("transformers", reason="transformers is the oracle (test extra)")

IDS = tokens(2, 6)
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 1, 1]])


def both(script: Callable[[Any], Any]) -> None:
    """The script gives the same values with either library's model."""
    found, wanted = (script(model) for model in pair("ForCausalLM"))
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)


def test_a_padded_query_sees_what_it_sees_in_transformers() -> None:
    """Also where the padding is not at the left: its logits count in the loss of the first real token behind it."""
    both(lambda model: [model(IDS, attention_mask=MASK, labels=IDS)[name] for name in ("loss", "logits")])


def test_packed_sequences_do_not_see_each_other() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 0, 1]])
    both(lambda model: [model(IDS, position_ids=positions, use_cache=kept).logits for kept in (True, False)])


def test_num_items_in_batch_shares_a_mean() -> None:
    both(lambda model: model(IDS, labels=IDS, num_items_in_batch=7).loss)
    both(lambda model: model(IDS, labels=IDS, num_items_in_batch=torch.tensor(7)).loss)


def test_ids_and_vectors_together_generate_behind_the_ids() -> None:
    def script(model: Any) -> Tensor:
        vectors = torch.cat([torch.zeros(2, 3, 64), model.get_input_embeddings()(IDS)], 1)
        mask = torch.cat([torch.ones(2, 3, dtype=torch.long), torch.ones_like(IDS)], 1)
        settings = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
        plain: Tensor = model.generate(IDS, inputs_embeds=vectors, **settings)
        again: Tensor = model.generate(IDS, inputs_embeds=vectors, use_cache=False, **settings)
        assert torch.equal(plain, again)
        return plain

    both(script)


def test_outputs_are_made_anew_by_libraries_that_move_them() -> None:
    """accelerate makes `type(output)({name: value})`; the names must not end in the first field."""
    output = pair("ForCausalLM")[0](IDS, output_hidden_states=True, use_cache=False)
    for made in (type(output)(dict(output.items())), type(output)((name, output[name]) for name in output)):
        assert made.loss is None
        assert made.logits is output.logits
        assert len(made.hidden_states) == 4


def test_a_class_of_the_scripts_own_gets_a_new_head(tmp_path: Path) -> None:
    class Reward(glm4lite.Glm4PreTrainedModel):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.model = glm4lite.Glm4Model(self.config)
            self.value = nn.Linear(self.config.hidden_size, 1)
            self.post_init()

        def forward(self, input_ids: Tensor) -> Any:
            return self.value(self.model(input_ids).last_hidden_state)

    model, info = Reward.from_pretrained(nano_folder(), output_loading_info=True)
    assert set(info["missing_keys"]) == {"value.weight", "value.bias"}
    model.save_pretrained(tmp_path)
    assert torch.equal(Reward.from_pretrained(tmp_path)(IDS), model(IDS))


def test_trainer_sees_the_losses_it_sees_of_its_own_class(tmp_path: Path) -> None:
    """With batches whose gradients are added up, and layers that are computed again."""
    losses = []
    for number, model in enumerate(pair("ForCausalLM")):
        rows = [{"input_ids": ids, "labels": ids} for ids in tokens(8, 9)]
        for row in rows[::3]:
            row["labels"] = torch.cat((torch.full((5,), -100), row["labels"][5:]))
        arguments = transformers.TrainingArguments(
            str(tmp_path / str(number)),
            max_steps=2,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            activation_checkpointing=True,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = transformers.Trainer(model, arguments, train_dataset=rows)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_weights_that_trainer_saves_without_a_config_are_told(tmp_path: Path) -> None:
    model = pair("ForCausalLM")[0]
    trainer = transformers.Trainer(model, transformers.TrainingArguments(str(tmp_path), report_to=[], use_cpu=True))
    trainer.save_model(str(tmp_path))
    with pytest.raises(glm4lite.Glm4liteError, match=r"no config\.json, as Transformers' Trainer.*config\.save_pretr"):
        glm4lite.Glm4ForCausalLM.from_pretrained(tmp_path)
    model.config.save_pretrained(tmp_path)
    again = glm4lite.Glm4ForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_frozen_weights_under_checkpoints_get_gradients_through_the_input() -> None:
    model = pair("ForCausalLM")[0].requires_grad_(False)
    model.enable_input_require_grads()
    assert model(IDS).logits.requires_grad
    model.disable_input_require_grads()
    assert not model(IDS).logits.requires_grad


VECTORS = torch.zeros(2, 6, 64)
KEYS = torch.zeros(2, 2, 3, 16)
FORWARD: dict[str, tuple[dict[str, Any], str]] = {
    "ids: a list": ({"input_ids": [[3]]}, "input_ids must be a torch tensor, found list; make one with torch.tensor"),
    "ids: a text": ({"input_ids": "Hi"}, "input_ids must be a torch tensor, found str; a tokenizer makes one"),
    "ids: a dict": ({"input_ids": {"input_ids": IDS}}, r"found dict; write \*\*inputs"),
    "mask: a list": ({"attention_mask": [[1] * 6] * 2}, "attention_mask must be a torch tensor, found list"),
    "mask: 4-D, too wide": ({"attention_mask": torch.ones(2, 1, 7, 7)}, r"or 1, 8 or 1, 6, 6\], found \[2, 1, 7, 7\]"),
    "mask: 4-D, heads": ({"attention_mask": torch.ones(2, 3, 6, 6)}, r"found \[2, 3, 6, 6\]"),
    "mask: 4-D, ints": (
        {"attention_mask": torch.ones(2, 1, 6, 6).long()},
        "is bool .* or a float .* found torch.int64",
    ),
    "positions: a list": ({"position_ids": [[0]]}, "position_ids must be a torch tensor"),
    "cache_position: a text": ({"cache_position": "x"}, "must be a torch tensor, found str"),
    "vectors: a list": ({"input_ids": None, "inputs_embeds": [[[0.0]]]}, "inputs_embeds must be a torch tensor"),
    "vectors: type": (
        {"input_ids": None, "inputs_embeds": VECTORS.bfloat16()},
        "is torch.bfloat16, the model torch.fl",
    ),
    "labels: a list": ({"labels": [[1] * 6] * 2}, "labels must be a torch tensor, found list"),
    "labels: floats": ({"labels": IDS.float()}, "labels must be whole numbers, found torch.float32"),
    "labels: bools": ({"labels": IDS > 3}, "labels must be whole numbers, found torch.bool"),
    "keep: negative": ({"logits_to_keep": -1}, "logits_to_keep must be 0"),
    "keep: a float": ({"logits_to_keep": 1.5}, "must be a number or a 1-D tensor of positions, found float"),
    "keep: outside": ({"logits_to_keep": torch.tensor([9])}, "names position 9; the input has 6"),
    "cache: nothing": ({"past_key_values": [None] * 3}, "a pair of float tensors a layer; layer 0 has none"),
    "cache: heads": ({"past_key_values": [(KEYS[:, :1],) * 2] * 3}, r"\[batch, 2, tokens, 16\], found \[2, 1, 3, 16\]"),
    "cache: lengths": ({"past_key_values": [(KEYS, KEYS[:, :, 1:])] * 3}, r"found \[2, 2, 3, 16\] and \[2, 2, 2, 16\]"),
}


@pytest.mark.parametrize("name", FORWARD)
def test_what_forward_cannot_use_gets_one_sentence(name: str) -> None:
    given, message = FORWARD[name]
    with pytest.raises(ValueError, match=message) as caught:
        pair("ForCausalLM")[0](**{"input_ids": IDS, **given})
    assert "\n" not in str(caught.value)


GENERATE: dict[str, tuple[dict[str, Any], str]] = {
    "ids: a list": ({"inputs": [[3]]}, "input_ids must be a torch tensor"),
    "mask: a list": ({"attention_mask": [[1] * 6] * 2}, "attention_mask must be a torch tensor"),
    "positions: another length": ({"position_ids": torch.arange(4)[None]}, "position_ids must be"),
    "vectors: another batch": ({"inputs_embeds": VECTORS[:1]}, "input_ids has 2 sequences, inputs_embeds 1"),
    "processor: a function": ({"logits_processor": max}, "logits_processor must be a list of functions"),
    "processor: None": ({"logits_processor": [lambda ids, scores: None]}, r"must return scores \[2, 160\], found None"),
    "processor: shape": ({"logits_processor": [lambda ids, scores: scores[:, :3]]}, r"found \[2, 3\]"),
    "processor: nan": ({"logits_processor": [lambda ids, scores: scores / 0 * 0]}, "scores that are not finite"),
    "criterion: a function": ({"stopping_criteria": max}, "stopping_criteria must be a list"),
    "criterion: None": ({"stopping_criteria": [lambda ids, scores: None]}, "must return a bool, or a tensor of 2"),
    "criterion: shape": ({"stopping_criteria": [lambda ids, scores: torch.ones(5)]}, r"of 2 bools, found \[5\]"),
    "streamer": ({"inputs": IDS[:1], "streamer": True}, "streamer must have put and end"),
    "tokenizer": ({"stop_strings": ["a"], "tokenizer": "nano"}, "tokenizer must have decode"),
    "allowed: outside": ({"prefix_allowed_tokens_fn": lambda row, ids: [9999]}, "must return ids below 160"),
    "allowed: None": ({"prefix_allowed_tokens_fn": lambda row, ids: None}, "allows no id"),
    "pad: outside": ({"pad_token_id": 9999}, "pad_token_id is 9999, which fills up sequences"),
}


@pytest.mark.parametrize("name", GENERATE)
def test_what_generate_cannot_use_gets_one_sentence(name: str) -> None:
    given, message = GENERATE[name]
    with pytest.raises(ValueError, match=message) as caught:
        pair("ForCausalLM")[0].generate(**{"inputs": IDS, "max_new_tokens": 2, "do_sample": False, **given})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("scores", [(), None, (torch.ones(2, 3),), (torch.ones(1, 160),), (torch.ones(2, 160),) * 9])
def test_scores_that_are_none_of_generates_get_one_sentence(scores: Any) -> None:
    with pytest.raises(ValueError, match="scores"):
        pair("ForCausalLM")[0].compute_transition_scores(IDS, scores)


def test_whole_numbers_of_any_width_are_ids_and_labels() -> None:
    model = pair("ForCausalLM")[0]
    wanted = model(IDS, labels=IDS).loss
    for dtype in (torch.int32, torch.uint8):
        torch.testing.assert_close(model(IDS.to(dtype), labels=IDS.to(dtype)).loss, wanted)
