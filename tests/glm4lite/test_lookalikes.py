"""Files and folders that are something else than a checkpoint: the message names the cause and what helps."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from glm4lite.base.errors import Glm4liteError
from glm4lite.checkpoint.checkpoint import Checkpoint
from glm4lite.loading.plan_report import plan
from glm4lite.pretrained.load import load
from glm4lite.text.tokenizer import Tokenizer
from tests.glm4lite.checkpoints import tiny_config, tiny_tensors, write_checkpoint

SHARD = "model-00001-of-00002.safetensors"

STARTS: dict[bytes, str] = {
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4983000000\n": "git-lfs pointer.*git lfs pull",
    b"# xet version 0\nfilesize = 4983000000\nhash = '0'\n": "git-xet pointer",
    b"/annex/objects/SHA256E-s4983000000--0.safetensors\n": "git-annex pointer.*git annex get",
    b"<!DOCTYPE html><html>Not found</html>": "web page",
    b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>': "web page",
    b"Access to model zai-org/x is restricted.": "server's refusal",
    b'{"error":"Repository not found"}': "server's refusal",
    b"": "is empty",
    b"\0" * 4096: "begins with zeros",
    b"PK\x03\x04" + b"\0" * 60: "zip archive",
    b"\x80\x02}q\x00X": "pickle file",
    b"GGUF\x03\0\0\0" + b"\0" * 60: "GGUF file",
    b"\x1f\x8b\x08\0" + b"\0" * 60: "compressed archive",
    b"x" * 257 + b"ustar" + b"\0" * 60: "tar archive",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "tiny")


def read(folder: Path) -> None:
    Checkpoint.open(folder)
    Tokenizer.from_folder(folder)


def refused(folder: Path) -> str:
    """The message that reading a folder as a checkpoint gives, in one line."""
    with pytest.raises(Glm4liteError) as caught:
        Checkpoint.open(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(str(folder), "DIR")


@pytest.mark.parametrize("start", STARTS)
def test_a_shard_that_is_something_else_is_named_as_what_it_is(folder: Path, start: bytes) -> None:
    (folder / SHARD).write_bytes(start)
    message = refused(folder)
    assert message.startswith(f"DIR/{SHARD} is ")
    with pytest.raises(Glm4liteError, match=STARTS[start]):
        load(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_a_json_file_that_is_a_pointer_is_named_as_one(folder: Path, name: str) -> None:
    (folder / name).write_bytes(next(iter(STARTS)))
    assert refused(folder).startswith(f"DIR/{name} is a git-lfs pointer, not the file itself; ")


@pytest.mark.parametrize("start", [start for start in STARTS if start[:1] not in (b"x", b"{")])
def test_a_tokenizer_that_is_something_else_is_named_as_what_it_is(folder: Path, start: bytes) -> None:
    (folder / "tokenizer.json").write_bytes(start)
    with pytest.raises(Glm4liteError, match=rf"tokenizer.json is .*{STARTS[start].removeprefix('is ')}"):
        Tokenizer.from_folder(folder)


@pytest.mark.parametrize("name", [SHARD, "config.json", "model.safetensors.index.json", "tokenizer.json"])
def test_a_link_that_leads_nowhere_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    (folder / name).symlink_to("../../blobs/0123")
    with pytest.raises(Glm4liteError, match=rf"{name} is a link to a file that is not here; .*cp -rL"):
        read(folder)
    (folder / name).unlink()
    (folder / name).symlink_to("../.git/annex/objects/a/b")
    with pytest.raises(Glm4liteError, match="git annex get"):
        read(folder)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
@pytest.mark.parametrize("name", [SHARD, "config.json", "model.safetensors.index.json", "tokenizer.json"])
def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(folder: Path, name: str) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(Glm4liteError, match=rf"{name} cannot be read: it is not a regular file"):
        read(folder)


def adapter(folder: Path, **fields: object) -> None:
    for file in folder.glob("model*"):
        file.unlink()
    save_file({"base_model.model.lm_head.lora_A.weight": torch.zeros(8, 64)}, folder / "adapter_model.safetensors")
    written = {"peft_type": "LORA", "base_model_name_or_path": "zai-org/GLM-4-9B-0414"} | fields
    (folder / "adapter_config.json").write_text(json.dumps(written))


@pytest.mark.parametrize("with_config", [True, False])
def test_an_adapter_is_named_with_its_base_and_how_it_is_used(folder: Path, with_config: bool) -> None:
    adapter(folder)
    if not with_config:
        (folder / "config.json").unlink()
    assert refused(folder) == (
        "DIR holds a LoRA adapter of zai-org/GLM-4-9B-0414, not a model; give that model, and the adapter as --lora DIR"
    )
    with pytest.raises(Glm4liteError, match="holds a LoRA adapter"):
        plan(str(folder))


def test_an_adapters_words_are_not_written_to_the_terminal(folder: Path) -> None:
    adapter(folder, peft_type="\x1b[2J\n", base_model_name_or_path="\x1b[2J")
    assert "\x1b" not in refused(folder)
    (folder / "adapter_config.json").write_text("{")
    assert "adapter of another model" in refused(folder)


def test_an_adapter_beside_a_whole_model_is_left_out_with_a_word(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "adapter_config.json").write_text("{}")
    load(folder)
    assert "adapter_config.json is not used" in caplog.text


def test_a_folder_of_other_weights_alone_is_named(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    assert "weights (which can run code when opened): pytorch_model.bin" in refused(tmp_path)


@pytest.mark.parametrize("name", [f"{SHARD}.incomplete", f"{SHARD}.part", ".cache/huggingface/download/abc.incomplete"])
def test_a_download_that_was_not_finished_is_named(folder: Path, name: str) -> None:
    (folder / SHARD).unlink()
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(b"")
    assert f"lacks {SHARD}, named by model.safetensors.index.json (its download was not finished: " in refused(folder)
    (folder / "model.safetensors.index.json").unlink()
    assert refused(folder).startswith("DIR holds a download that was not finished (")


def test_shards_without_their_index_are_named(folder: Path) -> None:
    (folder / "model.safetensors.index.json").unlink()
    assert refused(folder).startswith("DIR lacks model.safetensors.index.json, which tells what lies in model-00001-of")


def test_a_single_file_of_another_name_is_to_be_renamed(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "tiny", shards=1)
    (folder / "model.safetensors").rename(folder / "glm.safetensors")
    assert refused(folder) == (
        "DIR holds glm.safetensors, but a file of all weights is read as model.safetensors; rename it"
    )


def test_the_folder_above_checkpoints_names_them(folder: Path) -> None:
    shutil.copytree(folder, folder / "checkpoint-500")
    for file in folder.glob("*.*"):
        file.unlink()
    assert refused(folder) == ("DIR is no checkpoint itself, but DIR/checkpoint-500 may be; give such a folder")


def test_the_hubs_cache_and_a_repositorys_folder_in_it_give_the_id(folder: Path) -> None:
    cache = folder.parent / "hub"
    snapshot = cache / "models--zai-org--GLM-4-9B-0414" / "snapshots" / "0123"
    shutil.copytree(folder, snapshot)
    assert refused(cache) == "DIR is a cache of the Hub's models; give the id of one: zai-org/GLM-4-9B-0414"
    assert refused(snapshot.parent.parent) == (
        "DIR is the Hub cache's folder of zai-org/GLM-4-9B-0414; give that id, or DIR/snapshots/0123"
    )


# --- an index that lists what no model needs


def edit_index(folder: Path, **weight_map: str) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] |= weight_map
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    "name", ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.visual.patch.weight", "mtp.0.weight", "anything"]
)
def test_a_listed_tensor_that_no_shard_holds_and_no_model_needs_is_no_matter(folder: Path, name: str) -> None:
    edit_index(folder, **{name: SHARD})
    assert load(folder)


@pytest.mark.parametrize("with_shard", [True, False])
def test_a_tied_head_may_be_listed_and_left_out(tmp_path: Path, with_shard: bool) -> None:
    config = tiny_config(tie_word_embeddings=True)
    folder = write_checkpoint(tmp_path / "tied", config, tiny_tensors(config))
    edit_index(folder, **{"lm_head.weight": SHARD if with_shard else "model-00003-of-00003.safetensors"})
    model = load(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_tied_head_may_be_the_one_name_that_is_stored(tmp_path: Path) -> None:
    config = tiny_config(tie_word_embeddings=True)
    tensors = tiny_tensors(config)
    folder = write_checkpoint(tmp_path / "embedding", config, tensors, shards=1)
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    other = write_checkpoint(tmp_path / "head", config, tensors, shards=1)
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(load(folder)(ids).logits, load(other)(ids).logits)


def test_a_listed_tensor_that_the_model_needs_is_refused_with_its_shard(folder: Path) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shard = folder / index["weight_map"][name]
    tensors = load_file(shard)
    del tensors[name]
    save_file(tensors, shard)
    with pytest.raises(Glm4liteError, match=rf"index.json puts {name} in {shard.name}, which lacks it; download both"):
        load(folder)


def test_parts_that_see_or_predict_ahead_are_left_out_with_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = tiny_config(num_nextn_predict_layers=1)
    more = {f"{name}.weight": torch.zeros(4) for name in ("model.visual.norm", "mtp.fc", "model.layers.2.eh_proj")}
    folder = write_checkpoint(tmp_path / "more", config, tiny_tensors(config) | more, shards=1)
    load(folder)
    assert "model.layers.2.eh_proj.weight, model.visual.norm.weight, mtp.fc.weight is not used" in caplog.text
    (folder / "config.json").write_text(json.dumps(tiny_config()))
    with pytest.raises(Glm4liteError, match=r"holds model.layers.2.eh_proj.weight .* does not have"):
        load(folder)
