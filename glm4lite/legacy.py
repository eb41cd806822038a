"""Older GLM-4 files (the `chatglm` remote code): their config keys and tensor names, as data.

Sources: transformers' convert_glm_weights_to_hf.py and convert_glm4_weights_to_hf.py, and the checkpoints' own
modeling_chatglm.py (RotaryEmbedding: base = 10000 * rope_ratio).
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from glm4lite.errors import CheckpointError, ConfigError
from glm4lite.shard import StoredTensor

CONFIG_KEYS: Mapping[str, str] = {
    "padded_vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "multi_query_group_num": "num_key_value_heads",
    "kv_channels": "head_dim",
    "ffn_hidden_size": "intermediate_size",
    "layernorm_epsilon": "rms_norm_eps",
    "seq_length": "max_position_embeddings",
    "add_qkv_bias": "attention_bias",
}
"""chatglm's config key -> ours. All must be there."""

KEPT_KEYS = ("attention_dropout", "eos_token_id", "pad_token_id", "tie_word_embeddings", "torch_dtype", "initializer_range")

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

IGNORED = re.compile(r".*rotary.*\.inv_freq|transformer\.rotary_pos_emb\..*")
"""Buffers that are computed, in old and new files."""


def is_legacy(config: Mapping[str, Any]) -> bool:
    return config.get("model_type") == "chatglm"


def translate_config(config: Mapping[str, Any], names: Iterable[str], path: object) -> dict[str, Any]:
    """A chatglm config.json in the keys of `Glm4Config`; `names` (any) tell the two-norm from the four-norm model.

    Raises:
        ConfigError: a key is missing, or biases are used where GLM-4 has none.
    """
    missing = [key for key in CONFIG_KEYS if key not in config]
    if missing:
        raise ConfigError(f"{path} has model_type chatglm but lacks {', '.join(missing)}; only GLM-4 files of that type can be read")
    if config.get("add_bias_linear"):
        raise ConfigError(f"{path} sets add_bias_linear, which GLM-4 does not have; this looks like another ChatGLM model")
    new = {ours: config[theirs] for theirs, ours in CONFIG_KEYS.items()} | {key: config[key] for key in KEPT_KEYS if key in config}
    if not config.get("multi_query_attention", True):
        new["num_key_value_heads"] = config["num_attention_heads"]
    ratio = config.get("rope_ratio", 1)
    if isinstance(ratio, bool) or not isinstance(ratio, int | float):
        raise ConfigError(f"{path}: rope_ratio must be a number, found {ratio!r}")
    four_norms = any("post_self_attn_layernorm" in name for name in names)
    return new | {
        "model_type": "glm4" if four_norms else "glm",
        "rope_theta": 10000.0 * ratio,
        "partial_rotary_factor": 0.5,
        "hidden_act": "silu",
    }


def rename(tensors: Mapping[str, StoredTensor], config: Mapping[str, Any]) -> dict[str, StoredTensor]:
    """The same tensors under our names, fused q, k, v rows as three tensors. `config` has our keys."""
    renamed: dict[str, StoredTensor] = {}
    for name, tensor in tensors.items():
        fused = FUSED_QKV.fullmatch(name)
        for new_name, part in _split_qkv(tensor, config, *fused.groups()) if fused else [(_new_name(name), tensor)]:
            renamed[new_name] = part
    return renamed


def _new_name(name: str) -> str:
    for pattern, replacement in RENAMES:
        match = re.fullmatch(pattern, name)
        if match:
            return match.expand(replacement)
    return name


def _split_qkv(tensor: StoredTensor, config: Mapping[str, Any], layer: str, kind: str) -> list[tuple[str, StoredTensor]]:
    head_dim = config["head_dim"]
    key_rows = config["num_key_value_heads"] * head_dim
    parts = {"q": config["num_attention_heads"] * head_dim, "k": key_rows, "v": key_rows}
    total = sum(parts.values())
    if not tensor.shape or tensor.shape[0] != total:
        raise CheckpointError(
            f"{tensor.name} in {tensor.path} has shape {list(tensor.shape)}; config.json's heads need {total} rows"
        )
    split, start = [], 0
    for letter, rows in parts.items():
        split.append((f"model.layers.{layer}.self_attn.{letter}_proj.{kind}", tensor.rows(start, start + rows)))
        start += rows
    return split
