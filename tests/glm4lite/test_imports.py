"""Checkpoints that other tools quantized: what they decode to, which codes are kept, and what is refused."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from glm4lite.base.errors import CheckpointError, ConfigError
from glm4lite.checkpoint.checkpoint import Checkpoint
from glm4lite.checkpoint.prepare import prepare
from glm4lite.checkpoint.quantize import quantize_checkpoint
from glm4lite.loading.plan_report import plan
from glm4lite.measure.info import model_facts
from glm4lite.model.causal_lm import CausalLM
from glm4lite.pretrained.load import load
from glm4lite_quant import QuantLinear, QuantTensor
from glm4lite_quant.config import KEPT
from tests.glm4lite import packed
from tests.glm4lite.checkpoints import legacy_checkpoint, tiny_config, tiny_tensors, write_checkpoint
from tests.glm4lite.packed import Layout, compressed, write_packed

IDS = torch.tensor([[1, 2, 3, 50, 60, 7, 300]])

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
MLX = {"group_size": 32, "bits": 4}
AUTO_ROUND = {"quant_method": "auto-round", "bits": 4, "group_size": 32, "sym": True}


def hqq(bits: int) -> dict[str, Any]:
    inner = {"nbits": bits, "group_size": 32, "axis": 1}
    return {"quant_method": "hqq", "quant_config": {"weight_quant_params": inner, "scale_quant_params": None}}


FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
GPTQMODEL_ONES = (0x24924924, 0x92492492, 0x49249249)

LAYOUTS = {
    "gptq": Layout(packed.gptq, GPTQ),
    "gptq, no g_idx": Layout(partial(packed.gptq, g_idx=False), GPTQ),
    "gptq, not symmetric": Layout(packed.gptq, GPTQ | {"sym": False}, symmetric=False),
    "gptq, lowered word by word": Layout(
        partial(packed.gptq, ones=(0x11111111,)), GPTQ | {"sym": False}, symmetric=False
    ),
    "gptq, one group": Layout(packed.gptq, GPTQ | {"group_size": -1}, group=None),
    "gptq v2": Layout(packed.gptq_v2, GPTQ | {"checkpoint_format": "gptq_v2"}, symmetric=False),
    "gptq, 2 bits": Layout(packed.gptq, GPTQ | {"bits": 2}, bits=2, symmetric=False),
    "gptq, 3 bits": Layout(packed.gptq, GPTQ | {"bits": 3}, bits=3),
    "gptq, 3 bits of gptqmodel": Layout(
        partial(packed.gptq, ones=GPTQMODEL_ONES),
        GPTQ | {"bits": 3, "meta": {"quantizer": ["gptqmodel:2.0.0"]}},
        bits=3,
        symmetric=False,
    ),
    "awq": Layout(packed.awq_gemm, AWQ, symmetric=False),
    "awq gemv": Layout(packed.awq_gemv, AWQ | {"version": "gemv"}, symmetric=False),
    "compressed-tensors": Layout(packed.packed_quantized, compressed(4)),
    "compressed-tensors, not symmetric": Layout(
        partial(packed.packed_quantized, symmetric=False), compressed(4, symmetric=False), symmetric=False
    ),
    "compressed-tensors, a scale a row": Layout(
        packed.packed_quantized, compressed(4, strategy="channel", group_size=None), group=None
    ),
    "compressed-tensors, 3 bits": Layout(packed.packed_quantized, compressed(3), bits=3),
    "compressed-tensors, 3 bits of before 0.18": Layout(
        partial(packed.packed_quantized, pack=packed.whole_words, symmetric=False),
        compressed(3, symmetric=False),
        bits=3,
        symmetric=False,
    ),
    "auto-round": Layout(packed.gptq_v2, AUTO_ROUND | {"packing_format": "auto_round"}, symmetric=False),
    "auto-round as gptq": Layout(packed.gptq, AUTO_ROUND | {"packing_format": "auto_round:auto_gptq"}),
    "auto-round as awq": Layout(packed.awq_gemm, AUTO_ROUND | {"packing_format": "auto_round:auto_awq"}),
    "mlx": Layout(packed.mlx, MLX, key="quantization", symmetric=False),
    "mlx, 3 bits": Layout(packed.mlx, MLX | {"bits": 3}, bits=3, key="quantization", symmetric=False),
    "hqq": Layout(packed.hqq, hqq(4), symmetric=False),
    "hqq, 3 bits": Layout(packed.hqq, hqq(3), bits=3, symmetric=False),
    "hqq, 2 bits": Layout(packed.hqq, hqq(2), bits=2, symmetric=False),
}
"""Those whose codes are kept."""

AGAIN = {
    "gptq, act-order": Layout(packed.gptq, GPTQ | {"desc_act": True}, shuffled=True),
    "gptq, 8 bits": Layout(packed.gptq, GPTQ | {"bits": 8}, bits=8),
    "compressed-tensors, act-order": Layout(packed.packed_quantized, compressed(4, actorder="group"), shuffled=True),
    "compressed-tensors, 5 bits": Layout(packed.packed_quantized, compressed(5), bits=5),
    "compressed-tensors, 6 bits of before 0.18": Layout(
        partial(packed.packed_quantized, pack=packed.whole_words), compressed(6), bits=6
    ),
    "compressed-tensors, 8 bits": Layout(packed.packed_quantized, compressed(8), bits=8),
    "compressed-tensors, int8": Layout(packed.int_quantized, compressed(8, "int-quantized"), bits=8),
    "compressed-tensors, int8, not symmetric": Layout(
        partial(packed.int_quantized, symmetric=False), compressed(8, "int-quantized"), bits=8, symmetric=False
    ),
    "fp8, in blocks": Layout(packed.fp8, FP8 | {"weight_block_size": [32, 32]}, shared_rows=32),
    "fp8, a scale for all": Layout(partial(packed.fp8, block=False), FP8, group=None, shared_rows=1000),
    "auto-round, 8 bits": Layout(
        packed.gptq_v2, AUTO_ROUND | {"bits": 8, "packing_format": "auto_round"}, bits=8, symmetric=False
    ),
    "hqq, 8 bits": Layout(packed.hqq, hqq(8), bits=8, symmetric=False),
    "mlx, 5 bits": Layout(packed.mlx, MLX | {"bits": 5}, bits=5, key="quantization", symmetric=False),
    "mlx, 6 bits": Layout(packed.mlx, MLX | {"bits": 6}, bits=6, key="quantization", symmetric=False),
    "mlx, 8 bits": Layout(packed.mlx, MLX | {"bits": 8}, bits=8, key="quantization", symmetric=False),
}
"""Those that are decoded and quantized again."""


def weight_of(model: nn.Module, module: str) -> QuantTensor:
    linear = model.get_submodule(module)
    assert isinstance(linear, QuantLinear)
    return linear.weight_tensor


def decoded(folder: Path) -> Checkpoint:
    return prepare(Checkpoint.open(folder), "none", CausalLM).checkpoint


@torch.no_grad()
def error(folder: Path, wanted: torch.Tensor, **arguments: Any) -> float:
    logits = load(folder, **arguments)(IDS).logits.float()
    return float((logits - wanted).norm() / wanted.norm())


@torch.no_grad()
def logits_of(folder: Path) -> torch.Tensor:
    return load(folder, quant="none")(IDS).logits.float()


# --- what weights decode to


@pytest.mark.parametrize("layout", (LAYOUTS | AGAIN).values(), ids=LAYOUTS | AGAIN)
def test_weights_decode_to_the_values_of_their_codes(tmp_path: Path, layout: Layout) -> None:
    folder, plain = write_packed(tmp_path, layout)
    found, wanted = decoded(folder), Checkpoint.open(plain)
    assert set(found.names()) == set(wanted.names())
    for name in wanted.names():
        values = wanted.tensor(name)
        torch.testing.assert_close(found.tensor(name), values, rtol=1e-6, atol=1e-7)
        if values.dim() == 2:
            assert torch.equal(found.rows(name, 17, 30), found.tensor(name)[17:30])


# --- which codes are kept


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_affine_codes_of_four_bits_are_kept(tmp_path: Path, layout: Layout, caplog: pytest.LogCaptureFixture) -> None:
    folder, plain = write_packed(tmp_path, layout)
    model = load(folder)
    assert [line for line in caplog.messages if "of 12 quantized weights 12 keep their codes" in line]
    for name, values in load_all(plain).items():
        module = name.removesuffix(".weight")
        if module.rpartition(".")[2] in packed.LINEARS and module != name:
            weight = weight_of(model, module)
            made = packed.coded(values, layout.bits, layout.group, layout.symmetric)
            step = made.step.float().amax(1, keepdim=True)
            off = ((weight.dequantize() - values) / step).abs()
            assert float(off.max()) < 0.1  # steps of its row's largest
            assert float(off.square().mean()) < 1 / 12 / 50  # rounding to the codes cost 1 / 12


def test_a_model_of_kept_codes_computes_what_it_decodes_to(tmp_path: Path) -> None:
    folder, plain = write_packed(tmp_path, LAYOUTS["awq"])
    wanted = logits_of(plain)
    assert error(folder, wanted, quant="none") < 1e-5
    assert error(folder, wanted) < 0.03  # int8 activations, head and embedding too


@pytest.mark.parametrize("layout", AGAIN.values(), ids=AGAIN)
def test_other_codes_are_decoded_and_quantized_again(
    tmp_path: Path, layout: Layout, caplog: pytest.LogCaptureFixture
) -> None:
    folder, plain = write_packed(tmp_path, layout)
    assert error(folder, logits_of(plain), quant="int8") < 0.03
    assert [line for line in caplog.messages if "of 12 quantized weights 12 are decoded and quantized again" in line]
    made = prepare(Checkpoint.open(folder), None, CausalLM).plan
    methods = {fill.quant.method for fill in made.fills if fill.quant and fill.quant.bits == 4}  # type: ignore[union-attr]
    assert methods == (
        {"calibrated"} if layout.bits == 8 or layout.declared.get("quant_method") == "fp8" else {"search"}
    )


def test_weights_of_more_bits_beside_kept_ones_become_int8(tmp_path: Path) -> None:
    folder, _ = write_packed(tmp_path, LAYOUTS["mlx"])
    tensors = load_all(folder)
    name = "model.layers.1.mlp.down_proj"
    values = packed.coded(torch.randn(64, 128), 6, 32, symmetric=False)
    tensors |= {f"{name}.{part}": value.contiguous() for part, value in packed.mlx(values).items()}
    write_all(folder, tensors, quantization=MLX | {name: {"bits": 6}, "lm_head": False})
    model = load(folder)
    assert [weight_of(model, f"model.layers.{layer}.mlp.down_proj").bits for layer in (0, 1)] == [4, 8]
    assert weight_of(model, "model.layers.1.self_attn.k_proj").bits == 4


def test_halves_of_a_fused_layer_are_put_together(tmp_path: Path) -> None:
    layout = LAYOUTS["gptq"]
    folder, plain = write_packed(tmp_path, layout, split=True)
    name = "model.layers.0.mlp.gate_up_proj.weight"
    torch.testing.assert_close(decoded(folder).tensor(name), Checkpoint.open(plain).tensor(name), rtol=1e-6, atol=1e-7)
    assert error(folder, logits_of(plain)) < 0.03
    tensors = load_all(folder)
    for part in ("qweight", "qzeros", "scales", "g_idx"):
        del tensors[f"model.layers.1.mlp.up_proj.{part}"]
    write_all(folder, tensors)
    with pytest.raises(CheckpointError, match=r"has model.layers.1.mlp.gate_proj.weight without its other half"):
        load(folder)


def test_halves_that_nobody_quantized_are_put_together(tmp_path: Path) -> None:
    tensors = {name: value.float() for name, value in tiny_tensors(packed.CONFIG).items()}
    apart = dict(tensors)
    for name in [name for name in tensors if "gate_up_proj" in name]:
        halves = zip(("gate_proj", "up_proj"), apart.pop(name).chunk(2), strict=True)
        apart |= {name.replace("gate_up_proj", half): value.contiguous() for half, value in halves}
    config = packed.CONFIG | {"torch_dtype": "float32"}
    one, two = write_checkpoint(tmp_path / "one", config, tensors), write_checkpoint(tmp_path / "two", config, apart)
    assert torch.equal(logits_of(one), logits_of(two))
    for folder in (one, two):
        quantize_checkpoint(folder, folder.with_name(f"{folder.name}-int4"), "int4")
    written = [load_all(folder.with_name(f"{folder.name}-int4")) for folder in (one, two)]
    assert written[0].keys() == written[1].keys()
    assert all(torch.equal(value, written[1][name]) for name, value in written[0].items())


def test_an_older_chatglm_checkpoint_has_q_k_and_v_in_one(tmp_path: Path) -> None:
    config = tiny_config(model_type="glm", intermediate_size=128)
    tensors = tiny_tensors(config)
    older = load_all(legacy_checkpoint(tmp_path / "older", config, tensors))
    for name in [name for name in older if name.endswith(".weight") and ".layers." in name and "norm" not in name]:
        made = packed.coded(older.pop(name), 4, 32)
        parts = packed.gptq(made)
        older |= {f"{name.removesuffix('weight')}{part}": value.contiguous() for part, value in parts.items()}
        if "query_key_value" in name and ".0." in name:
            wanted = made.decoded.float()
    write_all(tmp_path / "older", older, quantization_config=GPTQ)
    found = decoded(tmp_path / "older")
    rows = [found.tensor(f"model.layers.0.self_attn.{letter}_proj.weight") for letter in "qkv"]
    torch.testing.assert_close(torch.cat(rows), wanted, rtol=1e-6, atol=1e-7)
    model = load(tmp_path / "older")
    assert sum(isinstance(module, QuantLinear) for module in model.modules()) == 13


def test_it_is_quantized_into_a_folder_of_our_own(tmp_path: Path) -> None:
    folder, plain = write_packed(tmp_path, LAYOUTS["gptq"])
    written = quantize_checkpoint(folder, tmp_path / "int4", "int4")
    assert error(written, logits_of(plain)) < 0.03
    declared = json.loads((written / "config.json").read_text())["quantization_config"]
    assert declared["method"] == KEPT
    assert declared["exceptions"]["k_proj"] == 4
    with torch.no_grad():
        assert torch.equal(load(written)(IDS).logits, load(folder)(IDS).logits)


def test_a_model_of_kept_codes_is_saved_and_loaded(tmp_path: Path) -> None:
    folder, _ = write_packed(tmp_path, LAYOUTS["compressed-tensors"])
    model = load(folder)
    model.save_pretrained(tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "saved")(IDS).logits, model(IDS).logits)
    assert sum(isinstance(module, QuantLinear) for module in model.modules()) == 13


def test_plan_and_info_say_what_it_is(tmp_path: Path) -> None:
    folder, _ = write_packed(tmp_path, LAYOUTS["gptq"])
    facts = dict(model_facts(str(folder)))
    assert facts["stored as"] == "gptq, 4 bits in groups of 32, 2 matrices not quantized"
    assert plan(str(folder)).needs.quant == "int4"


# --- what is refused


def load_all(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def write_all(folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> None:
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    save_file(tensors, folder / "model.safetensors")
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | config), encoding="utf-8")


DOWN = "model.layers.1.mlp.down_proj"
DAMAGE = {
    "scales that are NaN": (
        "gptq",
        {f"{DOWN}.scales": lambda t: t.fill_(float("nan"))},
        {},
        f"{DOWN}.scales in .* holds nan at .0, 0.",
    ),
    "a group that is not there": ("gptq, act-order", {f"{DOWN}.g_idx": lambda t: t.fill_(4)}, {}, "speaks of group 4"),
    "a group below zero": ("gptq, act-order", {f"{DOWN}.g_idx": lambda t: t.fill_(-1)}, {}, "speaks of group -1"),
    "a part is missing": ("awq", {f"{DOWN}.qzeros": None}, {}, f"lacks {DOWN}.qzeros, a part of the quantized {DOWN}"),
    "groups that do not divide": (
        "awq",
        {},
        {"quantization_config": AWQ | {"group_size": 48}},
        "columns are no multiple of config.json's groups of 48",
    ),
    "zero points of another shape": ("awq", {f"{DOWN}.qzeros": lambda t: t[:, :4]}, {}, "expected I32 .4, 8."),
    "another type": ("gptq", {f"{DOWN}.qweight": lambda t: t.float()}, {}, r"is F32 .* expected I32"),
    "another width": ("gptq", {f"{DOWN}.qweight": lambda t: t[:, :32]}, {}, f"{DOWN}"),
    "a shape that lies": (
        "compressed-tensors",
        {f"{DOWN}.weight_shape": lambda t: t.fill_(10**12)},
        {},
        "says .1000000000000, 1000000000000., and there are 64 rows",
    ),
    "bits that do not fit": (
        "compressed-tensors",
        {},
        {"quantization_config": compressed(8)},
        "which config.json says",
    ),
    "a scale for all that is no number": (
        "fp8, a scale for all",
        {f"{DOWN}.weight_scale": lambda t: t.fill_(float("nan"))},
        {},
        f"{DOWN}.weight_scale in .* holds nan",
    ),
    "zero points of another type": (
        "compressed-tensors, not symmetric",
        {f"{DOWN}.weight_zero_point": lambda t: t.to(torch.int8)},
        {},
        "weight_zero_point .* is I8 .8, 4.; expected I8 .64, 4.",
    ),
    "a zero point that four bits have not": (
        "compressed-tensors",
        {f"{DOWN}.weight_zero_point": torch.full((64, 4), 100, dtype=torch.int8)},
        {},
        "holds a zero point that 4 bits cannot have",
    ),
    "a mode that is not affine": (
        "mlx",
        {},
        {"quantization": MLX | {"mode": "mxfp4"}},
        "mode is 'mxfp4'; only 'affine'",
    ),
    "a layout nobody knows": (
        "gptq",
        {},
        {"quantization_config": GPTQ | {"checkpoint_format": "gptq_p"}},
        "checkpoint_format is 'gptq_p'; only 'gptq', 'gptq_v2' can be read",
    ),
    "a packing nobody knows": (
        "auto-round",
        {},
        {"quantization_config": AUTO_ROUND | {"packing_format": "auto_round:other"}},
        "packing_format is 'auto_round:other'",
    ),
    "a transform": (
        "compressed-tensors",
        {},
        {"quantization_config": compressed(4) | {"transform_config": {"a": {}}}},
        "transform_config is set",
    ),
    "nothing is quantized": ("gptq", {}, {"quantization_config": compressed(4)}, "no weight is stored so"),
    "hqq of another shape": (
        "hqq",
        {f"{DOWN}.shape": lambda t: t.fill_(64)},
        {},
        r"says \[64, 64\], and there are 8192 codes",
    ),
}


@pytest.mark.parametrize(("start", "changes", "config", "said"), DAMAGE.values(), ids=DAMAGE)
def test_what_does_not_belong_together_gets_one_line(
    tmp_path: Path, start: str, changes: dict[str, Any], config: dict[str, Any], said: str
) -> None:
    folder, _ = write_packed(tmp_path, (LAYOUTS | AGAIN)[start])
    tensors = load_all(folder)
    for name, change in changes.items():
        if change is None:
            del tensors[name]
        else:
            tensors[name] = (change(tensors[name]) if callable(change) else change).contiguous()
    write_all(folder, tensors, **config)
    with pytest.raises((CheckpointError, ConfigError), match=said) as caught:
        load(folder)
    assert "\n" not in str(caught.value)
