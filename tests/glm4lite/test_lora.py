"""LoRA adapters, by PEFT's own: what it trains and saves, loaded here, gives what its merged model gives."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Glm4ForCausalLM as Reference

from glm4lite import load
from glm4lite.base.errors import CheckpointError, ConfigError, Glm4liteError
from glm4lite.checkpoint.quantize import quantize_checkpoint
from glm4lite_quant import QuantConfig
from tests.glm4lite.checkpoints import tiny_config, tiny_tensors, write_checkpoint

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"]
IDS = torch.tensor([[5, 9, 133, 7, 81, 300, 22, 4, 17, 250, 31, 66]])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two float32 layers."""
    folder = tmp_path_factory.mktemp("lora") / "base"
    return plain(folder)


def plain(folder: Path, changed: dict[str, Tensor] | None = None) -> Path:
    config = tiny_config(torch_dtype="float32")
    tensors = {name: tensor.float() for name, tensor in tiny_tensors(config).items()} | (changed or {})
    return write_checkpoint(folder, config, tensors)


@pytest.fixture(scope="module")
def quantized(base: Path) -> Path:
    return quantize_checkpoint(base, base.parent / "int8", "int8")


@pytest.fixture(scope="module")
def quantized_reference(base: Path, quantized: Path) -> Path:
    """What the quantized weights stand for, as an ordinary folder."""
    model = load(quantized, device="cpu")
    weights = {name: getattr(module, "weight_tensor", None) for name, module in model.named_modules()}
    return plain(base.parent / "decoded", {f"{name}.weight": one.dequantize() for name, one in weights.items() if one})


def trained(base: Path, folder: Path, seed: int = 0, **settings: Any) -> Path:
    """An adapter that PEFT writes, with random values where training would leave some."""
    model = peft.get_peft_model(
        Reference.from_pretrained(base, dtype=torch.float32), peft.LoraConfig(task_type="CAUSAL_LM", **settings)
    )
    made = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            spread = 0.5 if "magnitude" in name else 0.2
            noise = torch.randn(parameter.shape, generator=made) * spread
            parameter.data = parameter.data * (1 + noise) if "magnitude" in name else parameter.data + noise
    model.save_pretrained(folder)
    return folder


def by_peft(base: Path, *adapters: Path) -> Tensor:
    """Logits of PEFT's model, with the adapters on, not merged."""
    model: Any = Reference.from_pretrained(base, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(model, adapters[0], adapter_name="0")
    for number, folder in enumerate(adapters[1:], 1):
        model.load_adapter(folder, adapter_name=str(number))
    model.base_model.set_adapter([str(number) for number in range(len(adapters))])
    with torch.no_grad():
        return model.eval()(IDS).logits


def by_us(base: Path, *adapters: str | Path, **settings: Any) -> Tensor:
    with torch.no_grad():
        return load(base, device="cpu", lora=adapters, **settings)(IDS).logits


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": dict(r=4, lora_alpha=8, target_modules=ALL),
    "rslora": dict(r=4, lora_alpha=8, use_rslora=True, target_modules=ALL),
    "patterns": dict(
        r=4,
        target_modules=ALL,
        rank_pattern={"o_proj": 2, r"layers\.1\.self_attn\.q_proj": 6, "q_proj": 3},
        alpha_pattern={"mlp.down_proj": 3, "model.layers.0.self_attn.k_proj": 16},
    ),
    "dora": dict(r=4, use_dora=True, target_modules=ALL),
    "lora_bias": dict(r=4, lora_bias=True, target_modules=["q_proj", "k_proj", "v_proj"]),
    "lora_bias where the model has none": dict(r=4, lora_bias=True, target_modules=ALL),
    "bias": dict(r=4, bias="all", target_modules=["q_proj", "o_proj"]),
    "modules_to_save": dict(r=4, target_modules=["v_proj"], modules_to_save=["lm_head", "norm"]),
    "embedding and head": dict(r=4, target_modules=["embed_tokens", "lm_head", "o_proj"]),
    "some layers": dict(r=4, target_modules=["q_proj"], layers_to_transform=[1]),
}


@pytest.fixture(scope="module", params=OPTIONS)
def adapter(request: pytest.FixtureRequest, base: Path) -> Path:
    return trained(base, base.parent / "adapters" / request.param, **OPTIONS[request.param])


def test_merged_into_a_plain_checkpoint_it_is_what_peft_computes(base: Path, adapter: Path) -> None:
    expected = by_peft(base, adapter)
    assert (expected - by_us(base)).abs().max() > 0.05
    torch.testing.assert_close(by_us(base, adapter), expected, atol=2e-4, rtol=1e-3)


def test_beside_a_quantized_checkpoint_it_is_what_peft_computes(
    quantized: Path, quantized_reference: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, plain = by_peft(quantized_reference, adapter), by_us(quantized)
    found = by_us(quantized, adapter)
    error = (found - expected).abs().mean() / (expected - plain).abs().mean()
    assert error < 0.03, "int8 activations, and an lm_head of its own that is quantized"
