"""NaN or infinity in a weight is refused when it is loaded, by the tensor's name and place."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from glm4lite.base.errors import CheckpointError
from glm4lite.checkpoint.quantize import quantize_checkpoint
from glm4lite.pretrained.load import load
from glm4lite_quant import QuantConfig
from tests.glm4lite.checkpoints import tiny_config, tiny_tensors, write_checkpoint

NORM, BIAS, MATRIX = "model.layers.1.input_layernorm.weight", "model.layers.0.self_attn.k_proj.bias", "lm_head.weight"
FAST = QuantConfig(method="minmax")


def damaged(folder: Path, name: str, value: float, dtype: torch.dtype = torch.bfloat16) -> Path:
    tensors = tiny_tensors(tiny_config(), dtype=dtype)
    tensors[name].flatten()[-1] = value
    return write_checkpoint(folder, tensors=tensors)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("quant", [None, FAST, "int4", "int8"])
@pytest.mark.parametrize("name", [NORM, BIAS, MATRIX])
def test_a_weight_that_is_no_number_is_named(tmp_path: Path, name: str, quant: Any, value: float) -> None:
    folder = damaged(tmp_path / "bad", name, value)
    with pytest.raises(CheckpointError, match=rf"^{re.escape(name)} in .* ({value:g}|{value})\b.*; download"):
        load(folder, quant=quant)


def test_a_float16_weight_that_is_no_number_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"^{re.escape(NORM)} in .* holds inf at \[63\]"):
        load(damaged(tmp_path / "bad", NORM, math.inf, torch.float16))


def test_quantizing_a_folder_refuses_the_norms_it_copies(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds nan"):
        quantize_checkpoint(damaged(tmp_path / "bad", NORM, math.nan), tmp_path / "written", FAST)
    assert not (tmp_path / "written").exists()


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
@pytest.mark.parametrize("plane", ["row_scale", "row_min"])
@pytest.mark.parametrize("budget", [{}, {"ram": "1GiB"}])
def test_a_row_of_a_stored_weight_that_is_no_number_is_named(
    tmp_path: Path, plane: str, value: float, budget: dict[str, Any]
) -> None:
    written = quantize_checkpoint(write_checkpoint(tmp_path / "tiny"), tmp_path / "q", FAST)
    file, name = written / "model.safetensors", "model.layers.1.mlp.down_proj"
    tensors = load_file(file)
    tensors[f"{name}.{plane}"][5] = value
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=rf"^{name}.weight in .*: {plane} is .* at row 5, which no weight has; "):
        load(written, **budget)
