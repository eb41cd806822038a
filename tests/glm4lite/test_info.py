"""What `glm4lite info` says about a checkpoint: true sizes, whatever its widths, and one line for a damaged one."""

import json
from pathlib import Path
from typing import Any

import pytest

from glm4lite.base.errors import ConfigError, Glm4liteError
from glm4lite.base.sizes import readable
from glm4lite.checkpoint.quantize import quantize_checkpoint
from glm4lite.measure import info
from glm4lite.pretrained.load import load
from tests.glm4lite.checkpoints import tiny_config, tiny_tensors, write_checkpoint


def facts(folder: Path) -> dict[str, str]:
    return dict(info.model_facts(str(folder)))


def held(folder: Path, quant: str | None) -> str:
    """The size of the weights that a loaded model holds (tied ones once)."""
    model = load(folder, quant=quant)
    storages = {value.untyped_storage().data_ptr(): value.nbytes for value in model.state_dict().values()}
    return readable(sum(storages.values()))


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"intermediate_size": 100}], ids=str)
def test_the_sizes_are_those_of_the_loaded_model(tmp_path: Path, changes: dict[str, Any]) -> None:
    folder = write_checkpoint(tmp_path, tiny_config(**changes))
    found = facts(folder)
    assert found["weights, int4"] == held(folder, "int4")
    assert found["weights, int8"] == held(folder, "int8")
    assert found["weights, bfloat16"] == held(folder, None)
    assert found["stored as"] == "bfloat16"


def test_a_pre_quantized_folder_has_its_own_size(tmp_path: Path) -> None:
    written = quantize_checkpoint(write_checkpoint(tmp_path / "tiny"), tmp_path / "q", "int4")
    found = facts(written)
    assert found["stored as"] == "int4, groups of 32"
    assert found["weights, int4"] == held(written, None)
    assert "weights, bfloat16" not in found
    assert found["parameters"] == facts(tmp_path / "tiny")["parameters"]


def test_a_classifier_is_described_too(tmp_path: Path) -> None:
    config = tiny_config(architectures=["Glm4ForTokenClassification"])
    tensors = tiny_tensors(config)
    tensors["score.weight"] = tensors.pop("lm_head.weight")[:2].clone()
    tensors["score.bias"] = tensors["score.weight"][:, 0].clone()
    assert facts(write_checkpoint(tmp_path, config, tensors))["stored as"] == "bfloat16"


@pytest.mark.parametrize(
    "changes", [{"quantization_config": {"quant_method": "quip"}}, {"num_hidden_layers": 10**9}, {"vocab_size": 10**15}]
)
def test_what_cannot_be_loaded_is_said_as_load_says_it(tmp_path: Path, changes: dict[str, Any]) -> None:
    folder = write_checkpoint(tmp_path)
    (folder / "config.json").write_text(json.dumps(tiny_config(**changes)))
    with pytest.raises(ConfigError) as said:
        facts(folder)
    with pytest.raises(Glm4liteError) as loading:
        load(folder)
    assert str(said.value) == str(loading.value)


def test_texts_of_a_checkpoint_cannot_write_to_the_terminal(tmp_path: Path) -> None:
    title = "\x1b]0;title\x07"
    folder = write_checkpoint(tmp_path / "texts", tiny_config(architectures=[title], transformers_version=title))
    assert all(value.isprintable() for value in facts(folder).values())
    with pytest.raises(ConfigError, match="dtype must be the name of a") as refused:
        facts(write_checkpoint(tmp_path / "type", tiny_config(torch_dtype=title)))
    assert str(refused.value).isprintable()


def test_info_gives_no_notices(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    facts(write_checkpoint(tmp_path, tiny_config(intermediate_size=100)))
    assert caplog.messages == []


def test_progress_reaches_the_download(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path)
    given: list[object] = []

    def resolve(source: str, progress: object = None, hub: object = None) -> Path:
        given.append(progress)
        return folder

    monkeypatch.setattr("glm4lite.checkpoint.prepare.resolve", resolve)
    info.model_facts("org/name", given.append)
    assert given == [given.append]
