"""`glm4lite export`: what other tools read of a folder or file is what was meant, whatever the source is stored as."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import pytest
import torch
from torch import Tensor

from glm4lite.base.errors import CheckpointError, ConfigError, Glm4liteError
from glm4lite.base.events import Progress
from glm4lite.checkpoint.checkpoint import Checkpoint
from glm4lite.checkpoint.formats.registry import open_source
from glm4lite.checkpoint.prepare import prepare
from glm4lite.checkpoint.quantize import quantize_checkpoint
from glm4lite.export import export, gguf_metadata
from glm4lite.export.export import export_checkpoint
from glm4lite.hub.sources import nano_folder
from glm4lite.model.causal_lm import CausalLM
from glm4lite.pretrained.load import load
from glm4lite.text.tokenizer import Tokenizer
from glm4lite_quant import QuantConfig
from tests.commands import run
from tests.glm4lite.checkpoints import legacy_checkpoint, tiny_config, tiny_tensors, write_checkpoint
from tests.glm4lite.gguf_files import ggml_name
from tests.glm4lite.packed import write_packed
from tests.glm4lite.test_imports import LAYOUTS

IDS = torch.tensor([[1, 2, 3, 50, 60, 7, 300]])
STEM = "model.layers.1.mlp.down_proj"
CONFIG = tiny_config(intermediate_size=128)
COMPANIONS = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "home"))


class Made(NamedTuple):
    """A bfloat16 folder, the same quantized by glm4lite, and their exports."""

    source: Path
    int4: Path
    compressed: Path
    q4_1: Path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    root = tmp_path_factory.mktemp("export")
    source = write_checkpoint(root / "tiny", CONFIG)
    return Made(
        source,
        quantize_checkpoint(source, root / "int4", QuantConfig(4, method="search")),
        export_checkpoint(source, root / "compressed", "compressed-tensors"),
        export_checkpoint(source, root / "tiny.gguf", "gguf"),
    )


def values(source: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, decoded."""
    checkpoint = prepare(open_source(source), "none", CausalLM).checkpoint
    return {name: checkpoint.tensor(name).float() for name in checkpoint.names()}


@torch.no_grad()
def logits(source: Path, **arguments: Any) -> Tensor:
    return load(source, **arguments)(IDS).logits.float()


def lost(found: dict[str, Tensor], source: dict[str, Tensor], part: str = "") -> float:
    """The largest relative error of a matrix."""
    assert found.keys() == source.keys()
    names = [name for name, tensor in source.items() if tensor.dim() == 2 and part in name]
    return max(float((found[name] - source[name]).norm() / source[name].norm()) for name in names)


# --- bfloat16


@pytest.mark.parametrize("model_type", ["glm4", "glm"])
def test_a_bfloat16_folder_is_transformers_own(tmp_path: Path, model_type: str) -> None:
    transformers = pytest.importorskip("transformers")
    config = tiny_config(
        model_type=model_type, architectures=None, torch_dtype="float32", auto_map={"AutoModel": "x.Y"}
    )
    source = write_checkpoint(tmp_path / "tiny", config, tiny_tensors(config, dtype=torch.float32))
    folder = export_checkpoint(source, tmp_path / "out", "hf")
    written = json.loads((folder / "config.json").read_text())
    assert written["torch_dtype"] == "bfloat16"
    assert "auto_map" not in written
    for name in COMPANIONS:
        assert (folder / name).read_bytes() == (source / name).read_bytes()
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert type(model).__name__ == {"glm4": "Glm4ForCausalLM", "glm": "GlmForCausalLM"}[model_type]
    assert model.dtype == torch.bfloat16
    assert not any(info.values())
    for name, tensor in tiny_tensors(config, dtype=torch.float32).items():
        assert torch.equal(model.state_dict()[name], tensor.bfloat16())


def test_a_legacy_checkpoint_becomes_one_of_today(tmp_path: Path) -> None:
    config = tiny_config(model_type="glm")
    source = legacy_checkpoint(tmp_path / "legacy", config, tiny_tensors(config))
    folder = export_checkpoint(source, tmp_path / "out", "hf")
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["GlmForCausalLM"]
    assert torch.equal(logits(folder), logits(source))


# --- compressed-tensors


def test_transformers_decodes_compressed_tensors_as_it_was_meant(made: Made) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("compressed_tensors")
    model = transformers.AutoModelForCausalLM.from_pretrained(made.compressed, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(
            model(IDS).logits, logits(made.compressed, quant="none", dtype="float32"), rtol=1e-4, atol=1e-5
        )
    found, source = values(made.compressed), values(made.source)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, found[name], rtol=0, atol=1e-6)
    assert 0.02 < lost(found, source) < 0.1
    assert torch.equal(found["lm_head.weight"], source["lm_head.weight"])


def test_vllms_conditions_are_met(made: Made) -> None:
    config = json.loads((made.compressed / "config.json").read_text())["quantization_config"]
    (scheme,) = config["config_groups"].values()
    assert scheme["targets"] == ["Linear"]
    assert config["ignore"] == ["lm_head"]
    checkpoint = Checkpoint.open(made.compressed)
    assert checkpoint.shape(f"{STEM}.weight_packed") == (64, 16)
    assert checkpoint.shape(f"{STEM}.weight_scale") == (64, 4)
    assert checkpoint.dtype(f"{STEM}.weight_scale") == "BF16"
    assert checkpoint.shape(f"{STEM}.weight_zero_point") == (8, 4)
    assert checkpoint.tensor(f"{STEM}.weight_shape").tolist() == [64, 128]
    assert not any("gate_proj" in name for name in checkpoint.names())


@pytest.mark.parametrize("group", [32, 128])
def test_nanos_widths_take_both_groups(tmp_path: Path, group: int) -> None:
    folder = export_checkpoint("nano", tmp_path / "out", "compressed-tensors", group_size=group, calibrate=False)
    assert lost(values(folder), values(nano_folder())) < 0.14


def test_codes_of_awq_stay_in_compressed_tensors(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    packed, plain = write_packed(tmp_path, LAYOUTS["awq"])
    with caplog.at_level(logging.WARNING):
        folder = export_checkpoint(packed, tmp_path / "out", "compressed-tensors")
    assert "of 12 weights that were quantized 12 keep their codes" in caplog.text
    assert "quantized weights" not in caplog.text  # what loading would say
    assert lost(values(folder), values(plain)) < 0.003  # scales in bfloat16


def test_codes_that_do_not_fit_are_quantized_again_with_a_word(
    made: Made, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        folder = export_checkpoint(made.int4, tmp_path / "out", "compressed-tensors")
    assert "12 were decoded and quantized again, which loses a little, 2 were decoded" in caplog.text
    assert lost(values(folder), values(made.source)) < 0.12


# --- GGUF


@pytest.mark.parametrize(("kind", "most"), [("q4_0", 0.095), ("q8_0", 0.006), ("bf16", 0.0)])
def test_gguf_decodes_as_it_was_meant(tmp_path: Path, made: Made, kind: str, most: float) -> None:
    file = export_checkpoint(made.source, tmp_path / "tiny.gguf", "gguf", kind=kind)
    check_gguf(file, kind.upper(), values(made.source), most)


def test_gguf_of_four_bits_has_ks_and_vs_and_the_ends_in_eight(made: Made) -> None:
    check_gguf(made.q4_1, "Q4_1", values(made.source), 0.085)
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(made.q4_1).tensors}
    for name in ("blk.0.attn_k.weight", "blk.0.attn_v.weight", "token_embd.weight", "output.weight"):
        assert types[name] == "Q8_0"
    assert types["blk.1.attn_norm.weight"] == types["blk.1.attn_q.bias"] == "F32"


def check_gguf(file: Path, kind: str, source: dict[str, Tensor], most: float) -> None:
    found = values(file)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    assert stored["blk.1.ffn_down.weight"].tensor_type.name == kind
    for name, tensor in found.items():
        theirs = stored[ggml_name(name, "glm4")]
        decoded = torch.from_numpy(gguf.quants.dequantize(theirs.data, theirs.tensor_type).copy())
        torch.testing.assert_close(tensor, decoded.view(tensor.shape), rtol=1e-6, atol=1e-8)
    assert lost(found, source) <= most


def test_the_file_says_what_the_folder_says(made: Made) -> None:
    source, back = Checkpoint.open(made.source), open_source(made.q4_1)
    theirs, ours = prepare(source, "none", CausalLM).config, prepare(back, "none", CausalLM).config
    for key in ("hidden_size", "intermediate_size", "num_key_value_heads", "head_dim", "max_position_embeddings"):
        assert getattr(theirs, key) == getattr(ours, key)
    assert ours.rotary_dim == theirs.rotary_dim
    assert ours.attention_bias
    assert not ours.tie_word_embeddings
    assert set(ours.eos_token_ids) == set(theirs.eos_token_ids)
    one, other = Tokenizer.from_folder(made.source), Tokenizer.from_folder(back.folder)
    text = "It's 37 * 24 = 888; 你好，世界 🙂\r\n\n  main()"
    assert one.ids(text) == other.ids(text)
    assert one.special == other.special
    assert (back.folder / "chat_template.jinja").read_text() == (made.source / "chat_template.jinja").read_text()


def test_all_three_ends_of_an_answer_are_named(made: Made) -> None:
    fields = gguf.GGUFReader(made.q4_1).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    ends = [tokens[fields[f"tokenizer.ggml.{end}_token_id"].contents()] for end in ("eos", "eot", "eom")]
    assert ends == ["<|endoftext|>", "<|user|>", "<|observation|>"]
    assert fields["tokenizer.ggml.pre"].contents() == "glm4"
    assert fields["general.architecture"].contents() == "glm4"
    assert fields["tokenizer.ggml.add_bos_token"].contents() is False
    types = fields["tokenizer.ggml.token_type"].contents()
    assert (len(types), types[0], types[370], types[399]) == (400, 1, 3, 5)


def test_the_file_is_called_as_the_repository_is() -> None:
    cached = Path("/cache/models--zai-org--GLM-4-9B-0414/snapshots/0123abcd")
    assert gguf_metadata.model_name(cached) == "GLM-4-9B-0414"
    assert gguf_metadata.model_name(Path("/models/tuned")) == "tuned"
    assert gguf_metadata.model_name(Path("/models/old.Q4_K.gguf")) == "old.Q4_K"


def test_yarn_and_a_tied_head_of_the_older_model_come_back(tmp_path: Path) -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    config = tiny_config(model_type="glm", tie_word_embeddings=True, rope_scaling=yarn)
    source = write_checkpoint(tmp_path / "tiny", config)
    file = export_checkpoint(source, tmp_path / "tiny.gguf", "gguf", kind="bf16")
    assert gguf.GGUFReader(file).fields["general.architecture"].contents() == "chatglm"
    assert torch.equal(logits(file, quant="none", dtype="float32"), logits(source, quant="none", dtype="float32"))


@pytest.mark.parametrize(("quant", "kind"), [("int4", "q4_1"), ("int8", "q8_0")])
def test_our_own_codes_stay_in_gguf(
    tmp_path: Path, made: Made, caplog: pytest.LogCaptureFixture, quant: str, kind: str
) -> None:
    source = made.int4 if quant == "int4" else quantize_checkpoint(made.source, tmp_path / "int8", "int8")
    with caplog.at_level(logging.WARNING):
        file = export_checkpoint(source, tmp_path / "own.gguf", "gguf", kind=kind)
    assert "of 14 weights that were quantized 14 keep their codes" in caplog.text
    bf16 = export_checkpoint(source, tmp_path / "plain", "hf")
    assert lost(values(file), values(bf16)) < 0.003
    torch.testing.assert_close(logits(file, quant="none"), logits(source), rtol=0, atol=0.06)


def test_symmetric_codes_of_gptq_stay_in_q4_0(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    packed, plain = write_packed(tmp_path, LAYOUTS["gptq"])
    with caplog.at_level(logging.WARNING):
        file = export_checkpoint(packed, tmp_path / "own.gguf", "gguf", kind="q4_0")
    assert "keep their codes" in caplog.text
    assert lost(values(file), values(plain), "mlp") == 0


def test_a_tokenizer_that_gguf_has_no_name_for_is_said_and_comes_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        file = export_checkpoint("nano", tmp_path / "nano.gguf", "gguf", kind="bf16")
    assert "llama.cpp and other engines will give most texts other ids" in caplog.text
    assert "glm4lite alone finds its own way in the file" in caplog.text
    own, back = Tokenizer.from_pretrained("nano"), Tokenizer.from_pretrained(file)
    texts = (
        "What is 37 * 24?",
        '{"city": "Oslo", "days": 3}',
        "今天天气很好。",
        "def f(x):\n    return x  # the rest\r\n",
    )
    assert [own.ids(text) for text in texts] == [back.ids(text) for text in texts]
    fields = gguf.GGUFReader(file).fields
    named = {fields[f"tokenizer.ggml.{end}_token_id"].contents() for end in ("eos", "eot", "eom")}
    assert named == set(json.loads((nano_folder() / "config.json").read_text())["eos_token_id"])


# --- what goes wrong


def refused(message: str, source: Path | str, destination: Path, to: str, **arguments: Any) -> None:
    with pytest.raises(Glm4liteError, match=message):
        export_checkpoint(source, destination, to, **arguments)
    assert not destination.exists()
    assert not list(destination.parent.glob(".*"))


def test_arguments_that_mean_nothing_are_refused(made: Made, tmp_path: Path) -> None:
    out, file = tmp_path / "out", tmp_path / "out.gguf"
    refused("cannot be exported to 'onnx'; use one of compressed-tensors, gguf, hf", made.source, out, "onnx")
    refused("type 'q4_0' is one of GGUF", made.source, out, "hf", kind="q4_0")
    refused("type is 'q4_K'; use q4_0, q4_1, q8_0, bf16", made.source, file, "gguf", kind="q4_K")
    refused("chosen for compressed-tensors alone", made.source, file, "gguf", group_size=32)
    refused("in groups of 32, 64, 128", made.source, out, "compressed-tensors", group_size=48)
    refused("ends in .gguf", made.source, out, "gguf")
    refused("nothing is quantized", made.source, out, "hf", calibration=made.source / "config.json")
    refused("not a multiple of the group size 128", made.source, out, "compressed-tensors", group_size=128)


def test_a_model_that_a_format_cannot_hold_is_refused(tmp_path: Path) -> None:
    narrow = write_checkpoint(tmp_path / "narrow", tiny_config(num_key_value_heads=1))
    refused("k_proj.* rows or columns that are no multiple of 32", narrow, tmp_path / "out", "compressed-tensors")
    (narrow / "tokenizer.json").unlink()
    refused("has no tokenizer.json", narrow, tmp_path / "out.gguf", "gguf")
    yarn = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 512, "attention_factor": 1.5}
    scaled = write_checkpoint(tmp_path / "yarn", tiny_config(rope_scaling=yarn))
    refused("rope_scaling has attention_factor", scaled, tmp_path / "out.gguf", "gguf")
    config = tiny_config(architectures=["Glm4ForTokenClassification"])
    tensors = tiny_tensors(config) | {"score.weight": torch.randn(2, 64), "score.bias": torch.ones(2)}
    del tensors["lm_head.weight"]
    classifier = write_checkpoint(tmp_path / "c", config, tensors)
    refused("has no form in GGUF", classifier, tmp_path / "out.gguf", "gguf")


def test_what_exists_stays(made: Made, tmp_path: Path) -> None:
    file, folder = tmp_path / "a.gguf", tmp_path / "out"
    file.write_bytes(b"mine")
    folder.mkdir()
    (folder / "note").write_text("mine")
    with pytest.raises(CheckpointError, match="exists; choose another name"):
        export_checkpoint(made.source, file, "gguf")
    with pytest.raises(CheckpointError, match="is not empty"):
        export_checkpoint(made.source, folder, "hf")
    assert file.read_bytes() == b"mine"


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    tensors = tiny_tensors(CONFIG)
    tensors[f"{STEM}.weight"][7, 3] = float("nan")
    source = write_checkpoint(tmp_path / "tiny", CONFIG, tensors)
    for to, name in (("compressed-tensors", "out"), ("gguf", "out.gguf"), ("hf", "out")):
        refused(rf"{STEM}.weight .*nan", source, tmp_path / name, to, calibrate=False)


@pytest.mark.parametrize(("to", "name"), [("compressed-tensors", "out"), ("gguf", "out.gguf"), ("hf", "out")])
def test_nothing_is_left_after_ctrl_c_or_on_a_full_disk(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str, name: str
) -> None:
    seen: list[Progress] = []

    def stop(event: Progress) -> None:
        seen.append(event)
        if event.done > event.total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_checkpoint(made.source, tmp_path / name, to, progress=stop)
    assert {event.stage for event in seen} == {"export"}
    assert not [path for path in tmp_path.iterdir() if path.name != "home"]
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    refused("are free on that disk", made.source, tmp_path / name, to)


def test_the_work_is_done_in_blocks_of_rows(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("glm4lite.checkpoint.streaming.BLOCK_BYTES", 2048)
    monkeypatch.setattr(export, "BLOCK_BYTES", 2048)
    again = export_checkpoint(made.source, tmp_path / "again", "compressed-tensors")
    assert (again / "model.safetensors").read_bytes() == (made.compressed / "model.safetensors").read_bytes()
    file = export_checkpoint(made.source, tmp_path / "tiny.gguf", "gguf")
    assert file.read_bytes() == made.q4_1.read_bytes()


def test_the_command_says_what_runs_it(made: Made, tmp_path: Path) -> None:
    written = run("export", made.source, tmp_path / "out.gguf", "--to", "gguf", "--type", "q8_0")
    assert written.returncode == 0, written.stderr
    assert written.stderr.rstrip().endswith(f"Run it: llama-server -m {tmp_path}/out.gguf")
    for arguments, message in (
        (("--to", "gguf"), "exists"),
        (("--to", "hf", "--calibration", "x", "--no-calibration"), "contradict"),
        (("--to", "paper"), "paper"),
    ):
        failed = run("export", made.source, tmp_path / "out.gguf", *arguments)
        assert failed.returncode == 2
        assert message in failed.stderr
        assert len(failed.stderr.splitlines()) == 1


def test_errors_are_of_the_right_kind(made: Made, tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        export_checkpoint(made.source, tmp_path / "out", "onnx")
