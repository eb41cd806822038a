"""nf4 and fp4 while a model loads, and checkpoints that bitsandbytes quantized, with and without the package."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from glm4lite.base.errors import CheckpointError, ConfigError, Glm4liteError
from glm4lite.checkpoint.quantize import quantize_checkpoint
from glm4lite.measure import info
from glm4lite.measure.inventory import kernel_names, read_bytes
from glm4lite.pretrained.load import load
from glm4lite_quant import BnbConfig, BnbLinear, QuantEmbedding, QuantError, QuantLinear
from glm4lite_quant.bnb import library
from tests.glm4lite.checkpoints import legacy_checkpoint, tiny_config, tiny_tensors, write_checkpoint

CONFIG = tiny_config(intermediate_size=128)  # blocks of 64 fit it
IDS = torch.tensor([[1, 2, 3, 50, 60, 7, 300]])
DOWN = "model.layers.1.mlp.down_proj"


def reference(kind: str, double: bool, skip: tuple[str, ...] = ()) -> tuple[Any, dict[str, torch.Tensor]]:
    """Transformers' model with bitsandbytes' own layers in float32, and its state dict as it is saved."""
    from transformers import Glm4Config, Glm4ForCausalLM

    oracle = Glm4ForCausalLM(Glm4Config(**CONFIG)).float()
    oracle.load_state_dict({name: tensor.float() for name, tensor in tiny_tensors(CONFIG).items()})
    make = library().nn.Linear4bit
    for name, module in list(oracle.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head" and not name.endswith(skip):
            has_bias = module.bias is not None
            new = make(module.in_features, module.out_features, has_bias, torch.float32, double, kind)
            new.load_state_dict(module.state_dict())
            oracle.get_submodule(name.rpartition(".")[0]).add_module(name.rpartition(".")[2], new.to("cpu"))
    return oracle.train(), oracle.state_dict()  # in eval mode its layers would round activations to bfloat16


def write(folder: Path, kind: str, tensors: dict[str, torch.Tensor], double: bool = False, **changes: Any) -> Path:
    declared = BnbConfig(kind, double).to_dict() | {"llm_int8_skip_modules": ["lm_head"], "_load_in_4bit": True}
    plain = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    return write_checkpoint(folder, CONFIG | {"quantization_config": declared | changes}, plain)


@pytest.fixture(scope="module")
def nf4(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """A double quantized checkpoint and Transformers' logits of it."""
    oracle, tensors = reference("nf4", True)
    folder = write(tmp_path_factory.mktemp("nf4") / "model", "nf4", tensors, True)
    with torch.no_grad():
        return folder, oracle(IDS).logits


@pytest.fixture
def absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)


@torch.no_grad()
def error(folder: Path, wanted: torch.Tensor, **arguments: Any) -> float:
    logits = load(folder, **arguments)(IDS).logits.float()
    return float((logits - wanted).norm() / wanted.norm())


# --- its checkpoints


@pytest.mark.parametrize("double", [False, True], ids=["plain", "double"])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@torch.no_grad()
def test_logits_equal_those_of_transformers_and_bitsandbytes(tmp_path: Path, kind: str, double: bool) -> None:
    oracle, tensors = reference(kind, double)
    folder, wanted = write(tmp_path, kind, tensors, double), oracle(IDS).logits
    model = load(folder)
    assert sum(isinstance(module, BnbLinear) for module in model.modules()) == 12
    assert error(folder, wanted) < 1e-5
    assert error(folder, wanted, quant=kind, dtype="bfloat16") < 0.03
    assert model.config.quantization_config == BnbConfig(kind, double).to_dict()


def test_a_checkpoint_that_transformers_saved_is_loaded(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="Transformers quantizes only with accelerate")
    from transformers import BitsAndBytesConfig, Glm4ForCausalLM

    source = write_checkpoint(tmp_path / "source", CONFIG)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    oracle = Glm4ForCausalLM.from_pretrained(source, quantization_config=config, device_map="cpu")
    oracle.save_pretrained(tmp_path / "saved")
    with torch.no_grad():
        wanted = oracle(IDS).logits.float()
    assert error(tmp_path / "saved", wanted) < 0.05  # its layers round activations to bfloat16
    assert error(tmp_path / "saved", wanted, quant="none") < 0.05


@pytest.mark.usefixtures("absent")
def test_without_the_package_it_is_decoded_and_quantized_to_int4(
    nf4: tuple[Path, torch.Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    folder, wanted = nf4
    assert error(folder, wanted) < 0.2
    said = [message for message in caplog.messages if "bitsandbytes" in message]
    assert len(said) == 2
    assert said[0].startswith("bitsandbytes cannot be used here, so nf4 becomes int4")
    assert said[1] == "bitsandbytes: of 12 quantized weights 12 are decoded and quantized again"
    model = load(folder)
    assert sum(isinstance(module, QuantLinear) for module in model.modules()) == 13
    assert model.config.quantization_config["quant_method"] == "glm4lite"


@pytest.mark.usefixtures("absent")
def test_without_the_package_it_is_decoded_exactly(nf4: tuple[Path, torch.Tensor]) -> None:
    folder, wanted = nf4
    assert error(folder, wanted, quant="none") < 1e-5
    assert error(folder, wanted, quant="int8") < 0.02
    assert getattr(load(folder, quant="none").config, "quantization_config", None) is None
    with pytest.raises(QuantError, match="nf4 and fp4 need bitsandbytes"):
        load(folder, quant="nf4")


def test_another_precision_is_made_where_it_is_asked_for(
    nf4: tuple[Path, torch.Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    folder, wanted = nf4
    assert error(folder, wanted, quant="int8") < 0.02
    assert "bitsandbytes: of 12 quantized weights 12 are decoded and quantized again" in caplog.messages
    with pytest.raises(ConfigError, match=r"is quantized to nf4 already; load it without quant"):
        load(folder, quant="fp4")


@pytest.mark.usefixtures("absent")
def test_it_is_quantized_into_a_folder_of_our_own(nf4: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    folder, wanted = nf4
    written = quantize_checkpoint(folder, tmp_path / "int4", "int4")
    assert error(written, wanted) < 0.2
    assert json.loads((written / "config.json").read_text())["quantization_config"]["quant_method"] == "glm4lite"


@pytest.mark.parametrize("quant", [None, "none", "int8"])
@torch.no_grad()
def test_modules_left_out_are_taken_as_they_are(tmp_path: Path, quant: str | None) -> None:
    oracle, tensors = reference("nf4", False, skip=("q_proj", "1.mlp.down_proj"))
    folder = write(tmp_path, "nf4", tensors)  # config.json does not name them: what is stored decides
    model = load(folder)
    assert isinstance(model.get_submodule(DOWN), nn.Linear)
    assert isinstance(model.get_submodule("model.layers.0.mlp.down_proj"), BnbLinear)
    assert error(folder, oracle(IDS).logits, quant=quant) < (0.02 if quant == "int8" else 1e-5)


def test_codes_stored_as_wider_elements_are_the_same(nf4: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    folder, wanted = nf4
    tensors = all_tensors(folder)
    for name in [name for name in tensors if f"{name}.absmax" in tensors]:
        tensors[name] = tensors[name].flatten().view(torch.bfloat16)[:, None]
    written = write(tmp_path, "nf4", tensors, True, bnb_4bit_quant_storage="bfloat16")
    assert error(written, wanted) < 1e-5
    assert error(written, wanted, quant="none") < 1e-5


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_weight_that_was_half_precision_is_decoded_to_what_holds_it(
    nf4: tuple[Path, torch.Tensor], tmp_path: Path, dtype: str
) -> None:
    folder, wanted = nf4
    tensors = all_tensors(folder)
    for name in [name for name in tensors if ".quant_state." in name]:
        tensors[name] = as_bytes(json.loads(bytes(tensors[name].tolist())) | {"dtype": dtype})
    assert error(write(tmp_path, "nf4", tensors, True), wanted, quant="none") < 0.02


@pytest.mark.parametrize("without", [False, True], ids=["with", "without"])
def test_info_says_what_it_is(nf4: tuple[Path, torch.Tensor], monkeypatch: pytest.MonkeyPatch, without: bool) -> None:
    if without:
        monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    found = dict(info.model_facts(str(nf4[0])))
    wanted = "nf4 of bitsandbytes, blocks of 64, double quantization, 2 matrices not quantized"
    assert found["stored as"] == wanted + ("; bitsandbytes cannot be used here, so it loads as int4" if without else "")
    assert ("weights, nf4" in found) is not without
    assert {"weights, int4", "weights, int8", "weights, float32"} <= found.keys()


# --- at load


@pytest.mark.parametrize("quant", ["nf4", "fp4", BnbConfig("nf4", double_quant=True)], ids=str)
def test_a_plain_checkpoint_is_quantized_while_it_loads(tmp_path: Path, quant: str | BnbConfig) -> None:
    folder = write_checkpoint(tmp_path, CONFIG)
    with torch.no_grad():
        wanted = load(folder)(IDS).logits.float()
    assert 0.001 < error(folder, wanted, quant=quant) < 0.4
    model = load(folder, quant=quant)
    assert kernel_names(model) == {f"bitsandbytes {getattr(quant, 'kind', quant)}": 12, kernel_of_head(model): 1}
    assert isinstance(model.model.embed_tokens, QuantEmbedding)
    assert model.model.dtype == torch.bfloat16
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert read_bytes(model, 0)["cpu"] < read_bytes(load(folder), 0)["cpu"] / 2.4


def kernel_of_head(model: Any) -> str:
    return f"{model.lm_head.kernel} int8"


def test_it_equals_what_bitsandbytes_makes_of_the_whole_weight(tmp_path: Path) -> None:
    tensors = tiny_tensors(CONFIG)
    model = load(write_checkpoint(tmp_path, CONFIG, tensors), quant="nf4")
    codes, state = library().functional.quantize_4bit(tensors[f"{DOWN}.weight"], quant_type="nf4")
    made: Any = model.get_submodule(DOWN)
    assert torch.equal(made.packed, codes.flatten())
    assert torch.equal(made.absmax, state.absmax)


def test_layers_that_no_block_fits_stay_as_they_are(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = load(write_checkpoint(tmp_path, tiny_config(intermediate_size=96)), quant="nf4")
    assert isinstance(model.get_submodule(DOWN), nn.Linear)
    assert any("not quantized, because their input width is not a multiple of 64" in text for text in caplog.messages)


def test_tied_and_classifying_models_are_quantized_too(tmp_path: Path) -> None:
    tied = load(write_checkpoint(tmp_path, CONFIG | {"tie_word_embeddings": True}), quant="nf4")
    assert isinstance(tied.lm_head, QuantLinear)
    assert tied(IDS).logits.shape == (1, 7, 400)


@pytest.mark.usefixtures("absent")
def test_without_the_package_nf4_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(QuantError, match=r"pip install 'glm4lite\[bnb\]', or use int4"):
        load(tmp_path / "nowhere", quant="nf4")


def test_llm_int8_is_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"its activations are float16, and GLM-4's reach 68000.*; use int8"):
        load(tmp_path / "nowhere", quant="llm.int8")


def test_only_our_own_formats_are_quantized_to(nf4: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nf4 is made while a model loads"):
        quantize_checkpoint(nf4[0], tmp_path / "q", "nf4")
    with pytest.raises(ConfigError, match="the method 'nf4' needs none"):
        load(nf4[0], quant="nf4", calibration=nf4[0] / "config.json")


# --- damaged ones


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for shard in folder.glob("*.safetensors") for name, tensor in load_file(shard).items()}


def as_bytes(value: object) -> torch.Tensor:
    text = value if isinstance(value, bytes) else json.dumps(value).encode()
    return torch.tensor(list(text), dtype=torch.uint8)


State = Callable[[dict[str, Any]], object]
W = f"{DOWN}.weight"
S = f"{W}.quant_state.bitsandbytes__nf4"


def state(**changes: Any) -> Callable[[dict[str, torch.Tensor]], object]:
    """Replaces keys of the description; None removes one."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        fields = json.loads(bytes(tensors[S].tolist())) | changes
        tensors[S] = as_bytes({key: value for key, value in fields.items() if value is not None})

    return change


def put(name: str, made: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors.update({name: made(tensors[name]).clone()})


def nan_at_3(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.clone()
    tensor[min(3, len(tensor) - 1)] = float("nan")
    return tensor


DAMAGE: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], str]] = {
    "absmax cut": (put(f"{W}.absmax", lambda t: t[:-1]), "absmax holds 127 numbers of U8; its shape needs 128 of U8"),
    "absmax of another type": (put(f"{W}.absmax", lambda t: t.float()), "absmax holds 128 numbers of F32"),
    "absmax gone": (lambda tensors: tensors.pop(f"{W}.absmax"), "absmax is missing"),
    "quant_state gone": (lambda tensors: tensors.pop(S), "has no quant_state of nf4 or fp4 beside its absmax"),
    "two quant_states": (lambda t: t.update({S.replace("nf4", "fp4"): t[S]}), "has two quant_states"),
    "quant_state of fp4": (
        lambda t: t.update({S.replace("nf4", "fp4"): t.pop(S)}),
        "quant_type is 'nf4' in a",
    ),
    "quant_map gone": (lambda tensors: tensors.pop(f"{W}.quant_map"), "quant_map is missing"),
    "quant_map of fp4": (put(f"{W}.quant_map", lambda t: t / 2), "has another quant_map than nf4's"),
    "quant_map cut": (put(f"{W}.quant_map", lambda t: t[:8]), "quant_map holds 8 numbers of F32; its shape needs 16"),
    "nested scales cut": (put(f"{W}.nested_absmax", lambda t: t[:0]), "nested_absmax holds 0 numbers"),
    "nested scales gone": (lambda tensors: tensors.pop(f"{W}.nested_absmax"), "nested_absmax is missing"),
    "NaN scale": (put(f"{W}.nested_absmax", nan_at_3), "has a number in nested_absmax that is not finite"),
    "NaN in the map": (put(f"{W}.quant_map", nan_at_3), "has a number in quant_map that is not finite"),
    "infinite map": (put(f"{W}.nested_quant_map", lambda t: t / 0), "has a number in nested_quant_map that is not"),
    "codes cut": (put(W, lambda t: t[:-1]), "shape [64, 128] needs 4096 bytes of codes, 4095 are there"),
    "no JSON": (lambda tensors: tensors.update({S: as_bytes(b"{")}), "it is not JSON"),
    "no text": (lambda tensors: tensors.update({S: as_bytes(b"\xff\xfe\xfa")}), "it is not JSON"),
    "a deep list": (lambda tensors: tensors.update({S: as_bytes(b"[" * 9000)}), "it is not JSON"),
    "a long text": (lambda tensors: tensors.update({S: as_bytes(b" " * 20000)}), "it is U8 [20000], not a text"),
    "no bytes": (put(S, lambda t: t.float()), "not a text"),
    "no object": (lambda tensors: tensors.update({S: as_bytes([1])}), "it is not a JSON object"),
    "unknown kind": (state(quant_type="int4"), "quant_type is 'int4'; expected one of nf4, fp4"),
    "a list as kind": (state(quant_type=["nf4"]), "quant_type is ['nf4']; expected one of nf4, fp4"),
    "blocksize 0": (state(blocksize=0), "blocksize is 0; expected one of 32, 64,"),
    "blocksize true": (state(blocksize=True), "blocksize is True; expected one of 32, 64,"),
    "blocksize 64.0": (state(blocksize=64.0), "blocksize is 64.0; expected one of 32, 64,"),
    "another blocksize": (state(blocksize=128), "absmax holds 128 numbers of U8; its shape needs 64 of U8"),
    "absurd shape": (state(shape=[10**12, 10**12]), "shape is [1000000000000, 1000000000000]; expected two sizes"),
    "large shape": (state(shape=[2**30, 2**30]), "absmax holds 128 numbers of U8; its shape needs 180143985094819"),
    "negative shape": (state(shape=[-64, -128]), "shape is [-64, -128]; expected two sizes"),
    "shape of one": (state(shape=[8192]), "shape is [8192]; expected two sizes"),
    "transposed shape": (state(shape=[128, 64]), "has shape [128, 64], config.json needs [64, 128]"),
    "dtype of torch": (state(dtype="load"), "dtype is 'load'; expected one of bfloat16, float32, float16"),
    "key gone": (state(dtype=None), "'dtype' is missing"),
    "unknown key": (state(code="import os"), "'code' is not known"),
    "nested keys gone": (
        state(nested_blocksize=None, nested_dtype=None, nested_offset=None),
        "absmax holds 128 numbers of U8; its shape needs 128 of F32",
    ),
    "nested key gone": (state(nested_offset=None), "'nested_offset' is missing"),
    "nested blocksize": (state(nested_blocksize=64), "nested_blocksize is 64; expected one of 256"),
    "NaN offset": (state(nested_offset=float("nan")), "nested_offset must be a finite number, found nan"),
    "offset a text": (state(nested_offset="0.1"), "nested_offset is '0.1'; expected a finite number"),
    "huge offset": (state(nested_offset=10**400), "expected a finite number"),
    "weight gone": (lambda tensors: tensors.pop(W), f"lacks {W}"),
    "stray part": (lambda t: t.update({"model.norm.weight.absmax": t[f"{W}.absmax"]}), "has no quant_state"),
}


@pytest.mark.parametrize("quant", [None, "none"], ids=["kept", "decoded"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_one_gets_one_line(
    nf4: tuple[Path, torch.Tensor], tmp_path: Path, damage: str, quant: str | None
) -> None:
    change, message = DAMAGE[damage]
    folder = tmp_path / "model"
    shutil.copytree(nf4[0], folder)
    tensors = all_tensors(folder)
    change(tensors)
    for file in folder.glob("model*"):
        file.unlink()
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        load(folder, quant=quant)
    text = str(caught.value)
    assert message in text
    assert "\n" not in text
    assert len(text) < 600


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "LLM.int8": ({"load_in_8bit": True, "load_in_4bit": False}, "load_in_8bit (LLM.int8) is refused: its activations"),
    "no kind": ({"bnb_4bit_quant_type": "nf3"}, "bnb_4bit_quant_type is 'nf3'; expected nf4 or fp4"),
    "no bits": ({"load_in_4bit": False}, "load_in_4bit is False; expected true"),
    "the other kind": ({"bnb_4bit_quant_type": "fp4"}, "is nf4, but config.json says fp4; get back the config.json"),
    "another tool": ({"quant_method": "quip"}, "quant_method is 'quip'; known: 'glm4lite', 'bitsandbytes'"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_config_that_does_not_fit_gets_one_line(nf4: tuple[Path, torch.Tensor], tmp_path: Path, case: str) -> None:
    changes, message = CONFIGS[case]
    folder = write(tmp_path, "nf4", all_tensors(nf4[0]), True, **changes)
    with pytest.raises(Glm4liteError) as caught:
        load(folder)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_config_that_is_missing_or_speaks_of_nothing_is_said(nf4: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "undeclared", CONFIG, all_tensors(nf4[0]))
    with pytest.raises(ConfigError, match=r"has no quantization_config, but .*absmax is stored"):
        load(folder)
    folder = write(tmp_path / "plain", "nf4", tiny_tensors(CONFIG))
    with pytest.raises(CheckpointError, match=r"no weight is stored in 4 bits, but config\.json says nf4"):
        load(folder)


def test_an_embedding_in_4_bits_is_decoded_or_refused(nf4: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    tensors, name = all_tensors(nf4[0]), "model.embed_tokens.weight"
    codes, made = library().functional.quantize_4bit(tensors[name], quant_type="nf4")
    tensors |= {name: codes} | {f"{name}.{part}": value for part, value in made.as_dict(packed=True).items()}
    folder = write(tmp_path, "nf4", tensors, True)
    with pytest.raises(CheckpointError, match="is nf4, but no linear layer; load it with quant='int4'"):
        load(folder)
    assert error(folder, nf4[1], quant="none") < 0.5


def test_an_older_checkpoint_in_4_bits_is_refused(nf4: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    config = tiny_config(model_type="glm")
    folder = legacy_checkpoint(tmp_path, config, tiny_tensors(config))
    old = all_tensors(folder)
    dense = "transformer.encoder.layers.0.self_attention.dense.weight"
    save_file(old | {f"{dense}.quant_state.bitsandbytes__nf4": all_tensors(nf4[0])[S]}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="cannot be read from an older chatglm checkpoint"):
        load(folder)
