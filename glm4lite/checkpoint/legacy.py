"""Tensor names of older GLM-4 files (model_type "chatglm", the remote code), as data. Their config keys: config.py.

Source: transformers' convert_glm_weights_to_hf.py and convert_glm4_weights_to_hf.py.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from glm4lite.base.errors import CheckpointError
from glm4lite.base.stored_tensor import StoredTensor
from glm4lite.model.config import Glm4Config

RENAMES: tuple[tuple[str, str], ...] = (
    (r"transformer\.embedding\.word_embeddings\.weight", "model.embed_tokens.weight"),
    (r"transformer\.encoder\.final_layernorm\.weight", "model.norm.weight"),
    (r"transformer\.output_layer\.weight", "lm_head.weight"),
    (r"transformer\.encoder\.layers\.(\d+)\.self_attention\.dense\.weight", r"model.layers.\1.self_attn.o_proj.weight"),
    (r"transformer\.encoder\.layers\.(\d+)\.mlp\.dense_h_to_4h\.weight", r"model.layers.\1.mlp.gate_up_proj.weight"),
    (r"transformer\.encoder\.layers\.(\d+)\.mlp\.dense_4h_to_h\.weight", r"model.layers.\1.mlp.down_proj.weight"),
    (r"transformer\.encoder\.layers\.(\d+)\.(\w+layernorm)\.weight", r"model.layers.\1.\2.weight"),
)
"""(pattern of the whole old name, new name)."""

FUSED_QKV = re.compile(r"transformer\.encoder\.layers\.(\d+)\.self_attention\.query_key_value\.(weight|bias)")
"""One tensor whose rows are all of q, then all of k, then all of v."""

_SCALES = ("_scale", "_scale_inv")  # what lies beside a weight that is itself the codes


def rename(tensors: Mapping[str, StoredTensor], config: Glm4Config) -> dict[str, StoredTensor]:
    """The same tensors under our names, fused q, k, v rows as three tensors."""
    packed = next((name for name in tensors if ".weight.quant_state." in name), None)
    if packed is not None:
        raise CheckpointError(
            f"{packed} in {tensors[packed].path}: bitsandbytes' weights cannot be read from an older chatglm "
            "checkpoint, where q, k and v are one; use the model's BF16 checkpoint, or a -hf one"
        )
    renamed: dict[str, StoredTensor] = {}
    for name, tensor in tensors.items():
        if any(f"{name}{beside}" in tensors for beside in _SCALES):  # renamed where it is decoded
            renamed[name] = tensor
            continue
        for new_name, first, count in places(name, tensor.shape[0] if tensor.shape else 0, config, tensor.path):
            whole = not tensor.shape or count == tensor.shape[0]
            renamed[new_name] = tensor if whole else tensor.rows(first, first + count)
    return renamed


def places(name: str, rows: int, config: Glm4Config, file: Path) -> list[tuple[str, int, int]]:
    """(new name, first row, rows) of each tensor that one of an older name is now; `file` is for messages.

    Raises:
        CheckpointError: it is q, k and v in one, but not of as many rows as config.json's heads need.
    """
    fused = FUSED_QKV.fullmatch(name)
    if fused is None:
        return [(_new_name(name), 0, rows)]
    head_dim = config.head_dim
    key_rows = config.num_key_value_heads * head_dim
    parts = {"q": config.num_attention_heads * head_dim, "k": key_rows, "v": key_rows}
    if rows != sum(parts.values()):
        raise CheckpointError(f"{name} in {file} has {rows} rows; config.json's heads need {sum(parts.values())}")
    found, first = [], 0
    for letter, count in parts.items():
        found.append((f"model.layers.{fused[1]}.self_attn.{letter}_proj.{fused[2]}", first, count))
        first += count
    return found


def _new_name(name: str) -> str:
    for pattern, replacement in RENAMES:
        match = re.fullmatch(pattern, name)
        if match:
            return match.expand(replacement)
    return name
