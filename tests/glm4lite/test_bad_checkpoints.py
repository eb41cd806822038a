"""Every kind of damaged or unfit checkpoint gets one line that names the file or key and says what to do."""

import json
import re
import struct
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from glm4lite.base.errors import CheckpointError, ConfigError, Glm4liteError
from glm4lite.base.sizes import readable
from glm4lite.checkpoint.calibration_text import TOKENS
from glm4lite.checkpoint.checkpoint import Checkpoint
from glm4lite.checkpoint.quantize import quantize_checkpoint
from glm4lite.loading.requirements import headers, requirements_of
from glm4lite.pretrained.load import load
from glm4lite.pretrained.models import Glm4ForSequenceClassification
from glm4lite_quant import QuantConfig
from tests.glm4lite.checkpoints import tiny_config, tiny_tensors, write_checkpoint

SHARD = "model-00001-of-00002.safetensors"
SECOND = "model-00002-of-00002.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "tiny")


def refused(
    folder: Path, error: type[Glm4liteError] = CheckpointError, read: Callable[..., Any] = load, **arguments: Any
) -> str:
    """The message that loading gives: one line, with the folder cut out so that it can be compared whole."""
    with pytest.raises(error) as caught:
        read(folder, **arguments)
    message = str(caught.value)
    assert "\n" not in message
    assert caught.value.__cause__ is None
    return message.replace(str(folder), "DIR")


def edit_header(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Rewrite a shard's header, its data as it is."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


def edit_config(folder: Path, **changes: Any) -> None:
    (folder / "config.json").write_text(json.dumps(tiny_config(**changes)))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """The same checkpoint with other tensors, in one file."""
    tensors = tiny_tensors(tiny_config())
    change(tensors)
    for file in folder.glob("model*"):
        file.unlink()
    save_file(tensors, folder / "model.safetensors")


# --- shards


def test_a_truncated_shard_is_named(folder: Path) -> None:
    path = folder / SHARD
    raw = path.read_bytes()
    path.write_bytes(raw[:-100])
    (length,) = struct.unpack("<Q", raw[:8])
    data = len(raw) - 8 - length
    assert refused(folder) == (
        f"DIR/{SHARD} is truncated: its data needs {data} bytes, {data - 100} are there; "
        "download or copy the file again"
    )


def test_a_shard_cut_within_its_header_is_named(folder: Path) -> None:
    path = folder / SHARD
    (length,) = struct.unpack("<Q", path.read_bytes()[:8])
    path.write_bytes(path.read_bytes()[:50])
    assert refused(folder) == (
        f"DIR/{SHARD} is truncated: its header needs {8 + length} bytes, 50 are there; download or copy the file again"
    )


def test_a_shard_of_a_few_bytes_is_named(folder: Path) -> None:
    (folder / SHARD).write_bytes(b"x" * 7)
    assert refused(folder) == (
        f"DIR/{SHARD} is truncated: 7 bytes are too few for safetensors; download or copy the file again"
    )


def test_a_file_that_is_not_safetensors_is_named(folder: Path) -> None:
    (folder / SHARD).write_bytes(b"something else" * 9)
    message = refused(folder)
    assert re.fullmatch(
        rf"DIR/{SHARD} is not a safetensors file: its header size reads \d+; download or copy the file again", message
    )


def test_a_corrupt_header_is_named(folder: Path) -> None:
    path = folder / SHARD
    raw = bytearray(path.read_bytes())
    raw[20] = 0xFF
    path.write_bytes(raw)
    message = refused(folder)
    assert message.startswith(f"DIR/{SHARD} has a corrupt header (")
    assert message.endswith("; download or copy the file again")


def test_a_header_that_is_not_an_object_is_named(folder: Path) -> None:
    (folder / SHARD).write_bytes(struct.pack("<Q", 2) + b"[]")
    assert (
        refused(folder) == f"DIR/{SHARD} has a wrong header: it is not a JSON object; download or copy the file again"
    )


def test_a_name_twice_in_a_header_is_said(folder: Path) -> None:
    entry = '{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'
    text = f'{{"a":{entry},"a":{entry}}}'.encode()
    (folder / SHARD).write_bytes(struct.pack("<Q", len(text)) + text + b"\0")
    assert refused(folder) == f"DIR/{SHARD} has a corrupt header ('a' appears twice); download or copy the file again"


def test_a_name_twice_among_very_many_is_found_soon(folder: Path) -> None:
    entry = '{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    names = [f"t{i}" for i in range(60_000)] + ["t59999"]
    text = ("{" + ",".join(f'"{name}":{entry}' for name in names) + "}").encode()
    (folder / SHARD).write_bytes(struct.pack("<Q", len(text)) + text)
    start = time.process_time()
    assert "('t59999' appears twice)" in refused(folder)
    assert time.process_time() - start < 5


EMBED = "model.embed_tokens.weight"
LIES: dict[str, tuple[dict[str, Any], str]] = {
    "shape": ({"shape": [400, 65]}, f"{EMBED} is BF16 [400, 65], 52000 bytes, but its offsets span 51200"),
    "negative shape": ({"shape": [-400, -64]}, f"{EMBED} has the shape [-400, -64]"),
    "shape of text": ({"shape": "400,64"}, f"{EMBED} has the shape '400,64'"),
    "huge shape": (
        {"shape": [2**62, 2**62]},
        f"{EMBED} has the shape [{2**62}, {2**62}], which no tensor can have",
    ),
    "huge shape of an empty tensor": (
        {"shape": [0, 2**62, 2**62], "data_offsets": [0, 0]},
        f"{EMBED} has the shape [0, {2**62}, {2**62}], which no tensor can have",
    ),
    "shape of fractions": ({"shape": [400.0, 64]}, f"{EMBED} has the shape [400.0, 64]"),
    "shape of truths": ({"shape": [True, 64]}, f"{EMBED} has the shape [True, 64]"),
    "huge offsets": ({"data_offsets": [0, 2**63]}, f"{EMBED} has the offsets [0, {2**63}]"),
    "many dimensions": ({"shape": [2**62] * 300}, f"{EMBED} has 300 dimensions, more than 8"),
    "long text": ({"shape": "7" * 10_000}, f"{EMBED} has the shape '777777777777...7777777777777'"),
    "offsets backwards": ({"data_offsets": [51200, 0]}, f"{EMBED} has the offsets [51200, 0]"),
    "offsets of three": ({"data_offsets": [0, 1, 2]}, f"{EMBED} has the offsets [0, 1, 2]"),
    "type": ({"dtype": "F32"}, f"{EMBED} is F32 [400, 64], 102400 bytes, but its offsets span 51200"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies_is_caught(folder: Path, lie: str) -> None:
    changes, what = LIES[lie]
    edit_header(folder / SHARD, lambda header: header[EMBED].update(changes))
    assert refused(folder) == f"DIR/{SHARD} has a wrong header: {what}; download or copy the file again"


def test_overlapping_tensors_are_caught(folder: Path) -> None:
    def overlap(header: dict[str, Any]) -> None:
        norms = [name for name in header if name.endswith("norm.weight")]
        header[norms[1]]["data_offsets"] = header[norms[0]]["data_offsets"]

    edit_header(folder / SHARD, overlap)
    assert "overlaps the tensor before it; download or copy the file again" in refused(folder)


def test_a_gap_between_tensors_is_caught(folder: Path) -> None:
    edit_header(folder / SHARD, lambda header: header.pop(EMBED))
    assert re.search(r"has a wrong header: \S+ leaves 51200 bytes unused before it", refused(folder))


def test_bytes_after_the_last_tensor_are_caught(folder: Path) -> None:
    with (folder / SHARD).open("ab") as file:
        file.write(b"12345678")
    assert "has a wrong header: 8 bytes at the end belong to no tensor" in refused(folder)


def test_metadata_of_something_else_than_texts_is_refused(folder: Path) -> None:
    edit_header(folder / SHARD, lambda header: header.update(__metadata__={"a": [1]}))
    assert "has a wrong header: its __metadata__ is not an object of texts" in refused(folder)


def test_a_header_of_more_than_16_mib_is_not_parsed(folder: Path) -> None:
    (folder / SHARD).write_bytes(struct.pack("<Q", 17 << 20) + b"{" + b" " * (17 << 20))
    assert "is not a safetensors file: its header size reads 17825792" in refused(folder)


PLANE = "model.layers.0.self_attn.q_proj.qweight"
PLANES: dict[str, tuple[dict[str, Any], str]] = {
    "a huge empty plane": ({"shape": [0, 2**62, 2**62]}, f"{PLANE} has the shape [0, {2**62}, {2**62}], which no"),
    "an empty plane": ({"shape": [0, 0, 256]}, "q_proj.weight in .*: qweight has shape .* expected"),
    "a plane without dimensions": ({"shape": [0]}, "q_proj.weight in .*: qweight is torch.uint8 .* 3 dimension"),
    "a plane of another type": ({"dtype": "I8", "shape": [0, 2, 256]}, "qweight is torch.int8"),
    "a plane of a type that torch has not": ({"dtype": "U16", "shape": [0, 2, 256]}, "the type U16"),
    "tiles of no rows": ({"shape": [0, 2, 256]}, "row_scale has 64 rows but qweight 0 tiles"),
}


@pytest.mark.parametrize("plane", PLANES)
def test_a_stored_plane_that_does_not_fit_is_refused_before_it_is_mapped(
    folder: Path, tmp_path: Path, plane: str
) -> None:
    """As if the plane's bytes were another tensor's, and the plane had none."""
    changes, what = PLANES[plane]
    written = quantize_checkpoint(folder, tmp_path / "q", QuantConfig(method="minmax"))

    def empty(header: dict[str, Any]) -> None:
        end = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
        begin, stop = header[PLANE]["data_offsets"]
        header["model.visual.filler"] = {"dtype": "U8", "shape": [stop - begin], "data_offsets": [begin, stop]}
        header[PLANE] |= {"data_offsets": [end, end]} | changes

    edit_header(written / "model.safetensors", empty)
    for read in (load, needs_of_folder):
        with pytest.raises(CheckpointError, match=re.escape(what) if "[" in what else what):
            read(written)


def needs_of_folder(folder: Path) -> object:
    return requirements_of(headers(folder))


def test_an_unknown_type_is_named(folder: Path) -> None:
    edit_header(folder / SHARD, lambda header: header[EMBED].update(dtype="F4"))
    assert refused(folder).startswith(f"DIR/{SHARD}: {EMBED} has the unknown type 'F4'; known: BF16, BOOL, ")


def test_an_entry_without_offsets_is_named(folder: Path) -> None:
    edit_header(folder / SHARD, lambda header: header[EMBED].pop("data_offsets"))
    assert f"{EMBED} lacks dtype, shape or data_offsets" in refused(folder)


def test_a_type_that_cannot_be_loaded_is_named(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(64, dtype=torch.int32)}))
    assert refused(folder) == (
        "model.norm.weight in DIR/model.safetensors has the type I32, which cannot be loaded; "
        "use a BF16 or F32 checkpoint"
    )


def test_a_weight_that_is_not_finite_is_named(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors["model.layers.1.mlp.down_proj.weight"][3, 5].fill_(float("nan")))
    assert refused(folder, quant="int4") == (
        "model.layers.1.mlp.down_proj.weight in DIR/model.safetensors holds nan at [3, 5]; download the file again"
    )
    assert refused(folder, quant="int8") == (
        "model.layers.1.mlp.down_proj.weight in DIR/model.safetensors cannot be quantized: the weight at row 3, "
        "column 5 is nan: not a finite number that can be quantized; download the file again"
    )


# --- the index


def test_a_missing_shard_is_named(folder: Path) -> None:
    (folder / SECOND).unlink()
    assert refused(folder) == (
        f"DIR lacks {SECOND}, named by model.safetensors.index.json; download the checkpoint again"
    )


def test_an_index_that_names_an_impossible_file_lacks_a_shard(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    values["weight_map"]["other"] = "x" * 300 + ".safetensors"
    index.write_text(json.dumps(values))
    message = refused(folder)
    assert message.startswith("DIR lacks xxx")
    assert message.endswith(", named by model.safetensors.index.json; download the checkpoint again")
    assert len(message) < 200


def test_many_missing_shards_are_counted(folder: Path) -> None:
    index = {"weight_map": {str(i): f"model-{i:05d}-of-01000.safetensors" for i in range(1000)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert refused(folder) == (
        "DIR lacks model-00000-of-01000.safetensors, model-00001-of-01000.safetensors, "
        "model-00002-of-01000.safetensors and 997 more, named by model.safetensors.index.json; "
        "download the checkpoint again"
    )


def test_an_index_that_is_not_json_is_named(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("{")
    assert refused(folder).startswith("DIR/model.safetensors.index.json is not valid JSON (")


def test_an_index_without_a_weight_map_is_named(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text('{"metadata": {}}')
    assert refused(folder) == (
        "DIR/model.safetensors.index.json has no weight_map (tensor name -> file name); download it again"
    )


@pytest.mark.parametrize(
    "file", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "..\\x.safetensors", "m.bin", 7]
)
def test_an_index_cannot_lead_out_of_the_folder(folder: Path, file: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": file}}))
    assert refused(folder) == (
        f"DIR/model.safetensors.index.json puts a in {file!r}; only .safetensors files of the same folder are read, "
        "download the index again"
    )


def test_a_tensor_may_lie_in_another_shard_than_the_index_says(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    values["weight_map"][EMBED] = SECOND
    index.write_text(json.dumps(values))
    assert load(folder)


def test_a_tensor_in_two_shards_is_named(folder: Path) -> None:
    save_file({EMBED: torch.zeros(400, 64)}, folder / "model-extra.safetensors")
    index = folder / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    del values["weight_map"][EMBED]
    values["weight_map"]["other"] = "model-extra.safetensors"
    save_file({EMBED: torch.zeros(400, 64), "other": torch.zeros(1)}, folder / "model-extra.safetensors")
    index.write_text(json.dumps(values))
    assert refused(folder) == (f"DIR holds {EMBED} twice, in {SHARD} and model-extra.safetensors; download it again")


# --- the folder


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_a_pickle_checkpoint_is_refused_and_not_opened(folder: Path, name: str) -> None:
    for file in folder.glob("model*"):
        file.unlink()
    (folder / name).write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    assert refused(folder) == (
        f"DIR holds only pickle weights (which can run code when opened): {name}; use the model's safetensors version, "
        "or convert it with transformers' save_pretrained on a machine where you trust it"
    )


def test_a_gguf_file_is_named(folder: Path) -> None:
    for file in folder.glob("model*"):
        file.unlink()
    (folder / "model-Q4_K.gguf").write_bytes(b"GGUF")
    assert refused(folder) == "DIR/model-Q4_K.gguf is no GGUF file; download it again"


def test_a_folder_without_weights_is_said(folder: Path) -> None:
    for file in folder.glob("model*"):
        file.unlink()
    assert refused(folder) == (
        "DIR has neither model.safetensors nor model.safetensors.index.json; download the checkpoint again"
    )


# --- config.json


def test_a_missing_config_is_said(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert refused(folder, ConfigError) == (
        "DIR/config.json is missing; a checkpoint folder needs it, download it again"
    )


def test_a_config_that_is_not_json_is_said(folder: Path) -> None:
    (folder / "config.json").write_text('{"hidden_size": 64,')
    message = refused(folder, ConfigError)
    assert message.startswith("DIR/config.json is not valid JSON (")
    assert message.endswith("; correct it or download it again")


def test_a_config_that_is_not_text_is_said(folder: Path) -> None:
    (folder / "config.json").write_bytes(b"\xff\xfe\x00")
    assert refused(folder, ConfigError).startswith("DIR/config.json is not valid JSON (")


def test_a_config_that_is_a_list_is_said(folder: Path) -> None:
    (folder / "config.json").write_text("[]")
    assert refused(folder, ConfigError) == ("DIR/config.json must hold a JSON object, found list; download it again")


def test_an_unknown_model_type_is_named(folder: Path) -> None:
    edit_config(folder, model_type="llama")
    message = refused(folder, ConfigError)
    assert message == "DIR/config.json: model_type 'llama' is not supported; glm4lite runs glm4, glm (and chatglm)"


def test_a_missing_key_is_named(folder: Path) -> None:
    edit_config(folder, hidden_size=None)
    assert "DIR/config.json: the key 'hidden_size' is missing" in refused(folder, ConfigError)


def test_a_wrong_type_is_named(folder: Path) -> None:
    edit_config(folder, hidden_size="64")
    message = refused(folder, ConfigError)
    assert message.startswith("DIR/config.json: hidden_size: ")
    assert "'64'" in message


@pytest.mark.parametrize(
    ("key", "size"), [("num_hidden_layers", 10**9), ("vocab_size", 10**15), ("hidden_size", 10**12)]
)
def test_an_absurd_size_is_refused_before_the_model_is_built(folder: Path, key: str, size: int) -> None:
    edit_config(folder, **{key: size})
    message = refused(folder, ConfigError)
    assert message.startswith(f"DIR/config.json: {key}: Input should be less than or equal to ")
    assert message.endswith(f", found {size}")


def test_quantized_weights_that_the_config_does_not_declare_are_said(folder: Path, tmp_path: Path) -> None:
    written = quantize_checkpoint(folder, tmp_path / "q", "int4")
    (written / "config.json").write_text(json.dumps(tiny_config()))
    message = refused(written, ConfigError)
    assert message == (
        "DIR/config.json has no quantization_config, but model.embed_tokens.qweight is stored; "
        "get back the config.json that belongs to the weights"
    )


@pytest.mark.parametrize("given", [{"quant_method": "quip"}, {"quant_method": "glm4lite"}, [], "int4", {"bits": 4}])
def test_a_quantization_config_of_any_other_form_is_said(folder: Path, given: object) -> None:
    edit_config(folder, quantization_config=given)
    assert refused(folder, ConfigError).startswith("DIR/config.json: quantization_config")


def test_a_generation_config_that_is_not_json_is_said(folder: Path) -> None:
    (folder / "generation_config.json").write_text("eos")
    with pytest.raises(ConfigError, match=r"generation_config.json is not valid JSON \(.*\); correct it or download"):
        _ = Checkpoint.open(folder).generation_config


def test_another_tools_quantization_is_named(folder: Path) -> None:
    edit_config(folder, quantization_config={"quant_method": "quip", "bits": 4})
    assert refused(folder, ConfigError) == (
        "DIR/config.json: quantization_config.quant_method is 'quip'; known: 'glm4lite', 'bitsandbytes', 'gptq', "
        "'awq', 'compressed-tensors', 'auto-round', 'mlx', 'hqq', 'fp8', 'gguf'; use the model's BF16 checkpoint"
    )


# --- tensors against the model


def test_missing_tensors_are_named(folder: Path) -> None:
    def remove(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if "layers.1.mlp" in name or name == "lm_head.weight"]:
            del tensors[name]

    edit_tensors(folder, remove)
    assert refused(folder) == (
        "DIR lacks model.layers.1.mlp.gate_up_proj.weight, model.layers.1.mlp.down_proj.weight, lm_head.weight, "
        "which config.json's model needs; download it again or correct config.json"
    )


def test_many_missing_tensors_are_counted(folder: Path) -> None:
    edit_config(folder, num_hidden_layers=3)
    assert re.match(
        r"DIR lacks model.layers.2.\S+, \S+, \S+ and 10 more, which config.json's model needs", refused(folder)
    )


def test_unexpected_tensors_are_named(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({"model.layers.0.mlp.extra.weight": torch.zeros(4)}))
    assert refused(folder) == (
        "DIR holds model.layers.0.mlp.extra.weight (in model.safetensors), which config.json's model does not have; "
        "correct config.json (model_type, attention_bias, num_hidden_layers) or use the right class"
    )


def test_a_tensor_name_cannot_write_to_the_terminal(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({"a\x1b[2J\nerror: b": torch.zeros(4)}))
    assert refused(folder) == (
        r"DIR/model.safetensors has a wrong header: 'a\x1b[2J\nerror: b' is no name of a tensor; "
        "download or copy the file again"
    )


def test_a_name_in_the_index_cannot_write_to_the_terminal(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    values["weight_map"]["a\x1b[2J\nerror: b"] = "/model-0"
    index.write_text(json.dumps(values))
    assert refused(folder).startswith(
        "DIR/model.safetensors.index.json puts a\ufffd[2J\ufffderror: b in '/model-0'; only"
    )


def test_biases_that_the_config_denies_are_named(folder: Path) -> None:
    edit_config(folder, attention_bias=False)
    message = refused(folder)
    assert "self_attn.q_proj.bias" in message
    assert "attention_bias" in message


def test_a_wrong_shape_is_named(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({"model.layers.0.mlp.down_proj.weight": torch.zeros(64, 95)}))
    assert refused(folder) == (
        "model.layers.0.mlp.down_proj.weight in DIR/model.safetensors has shape [64, 95], config.json needs [64, 96]; "
        "correct config.json or download it again"
    )


def test_a_vocabulary_of_another_size_is_named(folder: Path) -> None:
    edit_config(folder, vocab_size=512)
    assert f"{EMBED} in DIR/{SHARD} has shape [400, 64], config.json needs [512, 64]" in refused(folder)


# --- arguments


def test_float16_is_refused_with_the_reason(folder: Path) -> None:
    expected = (
        "dtype float16 is refused: GLM-4's activations reach 68000, above float16's largest number; "
        "use bfloat16 or float32"
    )
    for dtype in ("float16", "torch.float16", torch.float16):
        assert refused(folder, ConfigError, dtype=dtype) == expected


def test_other_types_and_devices_are_named(folder: Path) -> None:
    assert refused(folder, ConfigError, dtype="int8") == "dtype 'int8' is not supported; use auto, float32 or bfloat16"
    assert refused(folder, ConfigError, device="mps") == "device 'mps' is not supported; use auto, cpu, cuda or cuda:N"
    assert refused(folder, ConfigError, device="gpu") == "device 'gpu' is not known; use auto, cpu, cuda or cuda:N"
    assert refused(folder, ConfigError, quant="int3") == "quant is 'int3'; use int4, int8, nf4, fp4 or none"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_cuda_that_is_not_there_is_said(folder: Path) -> None:
    assert refused(folder, ConfigError, device="cuda") == (
        "device 'cuda' was asked for, but torch finds no CUDA device; use device='cpu'"
    )


def test_a_group_size_that_does_not_divide_is_named(folder: Path) -> None:
    assert refused(folder, ConfigError, quant=QuantConfig(4, 64)) == (
        "model.layers.0.mlp.down_proj has 96 input columns, not a multiple of the group size 64; "
        "quantize with group size 32"
    )


def held(model: Any) -> str:
    return readable(sum(value.nbytes for value in model.state_dict().values()))


def limit_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=64 << 10))
    monkeypatch.setattr("psutil.swap_memory", lambda: SimpleNamespace(free=0))


MAPPED = "load a folder made by `glm4lite quantize`, which is mapped"
ADVICE: dict[str, tuple[dict[str, Any], str]] = {
    "as stored": ({}, f"quantize it (quant='int4'), or {MAPPED}"),
    "float32": ({"dtype": "float32"}, f"quantize it (quant='int4'), or {MAPPED}"),
    "int8": ({"quant": "int8"}, f"use quant='int4', or {MAPPED}"),
    "int4": ({"quant": QuantConfig(4, method="search")}, MAPPED),
}


@pytest.mark.parametrize("how", ADVICE)
def test_a_checkpoint_that_does_not_fit_the_memory_is_refused_first(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    arguments, advice = ADVICE[how]
    needed = held(load(folder, **arguments))
    limit_memory(monkeypatch)
    assert refused(folder, **arguments) == f"DIR needs {needed} of memory, 64 KiB are free; {advice}"


def test_calibrating_needs_the_memory_of_one_layer_and_its_inputs_more(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(folder, quant="int4")
    tensors = tiny_tensors(tiny_config())
    first = {name: tensor for name, tensor in tensors.items() if name.startswith("model.layers.0.")}
    layer = sum(tensor.nbytes for tensor in first.values())
    given = ("q_proj.weight", "o_proj.weight", "gate_up_proj.weight", "down_proj.weight")
    inputs = sum(2 * TOKENS * tensor.shape[1] for name, tensor in first.items() if name.endswith(given))
    needed = readable(sum(value.nbytes for value in model.state_dict().values()) + layer + inputs)
    limit_memory(monkeypatch)
    assert refused(folder, quant="int4") == f"DIR needs {needed} of memory, 64 KiB are free; {MAPPED}"


def test_a_float16_checkpoint_needs_the_memory_of_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = tiny_tensors(tiny_config(), dtype=torch.float16)
    folder = write_checkpoint(tmp_path / "f16", tensors=tensors)
    needed = held(load(folder))
    limit_memory(monkeypatch)
    assert refused(folder).startswith(f"DIR needs {needed} of memory, 64 KiB are free; ")


def test_a_pre_quantized_folder_needs_no_memory_for_what_is_mapped(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = quantize_checkpoint(folder, tmp_path / "q", "int4")
    limit_memory(monkeypatch)
    assert load(written)


def test_a_head_the_checkpoint_lacks_is_not_taken_for_an_unexpected_one(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({"score.weight": torch.zeros(3, 64)}))
    message = refused(folder, read=Glm4ForSequenceClassification.from_pretrained)
    assert message == (
        "score.weight in DIR/model.safetensors has shape [3, 64], num_labels=2 needs [2, 64]; load with num_labels=3, "
        "or with ignore_mismatched_sizes=True for a new head"
    )
