"""Reading checkpoints: names, rows, maps, shards, legacy names. What damaged ones get is in test_bad_checkpoints.py."""

import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from glm4lite.base.errors import CheckpointError
from glm4lite.checkpoint.checkpoint import Checkpoint
from glm4lite.checkpoint.shard import read_header
from tests.glm4lite.checkpoints import legacy_checkpoint, tiny_config, tiny_tensors, write_checkpoint


@pytest.mark.parametrize("shards", [1, 2, 5])
def test_every_tensor_is_read_and_mapped_as_it_was_written(tmp_path: Path, shards: int) -> None:
    tensors = tiny_tensors(tiny_config())
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path / "model", tensors=tensors, shards=shards))
    assert set(checkpoint.names()) == set(tensors)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name, expected in tensors.items():
            assert checkpoint.shape(name) == tuple(expected.shape)
            assert checkpoint.dtype(name) == "BF16"
            assert torch.equal(checkpoint.tensor(name), expected)
            assert torch.equal(checkpoint.mapped(name), expected)


def test_two_shards_split_a_layer(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path, tiny_config(num_hidden_layers=1), shards=3))
    files = {checkpoint.file(name).name for name in checkpoint.names() if ".layers.0." in name}
    assert len(files) > 1


def test_rows_read_only_the_rows_asked_for(tmp_path: Path) -> None:
    tensors = tiny_tensors(tiny_config())
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path, tensors=tensors))
    expected = tensors["lm_head.weight"]
    assert torch.equal(checkpoint.rows("lm_head.weight", 7, 23), expected[7:23])
    assert checkpoint.rows("lm_head.weight", 5, 5).shape == (0, 64)
    with pytest.raises(CheckpointError, match=r"lm_head.weight in .* has shape \[400, 64\]: no rows 390 to 401"):
        checkpoint.rows("lm_head.weight", 390, 401)


def test_row_blocks_cover_the_matrix_in_multiples_of_sixteen(tmp_path: Path) -> None:
    tensors = tiny_tensors(tiny_config(vocab_size=403))
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path, tiny_config(vocab_size=403), tensors))
    blocks = list(checkpoint.row_blocks("lm_head.weight", max_bytes=64 * 2 * 40))
    assert [start for start, _ in blocks] == list(range(0, 403, 32))
    assert torch.equal(torch.cat([rows for _, rows in blocks]), tensors["lm_head.weight"])


def test_a_write_to_a_mapped_tensor_does_not_reach_the_file(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path)
    Checkpoint.open(folder).mapped("model.norm.weight").zero_()
    assert Checkpoint.open(folder).tensor("model.norm.weight").abs().min() > 0


def test_mapped_tensors_outlive_the_checkpoint(tmp_path: Path) -> None:
    tensors = tiny_tensors(tiny_config())
    mapped = Checkpoint.open(write_checkpoint(tmp_path, tensors=tensors)).mapped("lm_head.weight")
    assert torch.equal(mapped, tensors["lm_head.weight"])


def test_an_unaligned_tensor_is_read_instead_of_mapped(tmp_path: Path) -> None:
    odd = {"a": torch.arange(3, dtype=torch.uint8), "b": torch.randn(5, generator=torch.Generator().manual_seed(0))}
    write_checkpoint(tmp_path, tensors=odd, shards=1)
    path = tmp_path / "model.safetensors"
    entries = (
        '{"a":{"dtype":"U8","shape":[3],"data_offsets":[0,3]},"b":{"dtype":"F32","shape":[5],"data_offsets":[3,23]}}'
    )
    data = bytes([0, 1, 2]) + odd["b"].numpy().tobytes()
    path.write_bytes(len(entries).to_bytes(8, "little") + entries.encode() + data)
    checkpoint = Checkpoint.open(tmp_path)
    assert torch.equal(checkpoint.mapped("b"), odd["b"])


@pytest.mark.parametrize("bias", [True, False])
def test_legacy_names_and_fused_rows_become_todays(tmp_path: Path, bias: bool) -> None:
    config = tiny_config(model_type="glm", attention_bias=bias, num_key_value_heads=1)
    tensors = tiny_tensors(config)
    checkpoint = Checkpoint.open(legacy_checkpoint(tmp_path, config, tensors))
    assert set(checkpoint.names()) == set(tensors)  # the rotary buffer is gone
    for name, expected in tensors.items():
        assert torch.equal(checkpoint.tensor(name), expected), name


def test_a_missing_generation_config_is_empty(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path)
    assert Checkpoint.open(folder).generation_config["pad_token_id"] == 370
    (folder / "generation_config.json").unlink()
    assert Checkpoint.open(folder).generation_config == {}


def test_scalars_and_empty_tensors_are_read(tmp_path: Path) -> None:
    save_file({"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.tensor("scalar").item() == 2.5
    assert checkpoint.tensor("empty").shape == (0, 4)


def test_a_shard_may_be_a_link_as_in_the_hub_cache(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "snapshot")
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for shard in sorted(folder.glob("*.safetensors")):
        shard.rename(blobs / shard.name)
        shard.symlink_to(blobs / shard.name)
    assert Checkpoint.open(folder).tensor("model.norm.weight").shape == (64,)
    assert read_header(folder / "model-00001-of-00002.safetensors")
