"""save_pretrained: what both libraries open again, in place of an older checkpoint whole or not at all."""

from __future__ import annotations

import errno
import inspect
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from glm4lite import Glm4Config, Glm4ForCausalLM, Glm4ForSequenceClassification, Glm4Model
from glm4lite.base.errors import CheckpointError, ConfigError
from glm4lite.checkpoint.shard import read_header
from glm4lite.pretrained.load import load
from glm4lite.pretrained.models import Glm4ForTokenClassification
from glm4lite_quant import BnbConfig
from tests.commands import python
from tests.glm4lite.checkpoints import tiny_config, tiny_tensors, write_checkpoint
from tests.glm4lite.test_parity import pair, relative_error, tokens

transformers = pytest.importorskip("transformers", reason="transformers is the oracle (test extra)")

IDS = torch.tensor([[372, 374, 377, 10, 65, 70, 378]])
INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "tiny")


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    return model.eval()(ids)[0].float()


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# --- what is written


@pytest.mark.parametrize("size", ["5GB", "40KB"])
@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"model_type": "glm"}], ids=str)
@pytest.mark.parametrize("head", ["ForCausalLM", "ForSequenceClassification", "ForTokenClassification"])
def test_transformers_opens_it_and_computes_the_same(
    tmp_path: Path, head: str, changes: dict[str, Any], size: str
) -> None:
    ours, oracle = pair(head, num_labels=3, **changes)
    ours.save_pretrained(tmp_path / "ours", max_shard_size=size)
    oracle.save_pretrained(tmp_path / "theirs", max_shard_size=size)
    again, info = type(oracle).from_pretrained(tmp_path / "ours", attn_implementation="eager", output_loading_info=True)
    assert not any(info.values())
    assert again.dtype == torch.float32
    assert torch.equal(logits(again, tokens()), logits(oracle, tokens()))
    found, wanted = again.config.to_dict(), oracle.config.to_dict()
    assert {name: found[name] for name in wanted if name != "_name_or_path"} == {
        name: value for name, value in wanted.items() if name != "_name_or_path"
    }
    mine, _ = type(ours).from_pretrained(tmp_path / "ours", output_loading_info=True)
    theirs = type(ours).from_pretrained(tmp_path / "theirs")
    assert torch.equal(logits(mine, tokens()), logits(ours, tokens()))
    assert torch.equal(logits(theirs, tokens()), logits(ours, tokens()))
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert config["architectures"] == [type(oracle).__name__]
    assert config["dtype"] == "float32"
    assert (INDEX in files(tmp_path / "ours")) == (INDEX in files(tmp_path / "theirs")) == (size == "40KB")
    assert names(tmp_path / "ours") == names(tmp_path / "theirs")


def names(folder: Path) -> set[str]:
    """Of all stored tensors."""
    return {name for path in folder.glob("*.safetensors") for name in read_header(path)}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_values_and_type_stay(folder: Path, tmp_path: Path, dtype: str) -> None:
    model = load(folder, dtype=dtype)
    model.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert again.dtype == model.dtype
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    oracle = transformers.Glm4ForCausalLM.from_pretrained(tmp_path / "saved")
    assert str(oracle.dtype) == f"torch.{dtype}"
    if dtype == "float32":
        assert relative_error(logits(oracle), logits(model)) < 1e-5


def test_the_trunk_is_saved_as_transformers_saves_it(folder: Path, tmp_path: Path) -> None:
    model = Glm4Model.from_pretrained(folder, dtype="float32")
    model.save_pretrained(tmp_path / "trunk")
    oracle = transformers.Glm4Model.from_pretrained(tmp_path / "trunk")
    oracle.save_pretrained(tmp_path / "theirs")
    assert names(tmp_path / "trunk") == names(tmp_path / "theirs")
    assert relative_error(logits(oracle), logits(model)) < 1e-5
    assert torch.equal(logits(Glm4Model.from_pretrained(tmp_path / "trunk")), logits(model))
    assert json.loads((tmp_path / "trunk" / "config.json").read_text())["architectures"] == ["Glm4Model"]


def test_shards_are_no_larger_than_asked_for(folder: Path, tmp_path: Path) -> None:
    model = load(folder)
    model.save_pretrained(tmp_path / "saved", max_shard_size=40_000)
    index = json.loads((tmp_path / "saved" / INDEX).read_text())
    assert set(index["weight_map"].values()) == {path.name for path in (tmp_path / "saved").glob("*.safetensors")}
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in model.state_dict().values())
    for path in (tmp_path / "saved").glob("*.safetensors"):
        header = read_header(path)
        assert len(header) == 1 or sum(tensor.nbytes for tensor in header.values()) <= 40_000
    wrong: Any
    for wrong in (0, "5 elephants", "5", 2.5, True):
        with pytest.raises(ConfigError, match=r"max_shard_size|is not a size|has no unit"):
            model.save_pretrained(tmp_path / "saved", max_shard_size=wrong)


def test_what_generate_is_set_to_is_saved(folder: Path, tmp_path: Path) -> None:
    stored = json.loads((folder / "generation_config.json").read_text())
    model = load(folder)
    model.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "generation_config.json").read_text()) == stored
    model.generation_config.max_new_tokens = 7
    model.save_pretrained(tmp_path / "saved")
    assert transformers.GenerationConfig.from_pretrained(tmp_path / "saved").max_new_tokens == 7
    assert load(tmp_path / "saved").generation_config.max_new_tokens == 7
    Glm4ForSequenceClassification(model.config).save_pretrained(tmp_path / "head")
    assert files(tmp_path / "head") == {"config.json", "model.safetensors"}


def test_a_trained_head_comes_back(folder: Path, tmp_path: Path) -> None:
    model = Glm4ForTokenClassification.from_pretrained(folder, dtype="float32", num_labels=3)
    model.config.id2label = {0: "O", 1: "B", 2: "I"}
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(IDS, labels=IDS % 3).loss.backward()
    optimizer.step()
    model.save_pretrained(tmp_path / "saved")
    for cls in (Glm4ForTokenClassification, transformers.Glm4ForTokenClassification):
        again = cls.from_pretrained(tmp_path / "saved")
        assert again.config.id2label == {0: "O", 1: "B", 2: "I"}
        assert relative_error(logits(again), logits(model)) < 1e-5


@pytest.mark.parametrize("double", [False, True], ids=["plain", "double"])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_bitsandbytes_layers_are_saved_as_it_stores_them(tmp_path: Path, kind: str, double: bool) -> None:
    pytest.importorskip("bitsandbytes")
    folder = write_checkpoint(tmp_path / "tiny", tiny_config(intermediate_size=128))
    model = load(folder, quant=BnbConfig(kind, double))
    model.save_pretrained(tmp_path / "saved", max_shard_size="40KB")
    again = load(tmp_path / "saved")
    assert torch.equal(logits(again), logits(model))
    assert again.dtype == model.dtype
    again.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(load(tmp_path / "saved")), logits(model))
    without = load(tmp_path / "saved", quant="none")
    assert relative_error(logits(without), logits(model)) < 0.05
    without.save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    assert torch.equal(logits(load(tmp_path / "plain")), logits(without))


@pytest.mark.parametrize("quant", [None, "none", "int4"])
def test_a_damaged_int8_head_beside_bitsandbytes_layers_is_named(tmp_path: Path, quant: str | None) -> None:
    pytest.importorskip("bitsandbytes")
    folder = write_checkpoint(tmp_path / "tiny", tiny_config(intermediate_size=128))
    load(folder, quant="nf4").save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.scales"] = tensors["lm_head.scales"][:1].clone()
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lm_head\..* in .*model.safetensors.*scales has shape"):
        load(folder, quant=quant)


def test_transformers_opens_its_own_4_bit_checkpoint_saved_again(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("accelerate", reason="Transformers quantizes only with accelerate")
    source = write_checkpoint(tmp_path / "source", tiny_config(intermediate_size=128))
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    oracle = transformers.Glm4ForCausalLM.from_pretrained(source, quantization_config=config, device_map="cpu")
    oracle.save_pretrained(tmp_path / "theirs")
    load(tmp_path / "theirs").save_pretrained(tmp_path / "ours")
    assert names(tmp_path / "ours") == names(tmp_path / "theirs")
    again = transformers.Glm4ForCausalLM.from_pretrained(tmp_path / "ours", device_map="cpu")
    assert relative_error(logits(again), logits(oracle)) < 0.02


# --- where it is written


def test_other_files_stay_and_older_weights_go(folder: Path, tmp_path: Path) -> None:
    model = load(folder)
    saved = tmp_path / "saved"
    model.save_pretrained(saved, max_shard_size="40KB")
    kept = {"notes.txt", "tokenizer.json", "checkpoint-5", "pytorch_model.bin", "model-of-mine.safetensors"}
    for name in kept - {"checkpoint-5"}:
        (saved / name).write_text(name)
    (saved / "checkpoint-5").mkdir()
    (saved / "checkpoint-5" / "model.safetensors").write_text("x")
    sharded = files(saved)
    model.save_pretrained(saved)
    assert files(saved) == kept | {"config.json", "generation_config.json", "model.safetensors"}
    assert torch.equal(logits(load(saved)), logits(model))
    model.save_pretrained(saved, max_shard_size="40KB")
    assert files(saved) == sharded
    assert torch.equal(logits(load(saved)), logits(model))
    assert all((saved / name).read_text() == name for name in kept - {"checkpoint-5"})


@pytest.mark.parametrize("quant", [None, "int4", "int8"])
def test_a_model_is_saved_over_the_files_it_is_mapped_from(folder: Path, quant: str | None) -> None:
    load(folder, quant=quant).save_pretrained(folder, max_shard_size="40KB")
    model = load(folder)
    wanted = logits(model)
    for size in ("5GB", "30KB", "5GB"):
        model.save_pretrained(folder, max_shard_size=size)
        assert torch.equal(logits(model), wanted)
        assert torch.equal(logits(load(folder)), wanted)


def test_the_current_folder_and_a_link_to_one_are_written_to(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(folder)
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    model.save_pretrained(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    monkeypatch.chdir(tmp_path / "real")
    model.save_pretrained(".")
    model.save_pretrained("new/inner")
    for place in (".", "new/inner"):
        assert torch.equal(logits(load(place)), logits(model))


def test_a_linked_file_is_replaced_and_what_it_leads_to_stays(folder: Path, tmp_path: Path) -> None:
    """As in the Hub's cache, where snapshots are links."""
    model = load(folder)
    (tmp_path / "blob").write_bytes(b"of another program")
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "model.safetensors").symlink_to(tmp_path / "blob")
    model.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "blob").read_bytes() == b"of another program"
    assert torch.equal(logits(load(tmp_path / "saved")), logits(model))


def test_where_nothing_can_be_written_is_one_line(folder: Path, tmp_path: Path) -> None:
    model = load(folder)
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="file is a file; choose a folder"):
        model.save_pretrained(tmp_path / "file")
    with pytest.raises(CheckpointError, match="cannot be written"):
        model.save_pretrained(tmp_path / "file" / "inner")
    (tmp_path / "taken" / "config.json").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="cannot be written"):
        model.save_pretrained(tmp_path / "taken")
    assert files(tmp_path / "taken") == {"config.json"}


# --- what goes wrong on the way


def other_model() -> Glm4ForCausalLM:
    """Of another size, and of other weights, than the folder's."""
    torch.manual_seed(1)
    return Glm4ForCausalLM(Glm4Config(**tiny_config(num_hidden_layers=1))).bfloat16().eval()


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), OSError(errno.ENOSPC, "full")], ids=["Ctrl-C", "disk full"])
def test_whatever_interrupts_the_exchange_leaves_the_old_files(
    folder: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    """Interrupted before, and right after, each of its steps."""
    wanted, before = logits(load(folder)), {path.name: path.read_bytes() for path in folder.iterdir()}
    model, replace, steps = other_model(), os.replace, 0

    def interrupted(at: int, after: bool) -> Callable[[Any, Any], None]:
        def step(source: Any, target: Any) -> None:
            nonlocal steps
            steps += 1
            if steps == at and not after:
                raise failure
            replace(source, target)
            if steps == at:
                raise failure

        return step

    moves = 4 + 3  # config, generation config, index and two shards make room for config, generation config, weights
    for at in range(1, moves + 2):
        for after in (False, True):
            steps = 0
            with monkeypatch.context() as patch:
                patch.setattr("glm4lite.checkpoint.replacing.os.replace", interrupted(at, after))
                with pytest.raises((KeyboardInterrupt, CheckpointError)):
                    model.save_pretrained(folder)
            assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert torch.equal(logits(load(folder)), wanted)


KILLED = """
import os, sys
from glm4lite.checkpoint import replacing
from tests.glm4lite.test_save_pretrained import other_model

model, replace, steps = other_model(), os.replace, 0

def step(source, target):
    global steps
    steps += 1
    if steps > int(os.environ["STEPS"]):
        os._exit(9)
    replace(source, target)

for steps_before in range(9):
    if os.fork() == 0:
        os.environ["STEPS"] = str(steps_before)
        os.replace = step
        model.save_pretrained(f"{sys.argv[1]}-{steps_before}")
        os._exit(0)
    os.wait()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_a_save_that_is_killed_leaves_old_or_new_or_what_nobody_reads(folder: Path) -> None:
    old, new = logits(load(folder)), logits(other_model())
    for steps in range(9):
        shutil.copytree(folder, f"{folder}-{steps}")
    root = Path(__file__).parents[2]
    subprocess.run([*python(), "-c", KILLED, str(folder)], check=True, timeout=120, cwd=root)
    found = []
    for steps in range(9):
        place = Path(f"{folder}-{steps}")
        try:
            seen = logits(load(place))
            found.append("old" if torch.equal(seen, old) else "new")
            assert torch.equal(seen, old if found[-1] == "old" else new)
        except CheckpointError as error:
            assert f"a save into {place} was not finished; save the model again" in str(error)  # noqa: PT017
            found.append("refused")
        other_model().save_pretrained(place)  # and what was left of it goes
        assert torch.equal(logits(load(place)), new)
        assert not list(place.glob(".*"))
    assert found == ["old", *["refused"] * 7, "new"]


def test_a_disk_that_fills_up_leaves_the_old_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    model, written = load(folder), 0

    def write(descriptor: int, data: Any) -> int:
        nonlocal written
        written += len(data)
        if written > 50_000:
            raise OSError(errno.ENOSPC, "full")
        return len(data)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", write)
        with pytest.raises(CheckpointError, match="the disk is full"):
            model.save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


# --- what is asked for


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"push_to_hub": True}, "push_to_hub=True is not supported: save, then run `hf upload`"),
        ({"safe_serialization": False}, "only safetensors are written, since pickle files can run code"),
        ({"variant": "fp16"}, "variant='fp16' is not supported"),
        ({"token": "hf_x"}, "token is not supported: nothing is sent to the Hub"),
        ({"distributed_checkpoint": True}, "distributed_checkpoint=True is not supported"),
        ({"max_shard_sice": "5GB"}, "save_pretrained knows no 'max_shard_sice'; did you mean 'max_shard_size'?"),
    ],
    ids=str,
)
def test_what_is_not_there_is_refused_before_anything_is_written(
    folder: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")) as caught:
        load(folder).save_pretrained(tmp_path / "saved", **options)
    assert "hf_x" not in str(caught.value)
    assert not (tmp_path / "saved").exists()


def test_what_asks_for_nothing_else_is_taken(folder: Path, tmp_path: Path) -> None:
    model = load(folder)
    model.save_pretrained(tmp_path / "saved", safe_serialization=True, variant=None, token=None, save_peft_format=False)
    assert load(tmp_path / "saved")
    own = set(inspect.signature(transformers.PreTrainedModel.save_pretrained).parameters)
    for name in own - {"self", "kwargs", "save_directory", "is_main_process", "state_dict", "max_shard_size"}:
        nothing: dict[str, Any] = {name: None}
        model.save_pretrained(tmp_path / "saved", is_main_process=False, **nothing)


def test_another_process_writes_nothing(folder: Path, tmp_path: Path) -> None:
    load(folder).save_pretrained(tmp_path / "saved", is_main_process=False)
    assert not (tmp_path / "saved").exists()


def test_pushing_names_the_command_that_does_it(folder: Path) -> None:
    with pytest.raises(ConfigError, match="call save_pretrained\\(folder\\), then run `hf upload org/mine folder`"):
        load(folder).push_to_hub("org/mine", private=True)


@pytest.mark.parametrize("tied", [False, True])
def test_a_state_dict_is_saved_instead_of_the_models_own(tmp_path: Path, tied: bool) -> None:
    config = tiny_config(tie_word_embeddings=tied)
    model = load(write_checkpoint(tmp_path / "tiny", config))
    twice = {name: 2 * value for name, value in model.state_dict().items()}
    model.save_pretrained(tmp_path / "saved", state_dict=twice)
    for name, value in load(tmp_path / "saved").state_dict().items():
        assert torch.equal(value, twice[name]), name
    part = dict(list(twice.items())[3:])
    for wrong, message in (
        (part, "state_dict lacks model.embed_tokens.weight"),
        (twice | {"other": torch.zeros(1)}, "state_dict holds, unlike the model, other; give the whole model's"),
        (twice | {"model.norm.weight": torch.zeros(1)}, r"state_dict has another shape of model.norm.weight"),
        (twice | {"model.norm.weight": torch.zeros(64).half()}, r"as torch.float16; use bfloat16 or float32"),
        (twice | {"model.norm.weight": [1.0]}, "state_dict must hold tensors"),
    ):
        with pytest.raises(CheckpointError, match=message):
            model.save_pretrained(tmp_path / "saved", state_dict=wrong)
    quantized = load(tmp_path / "tiny", quant="int8")
    with pytest.raises(CheckpointError, match="a state_dict is given for a quantized model; leave it out"):
        quantized.save_pretrained(tmp_path / "saved", state_dict=twice)


def test_a_head_that_is_no_longer_the_embedding_is_not_lost(tmp_path: Path) -> None:
    model = load(write_checkpoint(tmp_path / "tiny", tiny_config(tie_word_embeddings=True)))
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight * 2)
    with pytest.raises(CheckpointError, match=r"head and embedding differ: call tie_weights\(\), or set it to False"):
        model.save_pretrained(tmp_path / "saved")
    wanted, model.config.tie_word_embeddings = logits(model), False
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(load(tmp_path / "saved")), wanted)


def test_a_model_without_values_is_not_saved(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = Glm4ForCausalLM(Glm4Config(**tiny_config()))
    with pytest.raises(CheckpointError, match="has no values: the model lies on the meta device"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_a_resized_vocabulary_is_saved(tmp_path: Path) -> None:
    model = load(write_checkpoint(tmp_path / "tiny", tiny_config(), tiny_tensors(tiny_config())))
    model.resize_token_embeddings(416)
    model.save_pretrained(tmp_path / "saved")
    assert load(tmp_path / "saved").config.vocab_size == 416
    assert torch.equal(logits(load(tmp_path / "saved")), logits(model))
