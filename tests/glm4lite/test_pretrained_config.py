"""What Transformers' configs do with files, labels and changes, Glm4Config does too."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from glm4lite.base.errors import ConfigError
from glm4lite.model.activations import ACTIVATIONS, WITH_WEIGHTS
from glm4lite.model.config import Glm4Config
from tests.glm4lite.checkpoints import tiny_config
from tests.glm4lite.test_parity import pair, relative_error, tokens

transformers = pytest.importorskip("transformers", reason="transformers is the oracle (test extra)")

LABELS = {0: "no", 1: "maybe", 2: "yes"}


@pytest.mark.parametrize("values", [{}, {"num_labels": 3}, {"id2label": LABELS}, {"id2label": LABELS, "num_labels": 3}])
def test_labels_are_the_references(values: dict[str, Any]) -> None:
    ours, reference = Glm4Config(**values), transformers.Glm4Config(**values)
    assert (ours.num_labels, ours.id2label) == (reference.num_labels, reference.id2label)
    for config in (ours, reference):
        config.num_labels = 3
    assert ours.id2label == reference.id2label
    for config in (ours, reference):
        config.num_labels = 4
    assert (ours.id2label, ours.label2id) == (reference.id2label, reference.label2id)


def test_labels_and_their_numbers_stay_in_step() -> None:
    config = Glm4Config(id2label=LABELS)
    assert config.label2id == {"no": 0, "maybe": 1, "yes": 2}
    config.id2label = {0: "a", 1: "b"}
    assert (config.num_labels, config.label2id) == (2, {"a": 0, "b": 1})
    assert Glm4Config(label2id={"a": 0, "b": 1, "c": 2}).id2label == {0: "a", 1: "b", 2: "c"}


def test_a_number_of_labels_beside_their_names_is_said_not_to_be_used(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "glm4lite"):
        assert Glm4Config(id2label=LABELS, num_labels=5).num_labels == 3
    assert "num_labels 5 is not used: id2label names 3 labels" in caplog.text


def test_files_go_to_transformers_and_come_back(tmp_path: Path) -> None:
    config = Glm4Config(hidden_size=64, id2label=LABELS, dtype="bfloat16", rope_theta=5e5, pad_token_id=None, mine=[1])
    config.save_pretrained(tmp_path / "new" / "ours")
    read = transformers.AutoConfig.from_pretrained(tmp_path / "new" / "ours")
    assert type(read) is transformers.Glm4Config
    assert (read.hidden_size, read.id2label, read.dtype, read.mine) == (64, LABELS, torch.bfloat16, [1])
    read.save_pretrained(tmp_path / "theirs")
    again = Glm4Config.from_pretrained(tmp_path / "theirs")
    assert again == config.model_copy(update={"name_or_path": again.name_or_path, "architectures": again.architectures})
    assert Glm4Config.from_json_file(tmp_path / "new" / "ours" / "config.json").to_dict() == config.to_dict() | {
        "architectures": ["Glm4ForCausalLM"]
    }
    assert Glm4Config.from_pretrained(tmp_path / "theirs" / "config.json").hidden_size == 64


@pytest.mark.parametrize("use_diff", [True, False])
def test_json_holds_the_values_that_the_references_holds(use_diff: bool) -> None:
    values = {"hidden_size": 64, "num_labels": 3, "dtype": "bfloat16"}
    ours = json.loads(Glm4Config(**values).to_json_string(use_diff))
    reference = json.loads(transformers.Glm4Config(**values).to_json_string(use_diff))
    differing = {key for key in ours.keys() & reference.keys() if ours[key] != reference[key]}
    assert differing <= {"architectures"}
    lacking = reference.keys() - ours.keys()
    assert {key for key in lacking if reference[key] is not None} <= {
        "transformers_version",
        "_name_or_path",
        "chunk_size_feed_forward",
        "is_encoder_decoder",
    }


def test_changes_take_the_place_of_what_the_file_says(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(tiny_config(id2label={"0": "a", "1": "b", "2": "c"}, rope_theta=1000.0)))
    changed = Glm4Config.from_pretrained(tmp_path, num_labels=4, rope_theta=7.0, torch_dtype=torch.float32)
    assert (changed.num_labels, changed.rope_theta, changed.dtype) == (4, 7.0, torch.float32)
    assert Glm4Config.from_pretrained(tmp_path, num_labels=3, dtype="auto").id2label == {0: "a", 1: "b", 2: "c"}
    yarn = Glm4Config.from_pretrained(tmp_path, rope_scaling={"rope_type": "yarn", "factor": 4.0})
    assert (yarn.context_length, yarn.rope_theta) == (4 * yarn.max_position_embeddings, 1000.0)
    config, unused = Glm4Config.from_pretrained(tmp_path, foo=1, return_unused_kwargs=True)
    assert (config.num_labels, unused) == (3, {"foo": 1})
    with pytest.raises(ConfigError, match="Glm4Config knows no 'foo'"):
        Glm4Config.from_pretrained(tmp_path, foo=1)
    with pytest.raises(ConfigError, match=rf"{file}: vocab_size: .* found 'many'"):
        Glm4Config.from_pretrained(tmp_path, vocab_size="many")


def test_attributes_are_updated_as_the_references() -> None:
    ours, reference = Glm4Config(), transformers.Glm4Config()
    for config in (ours, reference):
        config.update({"hidden_size": 64, "use_cache": False})
        config.update_from_string("num_hidden_layers=3,attention_dropout=0.5,hidden_act=gelu,tie_word_embeddings=true")
        config.rope_scaling = {"rope_type": "yarn", "factor": 2.0, "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    for key in ("hidden_size", "use_cache", "num_hidden_layers", "attention_dropout", "hidden_act", "rope_parameters"):
        assert getattr(ours, key) == getattr(reference, key), key
    with pytest.raises(ConfigError, match="knows no 'layers'"):
        ours.update_from_string("layers=3")
    with pytest.raises(ConfigError, match="num_hidden_layers: 'x' is no int"):
        ours.update_from_string("num_hidden_layers=x")


def test_a_refused_value_leaves_the_config_as_it_was() -> None:
    config = Glm4Config()
    for key, value in {"hidden_act": "prelu", "num_key_value_heads": 3, "vocab_size": "x", "dtype": "x"}.items():
        with pytest.raises(ConfigError):
            setattr(config, key, value)
    assert config == Glm4Config()


def test_a_config_that_cannot_be_written_is_one_error_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match=r"cannot be made: .*file"):
        Glm4Config().save_pretrained(tmp_path / "file")
    (tmp_path / "config.json").mkdir()
    with pytest.raises(ConfigError, match=r"config.json cannot be written"):
        Glm4Config().save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "file"]
    with pytest.raises(ConfigError, match="push_to_hub is not supported"):
        Glm4Config().save_pretrained(tmp_path, push_to_hub=True)


@pytest.mark.parametrize("name", sorted(transformers.activations.ACT2CLS))
@torch.no_grad()
def test_every_activation_of_the_reference_is_the_same_or_refused(name: str) -> None:
    if name in WITH_WEIGHTS:
        with pytest.raises(ConfigError, match=f"hidden_act '{name}' has weights of its own"):
            Glm4Config(hidden_act=name)
        return
    x = torch.linspace(-12, 12, 501)
    torch.testing.assert_close(ACTIVATIONS[name](x), transformers.activations.ACT2FN[name](x), rtol=1e-4, atol=2e-5)
    if name == "gelu":
        ours, oracle = pair("ForCausalLM", hidden_act=name)
        assert relative_error(ours(tokens()).logits, oracle(tokens()).logits) < 1e-4


@torch.no_grad()
def test_null_heads_mean_what_the_reference_says() -> None:
    config = Glm4Config(hidden_size=64, num_attention_heads=8, num_key_value_heads=None, head_dim=None)
    assert (config.num_key_value_heads, config.head_dim) == (8, 8)
